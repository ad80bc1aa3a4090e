"""`shardbook chunks`, `read`, `export`, `du` and `doctor` over one real save."""

from __future__ import annotations

import importlib.metadata
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as plain_dcp

from shardbook import dcp
from shardbook.client import Client
from shardbook.doctor import Finding, Health, examine
from shardbook.status import ServerInfo
from shardbook_server.app import Server
from tests.behaviour.cli.conftest import Shardbook
from tests.behaviour.client.directories import identity
from tests.behaviour.client.saves import register, save, start_session

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning")

STATE = {
    "embed.weight": torch.arange(24.0).reshape(6, 4).bfloat16(),
    "norm": torch.tensor([1.5, float("nan"), float("-inf"), 0.0, -2.5]),
    "rope": torch.tensor([1 + 2j]),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture(scope="module")
def directory(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of ``tools/run@1``."""
    path = tmp_path_factory.mktemp("data") / "step-1"
    dcp.init(run="tools/run", server=server.address)
    dcp.save({**STATE, "note": "text"}, checkpoint_id=path)
    dcp.close()
    return path


@pytest.fixture(params=["ref", "directory"])
def target(request: pytest.FixtureRequest, server: Server, directory: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The checkpoint, in both ways to name it; by its directory no server is needed."""
    if request.param == "directory":
        return str(directory)
    monkeypatch.setenv("SHARDBOOK_SERVER", server.address)
    return "tools/run@latest"


@pytest.fixture
def asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> Client:
    """A client of the server that the commands ask."""
    monkeypatch.setenv("SHARDBOOK_SERVER", server.address)
    return Client(server.address)


# ------------------------------------------------------------------ chunks


def test_chunks_say_where_bytes_are(target: str, directory: Path, shardbook: Shardbook) -> None:
    """File, first byte and length are those of the data file: what lies there is what torch saved."""
    found = shardbook("chunks", target, "embed.weight", "--json").json
    [chunk] = found["chunks"]
    assert {"fqn": "embed.weight", "dtype": "bfloat16", "shape": [6, 4], "chunk_count": 1} == found["tensor"]
    assert ([0, 0], [6, 4], 0, []) == tuple(chunk[key] for key in ("offsets", "sizes", "rank", "transforms"))
    content = (Path(found["directory"]) / chunk["file"]).read_bytes()
    item = content[chunk["offset_bytes"] : chunk["offset_bytes"] + chunk["size_bytes"]]
    (directory.parent / "item").write_bytes(item)
    assert torch.equal(STATE["embed.weight"], torch.load(directory.parent / "item", weights_only=True))


def test_chunks_of_a_part(asked: Client, shardbook: Shardbook, tmp_path: Path) -> None:
    """Only those that the part touches, in either way to say it; both at once are refused."""
    save(asked, tmp_path, 5, run="tools/parts", incarnation=b"1" * 16)
    for words in (["model.w[2:5]"], ["model.w", "2:5"], ["model.w", "[2:5, :]"]):
        ran = shardbook("chunks", "tools/parts@5", *words)
        assert [("[2, 0]", "1"), ("[4, 0]", "2")] == [(row[0], row[2]) for row in ran.rows[2:]]
        assert "model.w: float32 [8, 3], 2 of 4 chunks" in ran.out
    cut = shardbook("chunks", "tools/parts@5", "model.w", "-n", "1", "--json").json
    assert (1, True) == (len(cut["chunks"]), cut["more"])
    assert 2 == shardbook("chunks", "tools/parts@5", "model.w[0]", "1").code
    absent = shardbook("chunks", "tools/parts@5", "model.v")
    assert (3, True) == (absent.code, "`shardbook tensors" in absent.err)


# ------------------------------------------------------------------ read


def test_read_says_what_values_are_like(target: str, shardbook: Shardbook) -> None:
    """Of the finite values; what is none is counted. Complex and empty tensors have no least value."""
    rows = {row["fqn"]: row for row in shardbook("read", target, *STATE, "--json").json["tensors"]}
    norm = torch.tensor([1.5, 0.0, -2.5], dtype=torch.float64)
    assert {
        "fqn": "norm",
        "dtype": "float32",
        "shape": [5],
        "cell_count": 5,
        "min": -2.5,
        "max": 1.5,
        "mean": pytest.approx(norm.mean().item()),
        "std": pytest.approx(norm.std(correction=0).item()),
        "zero_count": 1,
        "nan_count": 1,
        "inf_count": 1,
    } == rows["norm"]
    assert (0.0, 23.0, 11.5) == tuple(rows["embed.weight"][key] for key in ("min", "max", "mean"))
    for fqn in ("rope", "empty"):
        assert (None, None, None, None) == tuple(rows[fqn][key] for key in ("min", "max", "mean", "std"))
    ran = shardbook("read", target, "embed.weight[-1, :2]")
    assert ["embed.weight", "bfloat16", "[2]", "20", "21", "20.5", "0.5", "0", "0", "0"] == ran.rows[1]
    assert 2 == shardbook("read", target, "note").code


# ------------------------------------------------------------------ export


def test_an_exported_file_makes_the_data_loadable_by_plain_dcp(
    target: str, directory: Path, shardbook: Shardbook, tmp_path: Path
) -> None:
    """Data files and this file alone are a checkpoint of plain DCP; a file that is there is not replaced unasked."""
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy, ignore=shutil.ignore_patterns(".shardbook", ".metadata"))
    ran = shardbook("export", target, "-o", str(copy / ".metadata"), "--json")
    assert (0, (copy / ".metadata").stat().st_size) == (ran.code, ran.json["size_bytes"])
    state = {name: torch.zeros_like(value) for name, value in STATE.items()}
    plain_dcp.load(state, checkpoint_id=copy, no_dist=True)
    assert torch.equal(STATE["embed.weight"], state["embed.weight"])
    before = (copy / ".metadata").read_bytes()
    again = shardbook("export", target, "-o", str(copy / ".metadata"))
    assert (2, True, before) == (again.code, "--force" in again.err, (copy / ".metadata").read_bytes())
    assert 0 == shardbook("export", target, "-o", str(copy / ".metadata"), "--force").code
    assert 3 == shardbook("export", target, "-o", str(tmp_path / "nothing" / "there")).code


# ------------------------------------------------------------------ du


def test_du_adds_up_what_is_committed(asked: Client, shardbook: Shardbook, tmp_path: Path) -> None:
    """By run and part, largest first; open attempts take nothing that the catalogue knows of, superseded ones do."""
    for step in (1, 2):
        save(asked, tmp_path / str(step), step, run="usage/big", incarnation=b"1" * 16)
    save(asked, tmp_path / "again", 2, run="usage/big", incarnation=b"2" * 16)
    save(asked, tmp_path / "small", 1, run="usage/small", incarnation=b"1" * 16)
    session = start_session(asked, "usage/small", b"1" * 16).session
    who = replace(identity(9, run="usage/small", incarnation=b"1" * 16), session=session)
    register(asked, who, tmp_path / "open", ranks=(0,))
    ran = shardbook("du", "usage")
    assert [["288 B", "3", "96 B", "usage/big"], ["96 B", "1", "-", "usage/small"]] == ran.rows[1:3]
    assert "384 B in all" == ran.out.splitlines()[-1]
    alone = shardbook("du", "usage/small", "usage/small", "--json").json
    assert (96, 1) == (alone["size_bytes"], len(alone["parts"]))
    assert 384 <= shardbook("du", "--json").json["size_bytes"]
    assert 3 == shardbook("du", "usage/nothing").code


# ------------------------------------------------------------------ doctor


def findings(**options: Any) -> dict[str, Finding]:
    """What is found, by check."""
    return {finding.check: finding for finding in examine(**options)}


def test_doctor_finds_all_well(
    asked: Client, shardbook: Shardbook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line says ok, and the server tells its release, its database and its clock."""
    monkeypatch.setenv("SHARDBOOK_STORES", f"disk={tmp_path}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "yet"))
    ran = shardbook("doctor")
    assert (0, "") == (ran.code, ran.err)
    assert {"ok"} == {row[0] for row in ran.rows[1:]}
    assert "sqlite" in findings()["server"].detail
    assert {
        "python",
        "grpcio",
        "torch",
        "settings",
        "server",
        "token",
        "clock",
        "cache",
        "store disk",
    } <= set(findings())


def test_doctor_says_what_is_wrong_and_what_to_type(
    shardbook: Shardbook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule: what does not work is a failure and exits 1, each with what to do."""
    monkeypatch.setenv("SHARDBOOK_STORES", f"gone={tmp_path}/gone")
    ran = shardbook("doctor", "--server", "127.0.0.1:9", "--timeout", "0.2", "--json")
    failed = {one["check"]: one for one in ran.json["findings"] if one["health"] == "fail"}
    assert (1, {"server", "store gone"}, 2) == (ran.code, set(failed), ran.json["failed"])
    assert all(one["next"] for one in failed.values())
    monkeypatch.setenv("SHARDBOOK_MODE", "sometimes")
    broken = findings()
    assert (Health.FAIL, False) == (broken["settings"].health, "server" in broken)


def test_doctor_says_whether_answers_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: where it would be, whether it can be written, and that it is off when it is."""
    monkeypatch.setenv("SHARDBOOK_CACHE_DIR", str(tmp_path / "kept"))
    assert (Health.OK, True) == (findings()["cache"].health, str(tmp_path / "kept") in findings()["cache"].detail)
    monkeypatch.setattr("os.access", lambda *_: False)
    assert (Health.WARN, True) == (findings()["cache"].health, "SHARDBOOK_CACHE_DIR" in findings()["cache"].next)
    monkeypatch.setenv("SHARDBOOK_CACHE", "off")
    assert Health.OK is findings()["cache"].health


def test_doctor_compares_clocks_and_releases(asked: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: a clock that is off, an older server and an unsafe torch are told."""
    off = ServerInfo("0.0.1", "postgresql", datetime.now(UTC) - timedelta(seconds=90))
    monkeypatch.setattr(Client, "get_server_info", lambda _self: off)
    monkeypatch.setattr("shardbook.doctor.__version__", "1.2.0")
    found = findings()
    assert (Health.WARN, "90.0 s ahead of the database's") == (found["clock"].health, found["clock"].detail)
    assert (Health.WARN, True) == (found["server"].health, "upgrade the server" in found["server"].next)

    def version(name: str) -> str:
        if name == "torch":
            return "2.9.1+cu126"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("shardbook.doctor.version", version)
    found = findings()
    assert (Health.WARN, Health.FAIL, Health.WARN) == tuple(
        found[name].health for name in ("torch", "numpy", "google-crc32c")
    )
    assert "pip install 'torch>=2.10'" == found["torch"].next
