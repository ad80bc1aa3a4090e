"""What sync writes for plain DCP: ``.metadata`` without torch, as a whole or not at all."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from shardbook._trees import open_tree
from shardbook.core.directory import mark_path
from shardbook.core.exported import Fingerprint
from shardbook.core.fold import unfold
from shardbook.core.head import default_header
from shardbook.dcp.metadata import build_metadata
from tests.behaviour.client.directories import CheckpointDirectory, identity, manifest
from tests.torch.equality import differences


def test_dcp_metadata_is_written_without_torch(tmp_path: Path) -> None:
    """A login node has none; whoever loads with plain DCP has one, and finds what a save would have left."""
    who, step = identity(), CheckpointDirectory(tmp_path / "step-1500")
    step.add_manifest(who)
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from shardbook._attempts import TreeFiles\n"
        "from shardbook._publishing import export_dcp_metadata, settle\n"
        "from shardbook._trees import open_tree\n"
        "path = sys.argv[1]\n"
        "assert settle(TreeFiles(open_tree(path), path), lambda one: export_dcp_metadata(path, one)) == ()\n"
    )
    subprocess.run([sys.executable, "-c", program, str(step.path)], check=True)
    folded = unfold(manifest(who))
    expected = build_metadata(folded.structure, folded.located, who.prefix, default_header(str(step.path), who.prefix))
    content = (step.path / ".metadata").read_bytes()
    assert [] == differences(expected, pickle.loads(content))
    assert (step.path / mark_path(who.prefix, Fingerprint.of(len(content), content).mark)).exists()


@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_file_that_ends_in_an_error_is_not_there(scheme: str, tmp_path: Path) -> None:
    """Content in blocks replaces a file as a whole or not at all, on disks and object stores."""
    root = f"{scheme}{tmp_path}"
    if scheme:
        fsspec.filesystem("memory").makedirs(str(tmp_path))
    tree = open_tree(root)

    def broken() -> Iterator[bytes]:
        yield b"half"
        raise OSError("the rest")

    tree.write(f"{root}/file", iter([b"one", b"two"]))
    with pytest.raises(OSError, match="the rest"):
        tree.write(f"{root}/file", broken())
    assert b"onetwo" == tree.read(f"{root}/file")
    assert ["file"] == tree.names(root)
