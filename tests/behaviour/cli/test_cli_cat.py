"""``shardbook cat``: tensors on a terminal, as JSON, and in files, from a directory and from the catalogue."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from shardbook import dcp
from shardbook.cli import cat as module
from shardbook_server.app import Server
from tests.behaviour.cli.conftest import Shardbook

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")

ROOT = Path(__file__).resolve().parents[3]
STATE = {
    "embed.weight": torch.arange(24.0).reshape(6, 4).bfloat16(),
    "norm": torch.tensor([1.5, float("nan"), float("-inf")]),
    "rope": torch.tensor([1 + 2j]),
    "step": torch.tensor(7),
    "groups[0]": torch.tensor([True, False]),
    "long": torch.zeros(2000),
}


@pytest.fixture(scope="module")
def directory(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of ``cat/run@1``."""
    path = tmp_path_factory.mktemp("data") / "step-1"
    dcp.init(run="cat/run", server=server.address)
    dcp.save({**STATE, "note": "text"}, checkpoint_id=path)
    dcp.close()
    return path


@pytest.fixture(params=["ref", "directory"])
def target(request: pytest.FixtureRequest, server: Server, directory: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The checkpoint, in both ways to name it; by its directory no server is needed."""
    if request.param == "directory":
        return str(directory)
    monkeypatch.setenv("SHARDBOOK_SERVER", server.address)
    return "cat/run@latest"


def test_a_part_is_printed(target: str, shardbook: Shardbook) -> None:
    """Name, dtype and shape, then the values."""
    ran = shardbook("cat", target, "embed.weight[1:3]", "step", "groups[0][...]")
    assert 0 == ran.code
    assert [
        "embed.weight: bfloat16 [2, 4]",
        "[[4 5 6 7]",
        " [8 9 10 11]]",
        "step: int64 []",
        "7",
        "groups[0]: bool [2]",
        "[ True False]",
    ] == ran.out.splitlines()


def test_a_long_tensor_is_cut_short(target: str, shardbook: Shardbook) -> None:
    """A terminal is no place for two thousand numbers."""
    assert ["long: float32 [2000]", "[0. 0. 0. ... 0. 0. 0.]"] == shardbook("cat", target, "long").out.splitlines()


def test_json_has_the_values(target: str, shardbook: Shardbook) -> None:
    """What JSON lacks is text, complex numbers are pairs, and what is long is left to a file."""
    found = shardbook(
        "cat", target, "embed.weight[-1, :2]", "norm", "rope", "step", "groups[0][...]", "long", "--json"
    ).json
    first, *rest = found["tensors"]
    assert {
        "fqn": "embed.weight",
        "dtype": "bfloat16",
        "tensor_shape": [6, 4],
        "offsets": [5, 0],
        "shape": [2],
        "size_bytes": 4,
        "values": [20.0, 21.0],
    } == first
    assert [[1.5, "nan", "-inf"], [[1.0, 2.0]], 7, [True, False], None] == [one["values"] for one in rest]
    assert found["output"] is None


def test_a_safetensors_file_is_written(target: str, shardbook: Shardbook, tmp_path: Path) -> None:
    """torch reads it; the header names the checkpoint."""
    path = tmp_path / "x.safetensors"
    ran = shardbook("cat", target, "embed.weight[0:2]", "norm", "-o", str(path))
    assert (0, [f"{path}: 2 tensors, 28 B"]) == (ran.code, ran.out.splitlines())
    loaded = load_file(path)
    assert torch.equal(STATE["embed.weight"][:2], loaded["embed.weight"])
    assert STATE["norm"].numpy().tobytes() == loaded["norm"].numpy().tobytes()
    with safe_open(path, "pt") as file:
        assert {"format": "pt", "shardbook_ref": target} == file.metadata()
    told = shardbook("cat", target, "norm", "-o", str(path), "--json").json
    assert (str(path), None) == (told["output"], told["tensors"][0]["values"])
    assert ["norm"] == list(load_file(path))


def test_an_npy_file_is_written(target: str, shardbook: Shardbook, tmp_path: Path) -> None:
    """One tensor of a dtype that numpy has."""
    assert 0 == shardbook("cat", target, "long[:3]", "-o", str(tmp_path / "x.npy")).code
    assert [0.0, 0.0, 0.0] == np.load(tmp_path / "x.npy", allow_pickle=False).tolist()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing"], 3, "no entry 'missing'"),
        (["note"], 2, "bytes entry"),
        (["norm[0:2:2]"], 2, "step 2"),
        (["norm[5]"], 2, "outside of dimension 0"),
        (["norm[0, 0]"], 2, "2 indices for 1 dimensions"),
        (["norm[x]"], 2, "neither an index nor a slice"),
        (["norm", "norm[1]"], 2, "named twice"),
        (["norm", "-o", "x.pt"], 2, "neither .safetensors nor .npy"),
        (["norm", "step", "-o", "x.npy"], 2, "can hold one tensor"),
        (["embed.weight", "-o", "x.npy"], 2, "write .safetensors"),
        (["norm", "-o", "no/such/folder.safetensors"], 1, "cannot write"),
    ],
)
def test_what_cannot_be_is_said(
    target: str,
    shardbook: Shardbook,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    """Exit codes as everywhere, and no file is left."""
    monkeypatch.chdir(tmp_path)
    ran = shardbook("cat", target, *arguments)
    assert (code, "") == (ran.code, ran.out)
    assert message in ran.err
    assert [] == list(tmp_path.iterdir())


def test_too_much_for_a_terminal_is_refused(target: str, shardbook: Shardbook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is read; the way out is named."""
    monkeypatch.setattr(module, "_PRINTED_BYTES", 7999)
    ran = shardbook("cat", target, "long")
    assert (2, True) == (ran.code, "-o FILE.safetensors" in ran.err)
    assert 0 == shardbook("cat", target, "long[1:]").code


def test_a_ref_needs_a_server_and_a_directory_must_be_there(shardbook: Shardbook, tmp_path: Path) -> None:
    """Which one is missing is said."""
    assert "SHARDBOOK_SERVER" in shardbook("cat", "cat/run@1", "norm").err
    assert 3 == shardbook("cat", str(tmp_path / "none"), "norm").code


def test_neither_torch_nor_a_server_is_needed(directory: Path, tmp_path: Path) -> None:
    """A fresh interpreter in which torch cannot be imported: a laptop."""
    code = "import sys; sys.modules['torch'] = None; from shardbook.cli import main; main()"
    path = tmp_path / "x.safetensors"
    command = [sys.executable, "-W", "error", "-c", code, "cat", str(directory), "embed.weight[2]", "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ("", 0) == (done.stderr, done.returncode)
    assert torch.equal(STATE["embed.weight"][2], load_file(path)["embed.weight"])
