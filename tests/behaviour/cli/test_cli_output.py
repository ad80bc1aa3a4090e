"""What the commands print, against a server whose answers the test knows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from shardbook import catalog
from shardbook.cli import output
from shardbook.v1 import catalog_pb2, metadata_pb2, types_pb2
from tests.behaviour.cli.conftest import Shardbook
from tests.behaviour.client.scripted import ScriptedServer, scripted_server

NAME = "projects/llm/runs/8b/parts/default/checkpoints"


def checkpoint(step: int, **changes: Any) -> types_pb2.Checkpoint:
    """A committed checkpoint."""
    facts: dict[str, Any] = {
        "name": f"{NAME}/{step}.s3.a1",
        "ref": f"llm/8b@{step}",
        "step": step,
        "session": 3,
        "attempt": 1,
        "incarnation": bytes(range(16)),
        "world_size": 1024,
        "state": types_pb2.CHECKPOINT_STATE_COMMITTED,
        "live": True,
        "location": {"location": "lustre:8b/step", "prefix": "000102030405-a1"},
        "tensor_count": 3411,
        "chunk_count": 2812800,
        "bytes_entry_count": 7,
        "size_bytes": 5 << 40,
        "create_time": {"seconds": 1_700_000_000},
        "commit_time": {"seconds": 1_700_000_060, "nanos": 500_000_000},
        "structure_digest": b"\xab" * 32,
    }
    return types_pb2.Checkpoint(**{**facts, **changes})


LATEST = checkpoint(40, aliases=["best", "latest"])
OPEN = checkpoint(
    30,
    state=types_pb2.CHECKPOINT_STATE_OPEN,
    live=False,
    tensor_count=0,
    commit_time=None,
    structure_digest=b"",
)
FAILED = checkpoint(
    20,
    state=types_pb2.CHECKPOINT_STATE_FAILED,
    live=False,
    failure="rank 3 on node-7: No space left on device\x1b[31m",
    warnings=["tensor a: ranks held different shapes"],
)
OLD = checkpoint(10, live=False, ref="llm/8b@10.s2", session=2, recovered=True)
RUN = types_pb2.Run(
    name="projects/llm/runs/8b",
    create_time={"seconds": 1_700_000_000},
    parts=[
        {
            "part": "default",
            "session": 3,
            "host": "node-1",
            "user": "ada",
            "job_id": "4711",
            "writing": True,
            "last_seen_time": {"seconds": 1_700_000_090},
            "latest": f"{NAME}/40.s3.a1",
            "latest_step": 40,
            "checkpoint_count": 12,
        },
        {"part": "optim"},
    ],
)
TENSORS = [
    metadata_pb2.TensorInfo(
        fqn=b"model.w", dtype="bfloat16", shape=[4096, 512], chunk_count=8, size_bytes=4 << 20, tensor=True
    ),
    metadata_pb2.TensorInfo(fqn=b"scale", dtype="float32", chunk_count=1, size_bytes=4, tensor=True),
    metadata_pb2.TensorInfo(
        fqn="bad\n\x1b[2J\ud800[red]".encode("utf-8", "surrogatepass"), chunk_count=1, size_bytes=1536
    ),
]


def checkpoints(request: catalog_pb2.ListCheckpointsRequest, _: Any) -> catalog_pb2.ListCheckpointsResponse:
    """Serves two a page, whatever is asked."""
    rows = [LATEST, OPEN, FAILED, OLD] if request.show_all else [LATEST]
    start = int(request.page_token or 0)
    more = str(start + 2) if start + 2 < len(rows) else ""
    return catalog_pb2.ListCheckpointsResponse(checkpoints=rows[start : start + 2], next_page_token=more)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    """A server that knows one run; named by SHARDBOOK_SERVER."""
    by_step = {"40": LATEST, "20": FAILED, "10.s2": OLD}
    with scripted_server(
        ListRuns=lambda *_: catalog_pb2.ListRunsResponse(runs=[RUN]),
        GetRun=lambda *_: catalog_pb2.GetRunResponse(run=RUN),
        ListCheckpoints=checkpoints,
        GetCheckpoint=lambda request, _: catalog_pb2.GetCheckpointResponse(
            checkpoint=by_step[request.name.rpartition("/")[2]]
        ),
        ListTensors=lambda *_: metadata_pb2.ListTensorsResponse(tensors=TENSORS, total_size=3),
    ) as running:
        monkeypatch.setenv("SHARDBOOK_SERVER", running.target)
        yield running


def test_runs_table(server: ScriptedServer, shardbook: Shardbook) -> None:
    """One row a part: where it stands, who writes it."""
    ran = shardbook("runs")
    assert [
        ["RUN", "LATEST", "CHECKPOINTS", "WRITING", "SESSION", "HOST", "USER", "LAST SEEN"],
        ["llm/8b", "40", "12", "yes", "3", "node-1", "ada", "2023-11-14 22:14:50Z"],
        ["llm/8b:optim", "-", "0", "no", "0", "-", "-", "-"],
    ] == ran.rows


def test_ls_table(server: ScriptedServer, shardbook: Shardbook) -> None:
    """Committed ones show what they hold; others show a dash for what is not proved."""
    ran = shardbook("ls", "llm/8b", "--all")
    assert (0, "") == (ran.code, ran.err)
    header = ["STEP", "STATE", "REF", "ALIASES", "WORLD", "TENSORS", "CHUNKS", "SIZE", "CREATED", "SESSION"]
    created = "2023-11-14 22:13:20Z"
    assert [
        header,
        ["40", "committed", "llm/8b@40", "best, latest", "1,024", "3,411", "2,812,800", "5.0 TiB", created, "3"],
        ["30", "open", "llm/8b@30", "-", "1,024", "-", "-", "-", created, "3"],
        ["20", "failed", "llm/8b@20", "-", "1,024", "-", "-", "-", created, "3"],
        ["10", "superseded", "llm/8b@10.s2", "-", "1,024", "3,411", "2,812,800", "5.0 TiB", created, "2"],
    ] == ran.rows


def test_ls_pages_under_the_hood_and_says_when_it_stops(server: ScriptedServer, shardbook: Shardbook) -> None:
    """`--limit` counts rows, not pages; 0 shows all. Who chose the number is not told that there are more."""
    ran = shardbook("ls", "llm/8b", "--all", "--limit", "3")
    assert ["STEP", "40", "30", "20"] == [row[0] for row in ran.rows]
    assert 5 == len(shardbook("ls", "llm/8b", "--all", "-n", "0").rows)
    assert (3, True) == (
        len(shardbook("ls", "llm/8b", "--all", "-n", "3", "--json").json["checkpoints"]),
        shardbook("ls", "llm/8b", "--all", "-n", "3", "--json").json["more"],
    )
    assert not shardbook("ls", "llm/8b", "--all", "-n", "4", "--json").json["more"]


def test_lists_that_end_by_themselves_say_so(shardbook: Shardbook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: 50 rows unless a number is given, and then how to see all; nothing of that with a number."""
    with scripted_server(
        ListCheckpoints=lambda *_: catalog_pb2.ListCheckpointsResponse(checkpoints=[LATEST] * 51),
        ListRuns=lambda *_: catalog_pb2.ListRunsResponse(runs=[RUN] * 51),
        ListProjects=lambda *_: catalog_pb2.ListProjectsResponse(projects=[{"name": "projects/llm"}] * 51),
        ListTensors=lambda *_: metadata_pb2.ListTensorsResponse(tensors=TENSORS[:1] * 51, total_size=51),
    ) as running:
        monkeypatch.setenv("SHARDBOOK_SERVER", running.target)
        lists = {"ls": ("llm/8b",), "runs": (), "projects": (), "tensors": ("llm/8b@40",)}
        last = {name: shardbook(name, *args).out.splitlines()[-1] for name, args in lists.items()}
        chosen = {name: shardbook(name, *args, "--limit", "50").out for name, args in lists.items()}
    nouns = {"ls": "checkpoints", "runs": "runs", "projects": "projects", "tensors": "entries"}
    assert {name: f"only the first 50 {noun}: --limit 0 shows all" for name, noun in nouns.items()} == {
        name: line.partition(", ")[0] for name, line in last.items()
    }
    assert not [name for name, out in chosen.items() if "only the first" in out]


@pytest.mark.parametrize(
    ("args", "header", "cells"),
    [
        (("-f", "metrics.val_loss < 0.1"), ["val_loss"], ["0.05"]),
        (("-f", 'labels.team = "metrics.x < 1" AND step > 1'), ["team"], ["red"]),
        (
            ("-f", "NOT metrics.absent:* OR metrics.val_loss>0", "-o", "labels.team desc"),
            ["team", "absent", "val_loss"],
            ["red", "-", "0.05"],
        ),
        (("-f", "labels.team = red AND labels.team != blue"), ["team"], ["red"]),
        (("-f", "labels.score = x OR metrics.score = 1"), ["labels.score", "metrics.score"], ["-", "7"]),
        (("-f", "labels.STATE:*"), ["labels.STATE"], ["-"]),
        (("-f", " AND ".join(f"metrics.m{n} > 0" for n in range(9))), ["m0", "m1", "m2", "m3"], ["-"] * 4),
        (("-f", "step = 40 AND run = labels.team"), [], []),
    ],
    ids=["metric", "quoted", "order-first", "once", "one-key", "a-header", "a-few", "none"],
)
def test_ls_shows_what_is_asked_for(
    args: tuple[str, ...], header: list[str], cells: list[str], shardbook: Shardbook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule: labels and metrics of the order and of the filter have columns behind the aliases, four at most."""
    one = checkpoint(40, labels={"team": "red"}, metrics={"val_loss": 0.05, "score": 7.0})
    with scripted_server(ListCheckpoints=lambda *_: catalog_pb2.ListCheckpointsResponse(checkpoints=[one])) as running:
        monkeypatch.setenv("SHARDBOOK_SERVER", running.target)
        rows = shardbook("ls", "llm/8b", *args).rows
    assert [["ALIASES", *header, "WORLD"], ["-", *cells, "1,024"]] == [row[3 : 5 + len(header)] for row in rows]


def test_ls_of_a_part(server: ScriptedServer, shardbook: Shardbook) -> None:
    """`project/run:part` lists one part, `project/run` all of them."""
    shardbook("ls", "llm/8b:optim")
    shardbook("ls", "llm/8b")
    assert ["projects/llm/runs/8b/parts/optim", "projects/llm/runs/8b/parts/-"] == [
        request.parent for request in server.of("ListCheckpoints")
    ]


def test_ls_says_what_latest_means(server: ScriptedServer, shardbook: Shardbook) -> None:
    """By part, for programs too: it need not be the newest one, and a part may have none."""
    assert {"default": f"{NAME}/40.s3.a1", "optim": None} == shardbook("ls", "llm/8b", "--json").json["latest"]
    assert {"optim": None} == shardbook("ls", "llm/8b:optim", "--json").json["latest"]


@pytest.mark.parametrize("width", [80, 40])
def test_ls_fits_a_terminal(
    width: int, server: ScriptedServer, shardbook: Shardbook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row is a line, refs whole: times lose their seconds, and columns go in order."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    ran = shardbook("ls", "llm/8b", "--all")
    assert 5 == len(ran.out.splitlines())
    assert all(len(line) <= width for line in ran.out.splitlines())
    assert ["llm/8b@40", "llm/8b@30", "llm/8b@20", "llm/8b@10.s2"] == [row[2] for row in ran.rows[1:]]
    assert (width == 80) == ("2023-11-14 22:13Z" in ran.out)


def test_runs_of_a_project_without_any(server: ScriptedServer, shardbook: Shardbook) -> None:
    """Where other projects have runs, the name is the likely mistake; where none has, how to begin is told."""
    assert "llm/8b" in shardbook("runs", "llm").out
    with scripted_server(
        ListRuns=lambda request, _: catalog_pb2.ListRunsResponse(runs=[RUN] if request.parent == "projects/-" else [])
    ) as other:
        ran = shardbook("runs", "nope", "--server", other.target)
    assert "no runs in project nope: `shardbook runs` lists those of all projects" == ran.out.splitlines()[-1]
    with scripted_server(ListRuns=lambda *_: catalog_pb2.ListRunsResponse()) as empty:
        ran = shardbook("runs", "nope", "--server", empty.target)
    assert "no runs yet: `shardbook.dcp.init(run='nope/run')` starts one" == ran.out.splitlines()[-1]


def test_show_prints_everything(server: ScriptedServer, shardbook: Shardbook) -> None:
    """Every fact of a checkpoint, warnings and failure included, control characters escaped."""
    ran = shardbook("show", "llm/8b@20")
    facts = {row[0]: row[1] for row in ran.rows}
    assert {
        "ref": "llm/8b@20",
        "state": "failed",
        "location": "lustre:8b/step",
        "data directory": "000102030405-a1",
        "step": "20",
        "part": "default",
        "session": "3, attempt 1, incarnation 000102030405060708090a0b0c0d0e0f",
        "world size": "1,024",
        "tensors": "3,411",
        "chunks": "2,812,800",
        "bytes entries": "7",
        "size": "5.0 TiB (5,497,558,138,880 bytes)",
        "created": "2023-11-14 22:13:20Z",
        "committed": "2023-11-14 22:14:20Z",
        "structure": "ab" * 32,
        "name": f"{NAME}/20.s3.a1",
        "failure": "rank 3 on node-7: No space left on device\\x1b[31m",
        "warning": "tensor a: ranks held different shapes",
    } == facts
    assert "superseded, recorded after the fact" in shardbook("show", "llm/8b@10.s2").out


def test_show_says_where_a_store_is_here(
    server: ScriptedServer, shardbook: Shardbook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where this machine knows the store, the path to use is printed too."""
    assert "path here" not in shardbook("show", "llm/8b@40").out
    monkeypatch.setenv("SHARDBOOK_STORES", "lustre=/mnt/lustre")
    assert ["path here", "/mnt/lustre/8b/step"] in shardbook("show", "llm/8b@40").rows


def test_tensors_table_shows_any_name_safely(server: ScriptedServer, shardbook: Shardbook) -> None:
    """Names that would move the cursor, or look like markup, are shown as text; JSON has them exactly."""
    ran = shardbook("tensors", "llm/8b@40")
    assert [
        ["NAME", "DTYPE", "SHAPE", "CHUNKS", "SIZE IN FILES"],
        ["model.w", "bfloat16", "[4096, 512]", "8", "4.0 MiB"],
        ["scale", "float32", "[]", "1", "4 B"],
        ["bad\\n\\x1b[2J\\ud800[red]", "(object)", "-", "1", "1.5 KiB"],
    ] == ran.rows
    assert "bad\n\x1b[2J\ud800[red]" == shardbook("tensors", "llm/8b@40", "--json").json["tensors"][2]["fqn"]


def test_tensors_says_that_nothing_begins_with_a_prefix(shardbook: Shardbook) -> None:
    """An empty table alone would look like an empty checkpoint."""
    with scripted_server(ListTensors=lambda *_: metadata_pb2.ListTensorsResponse()) as bare:
        ran = shardbook("tensors", "llm/8b@40", "-p", "nothing", "--server", bare.target)
    assert (0, True) == (ran.code, ran.out.splitlines()[-1].startswith("nothing begins with nothing: "))


def test_tensors_prefix_is_the_servers_business(server: ScriptedServer, shardbook: Shardbook) -> None:
    """`--prefix` travels to the server, as bytes."""
    shardbook("tensors", "llm/8b@40", "--prefix", "model.\u00e4")
    assert "model.\u00e4".encode() == server.of("ListTensors")[0].fqn_prefix


@pytest.mark.parametrize(
    ("args", "key", "cls"),
    [
        (["runs", "--json"], "runs", catalog.Run),
        (["ls", "llm/8b", "--json"], "checkpoints", catalog.Checkpoint),
        (["show", "llm/8b@40", "--json"], "checkpoint", catalog.Checkpoint),
        (["tensors", "llm/8b@40", "--json"], "tensors", catalog.TensorInfo),
    ],
)
def test_json_has_the_documented_keys(
    args: list[str], key: str, cls: type[Any], server: ScriptedServer, shardbook: Shardbook
) -> None:
    """What is printed are the attributes that docs/cli.md lists from the code, no more and no less."""
    value = shardbook(*args).json[key]
    row = value[0] if isinstance(value, list) else value
    assert [field.name for field in dataclasses.fields(cls)] == list(row)


def test_json_of_a_checkpoint(server: ScriptedServer, shardbook: Shardbook) -> None:
    """Times in RFC 3339, digests in hex, states by name."""
    value = shardbook("show", "llm/8b@40", "--json").json["checkpoint"]
    assert ("COMMITTED", "2023-11-14T22:13:20.000Z", "2023-11-14T22:14:20.500Z", "ab" * 32, True) == (
        value["state"],
        value["create_time"],
        value["commit_time"],
        value["structure_digest"],
        value["live"],
    )
    assert None is shardbook("ls", "llm/8b", "--all", "--json").json["checkpoints"][1]["commit_time"]


def test_json_is_ascii(server: ScriptedServer, shardbook: Shardbook) -> None:
    """Every parser in every locale reads it, lone surrogates included."""
    text = shardbook("tensors", "llm/8b@40", "--json").out
    assert text.isascii()
    json.loads(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1 << 20, "1.0 MiB"),
        ((1 << 30) - 1, "1.0 GiB"),
        (3 << 60, "3.0 EiB"),
    ],
)
def test_sizes_for_people(size_bytes: int, text: str) -> None:
    """Binary units, one decimal, never 1024.0 of one."""
    assert text == output.size(size_bytes)


def test_times_for_people() -> None:
    """UTC to the second; a dash for none."""
    assert ("2026-11-23 09:30:00Z", "-") == (output.time(datetime(2026, 11, 23, 9, 30, tzinfo=UTC)), output.time(None))


def test_a_narrow_terminal_loses_columns_not_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What can be spared goes, in order, until the rest fits; a name stays whole, to be copied."""
    columns = (("REF", False), ("SIZE", True), ("SESSION", True))
    shown = {}
    for width in (80, 30, 10):
        monkeypatch.setattr(output, "_console", lambda width=width, **_: Console(width=width, highlight=False))
        output.print_table(columns, [("llm/8b-v3@1500", "1.4 GiB", "12")], expendable=("SESSION", "SIZE"))
        header, row = capsys.readouterr().out.splitlines()[:2]
        shown[width] = header.split()
        assert row.startswith("llm/8b-v3@1500")
    assert {80: ["REF", "SIZE", "SESSION"], 30: ["REF", "SIZE"], 10: ["REF"]} == shown


def test_one_is_no_plural() -> None:
    """Counts agree with their noun."""
    assert ["0 files", "1 file", "2,048 files"] == [output.counted(number, "file") for number in (0, 1, 2048)]
