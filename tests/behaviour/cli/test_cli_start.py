"""What a command waits for before it begins: what is imported, asked of fresh interpreters, and never how long it took.

A person or a shell waits for each start, and numpy, gRPC and rich are most of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from shardbook.v1 import catalog_pb2, metadata_pb2
from tests.behaviour.cli.test_cli_output import LATEST, RUN, TENSORS, checkpoints
from tests.behaviour.client.scripted import scripted_server

#: What takes long to import.
HEAVY = {"fsspec", "google.protobuf", "grpc", "numpy", "rich", "torch", "zstandard"}
_LAST = "\nimport json; print(); print(json.dumps(sorted(sys.modules)))"
#: Runs one command after the other in one process.
_RUN = """
import sys
from shardbook.cli import main
for words in {lines!r}:
    sys.argv = ["shardbook", *words]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, (words, ended.code)
"""


def heavy_after(code: str, **environment: str) -> set[str]:
    """What of the heavy modules a fresh interpreter holds after running ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", code + _LAST],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ("", 0) == (done.stderr, done.returncode)
    return HEAVY & set(json.loads(done.stdout.splitlines()[-1]))


def ran(*lines: list[str]) -> str:
    """Code that runs commands; each has to end well."""
    return _RUN.format(lines=lines)


def test_help_and_version_need_none_of_it() -> None:
    """Rule: `shardbook --help` and `--version` import no command, and nothing that takes long."""
    assert set() == heavy_after(ran(["--help"], ["--version"]))


@pytest.mark.parametrize("words", ["shardbook d", "shardbook ls --o"], ids=["commands", "options"])
def test_completion_of_what_is_typed_needs_no_client(words: str) -> None:
    """Rule: a TAB behind a command or an option loads no gRPC, numpy or rich: it asks no server."""
    environment = {
        "_SHARDBOOK_COMPLETE": "complete_bash",
        "COMP_WORDS": words.replace(" ", "\n"),
        "COMP_CWORD": str(words.count(" ")),
    }
    loaded = heavy_after(ran([]), **environment)
    assert set() == loaded - ({"google.protobuf"} if "ls" in words else set())


def test_importing_every_command_is_light() -> None:
    """Rule: so is the help of any of them; what takes long is imported by what runs."""
    code = "import sys\nfrom shardbook.cli.registry import COMMANDS\nfor one in COMMANDS.values(): one.load()"
    assert {"google.protobuf"} == heavy_after(code)


def test_looking_at_the_catalogue_needs_no_numpy() -> None:
    """Rule: who lists runs, checkpoints or tensors waits for gRPC, not for numpy; with --json not for rich either."""

    def found(*_: Any) -> catalog_pb2.GetCheckpointResponse:
        return catalog_pb2.GetCheckpointResponse(checkpoint=LATEST)

    with scripted_server(
        ListRuns=lambda *_: catalog_pb2.ListRunsResponse(runs=[RUN]),
        GetRun=lambda *_: catalog_pb2.GetRunResponse(run=RUN),
        ListCheckpoints=checkpoints,
        GetCheckpoint=found,
        ListTensors=lambda *_: metadata_pb2.ListTensorsResponse(tensors=TENSORS, total_size=3),
    ) as server:
        lines = (["runs"], ["ls", "llm/8b"], ["show", "llm/8b@40"], ["tensors", "llm/8b@40"])
        environment = {"SHARDBOOK_SERVER": server.target}
        assert {"google.protobuf", "grpc", "rich"} == heavy_after(ran(*lines), **environment)
        assert {"google.protobuf", "grpc"} == heavy_after(ran(*([*one, "--json"] for one in lines)), **environment)
