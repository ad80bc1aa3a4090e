"""`shardbook diff`: checkpoints of the catalogue and directories, held against each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import shardbook as package
from shardbook.client import Client
from shardbook.core import directory as files
from shardbook.core.extents import Extents, encode_extents
from shardbook.core.fold import FoldedAttempt, fold
from shardbook.core.manifest import AttemptIdentity, RegistrationRecord, StoredBlob
from shardbook.core.structure import BlobKind, encode_plan, encode_structure
from shardbook.core.table import encode_table
from shardbook.recording import attempt_key, record_attempt
from shardbook.v1 import catalog_pb2
from shardbook.v1 import registration_pb2 as pb
from tests.behaviour.cli.conftest import Shardbook
from tests.behaviour.cli.test_cli_output import checkpoint
from tests.behaviour.client.directories import CheckpointDirectory, identity, manifest, record
from tests.behaviour.client.saves import register, start_session
from tests.behaviour.client.scripted import scripted_server
from tests.unit.ranks import Item, plan_of, raw, shard, structure_of, whole

WHO = b"1" * 16


def saved_by(client: Client, location: Path, step: int, world_size: int, run: str = "diff/run") -> str:
    """Saves by a world of another size; returns the ref."""
    session = start_session(client, run, WHO).session
    who = replace(identity(step, run=run, incarnation=WHO, world_size=world_size), session=session)
    register(client, who, location)
    client.commit_when_complete(pb.CommitCheckpointRequest(key=attempt_key(who)), timeout_s=20)
    return f"{run}@{step}"


def records_of(who: AttemptIdentity, ranks: list[list[Item]]) -> list[RegistrationRecord]:
    """What ranks leave that wrote some items."""
    records = []
    for rank, items in enumerate(ranks):
        structure = structure_of(plan_of(items))
        table = encode_table(structure.plan.table)
        plan = encode_plan(structure.plan, table.digest)
        encoded = encode_structure(structure, plan.digest)
        blobs = ((BlobKind.TABLE, table), (BlobKind.PLAN, plan), (BlobKind.STRUCTURE, encoded))
        lengths = np.full(int(structure.variable.sum()), 9, np.int64)
        stored = tuple(StoredBlob(kind, one.digest, one.payload) for kind, one in blobs)
        records.append(RegistrationRecord(who, rank, encoded.digest, encode_extents(Extents(lengths)), b"", stored))
    return records


def left_by(folder: Path, name: str, ranks: list[list[Item]]) -> Path:
    """A directory with the manifest of ranks that wrote some items."""
    target = folder / f"{name}-manifest"
    content = fold(records_of(identity(10, world_size=len(ranks)), ranks)).manifest.to_bytes()
    (target / files.MANIFEST).parent.mkdir(parents=True, exist_ok=True)
    (target / files.MANIFEST).write_bytes(content)
    return target


def plain_of(folder: Path, name: str, ranks: list[list[Item]]) -> Path:
    """A directory with DCP's own ``.metadata`` of ranks that wrote some items."""
    target = folder / f"{name}-plain"
    target.mkdir(exist_ok=True)
    folded = fold(records_of(identity(10, world_size=len(ranks)), ranks))
    (target / ".metadata").write_bytes(b"".join(folded.dcp_metadata(folded.header(str(target)))))
    return target


def plain_copy(target: Path, who: AttemptIdentity) -> Path:
    """A directory that holds DCP's own ``.metadata`` alone."""
    folded: FoldedAttempt = fold([record(who, rank) for rank in range(who.world_size)])
    target.mkdir()
    (target / ".metadata").write_bytes(b"".join(folded.dcp_metadata(folded.header(str(target)))))
    return target


def test_equal_structures_cost_no_metadata(shardbook: Shardbook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: two checkpoints with one digest are compared without their blocks; bytes and world size still count."""

    def answer(request: catalog_pb2.GetCheckpointRequest, _: object) -> catalog_pb2.GetCheckpointResponse:
        step = int(request.name.rpartition("/")[2].partition(".")[0])
        return catalog_pb2.GetCheckpointResponse(checkpoint=checkpoint(step, size_bytes=7 if step == 30 else 5))

    with scripted_server(GetCheckpoint=answer) as server:
        monkeypatch.setenv("SHARDBOOK_SERVER", server.target)
        same = shardbook("diff", "llm/8b@10", "llm/8b@20")
        assert (0, "tensors: the same, one structure") == (same.code, same.out.splitlines()[0])
        grown = shardbook("diff", "llm/8b@10", "llm/8b@30")
        assert (1, "bytes: 5, then 7") == (grown.code, grown.out.splitlines()[1])
        assert 0 == shardbook("diff", "llm/8b@10", "llm/8b@30", "--tensors").code
        assert 6 == len(server.requests)


def test_another_world_size_is_told_by_tensor(client: Client, shardbook: Shardbook, tmp_path: Path) -> None:
    """Shape and sharding, as A and B have them; the other way round, too."""
    a = saved_by(client, tmp_path / "a", 10, 4)
    b = saved_by(client, tmp_path / "b", 20, 2)
    ran = shardbook("diff", a, b)
    assert (1, "") == (ran.code, ran.err)
    assert ["~", "model.w", "shape", "float32 [8, 3]", "float32 [4, 3]"] == ran.rows[1]
    assert ["tensors: 1 changed", "bytes: 96, then 48", "world size: 4, then 2"] == ran.out.splitlines()[2:]
    found = shardbook("diff", b, a, "--json").json["diff"]
    facts = {"fqn": "model.w", "is_tensor": True, "dtype": "float32"}
    assert {
        "fqn": "model.w",
        "changed": ["shape"],
        "a": {**facts, "shape": [4, 3], "chunk_count": 2},
        "b": {**facts, "shape": [8, 3], "chunk_count": 4},
    } == found["changed"][0]
    assert (False, False, 1, 0) == tuple(
        found[key] for key in ("is_same", "same_tensors", "changed_count", "added_count")
    )


def test_a_directory_is_what_the_catalogue_says_of_it(client: Client, shardbook: Shardbook, tmp_path: Path) -> None:
    """Manifest, plain ``.metadata`` and catalogue agree on one save; no server is needed for two directories."""
    who = identity(10, run="diff/same", session=0)
    CheckpointDirectory(tmp_path).add_manifest(who)
    plain = plain_copy(tmp_path / "plain", who)
    for one in (str(tmp_path), str(plain)):
        assert 0 == shardbook("diff", str(tmp_path), one, "--server", "nowhere.invalid:1").code
    record_attempt(client, manifest(who), str(tmp_path), recovered=True)
    for one in (str(tmp_path), str(plain)):
        ran = shardbook("diff", "diff/same@10", one, "--json")
        assert (0, 96, 4) == (ran.code, ran.json["diff"]["b"]["size_bytes"], ran.json["diff"]["b"]["world_size"])
    assert shardbook("diff", "diff/same@10", str(tmp_path), "--json").json["diff"]["same_structure"]


def test_entries_come_and_go(tmp_path: Path) -> None:
    """What only one of both has, what became an object, what was cut elsewhere; who wrote a chunk is no matter."""
    before = [
        [shard("w", (4, 2), (0, 0), (2, 2)), whole("bias", (4,)), raw("notes"), whole("gone", (3,))],
        [shard("w", (4, 2), (2, 0), (2, 2))],
    ]
    after = [
        [shard("w", (4, 2), (0, 0), (4, 1)), whole("bias", (4,), "bfloat16"), whole("notes", (1,)), raw("new")],
        [shard("w", (4, 2), (0, 1), (4, 1))],
    ]
    for left in (left_by, plain_of):
        for right in (left_by, plain_of):
            found = package.diff(left(tmp_path, "before", before), right(tmp_path, "after", after))
            assert (["new"], ["gone"]) == ([one.fqn for one in found.added], [one.fqn for one in found.removed])
            assert {"w": ["sharding"], "bias": ["dtype"], "notes": ["kind"]} == {
                one.fqn: list(one.changed) for one in found.changed
            }
    swapped = package.diff(left_by(tmp_path, "before", before), left_by(tmp_path, "swapped", before[::-1]))
    assert swapped.same_tensors
    assert not swapped.same_structure


def resharded(count: int, world_size: int) -> list[list[Item]]:
    """What ranks write that share ``count`` tensors of four rows evenly."""
    rows = 4 // world_size
    return [
        [shard(f"w{number}", (4, 2), (rank * rows, 0), (rows, 2)) for number in range(count)]
        for rank in range(world_size)
    ]


def test_what_was_only_sharded_anew_is_counted(shardbook: Shardbook, tmp_path: Path) -> None:
    """Rule: one row for many tensors that went from so many chunks to so many; what else differs keeps its own.

    With --all each has a row, with --json each is there; the exit code is the same.
    """
    more = [shard("odd", (4, 2), (0, 0), (4, 1)), shard("odd", (4, 2), (0, 1), (4, 1)), whole("bias", (4,))]
    other = [whole("odd", (4, 2)), whole("bias", (4,), "bfloat16")]
    before, after = resharded(6, 4), resharded(6, 2)
    a = left_by(tmp_path, "before", [before[0] + more, *before[1:]])
    b = left_by(tmp_path, "after", [after[0] + other, *after[1:]])
    ran = shardbook("diff", str(a), str(b))
    assert (1, "") == (ran.code, ran.err)
    assert ["~", "(6 tensors)", "sharding", "4 chunks each", "2 chunks each"] == ran.rows[1]
    assert {"odd", "bias"} == {row[1] for row in ran.rows[2:4]}
    assert ["tensors that were only sharded anew are counted: --all shows each", "tensors: 8 changed"] == (
        ran.out.splitlines()[4:6]
    )
    every = shardbook("diff", str(a), str(b), "--all")
    assert (1, {"odd", "bias", *(f"w{number}" for number in range(6))}) == (
        every.code,
        {row[1] for row in every.rows[1:9]},
    )
    assert 8 == len(shardbook("diff", str(a), str(b), "--json").json["diff"]["changed"])


def test_a_whole_that_was_only_sharded_anew_says_so(shardbook: Shardbook, tmp_path: Path) -> None:
    """Rule: few tensors have a row each, and the summary says that nothing else differs."""
    a, b = (left_by(tmp_path, str(world), resharded(5, world)) for world in (4, 2))
    ran = shardbook("diff", str(a), str(b))
    assert ["~", "w0", "sharding", "float32 [4, 2] in 4", "float32 [4, 2] in 2"] == ran.rows[1]
    assert (1, "tensors: 5 changed, in sharding alone") == (ran.code, ran.out.splitlines()[6])
    assert package.diff(a, b).only_resharded
    assert not package.diff(a, a).only_resharded


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("nobody/run@1", "nobody/run@2"), 3, "nobody/run"),
        (("/nowhere/a", "/nowhere/b"), 3, "/nowhere/a"),
        (("diff/open@1.s1.a1", "diff/open@1.s1.a1"), 1, "not COMMITTED"),
    ],
    ids=["ref", "directory", "open"],
)
def test_what_cannot_be_compared_is_said(
    args: tuple[str, str], code: int, said: str, client: Client, shardbook: Shardbook
) -> None:
    """Rule: nothing is compared with nothing."""
    session = start_session(client, "diff/open", WHO).session
    register(client, replace(identity(1, run="diff/open", incarnation=WHO), session=session), Path("/ckpt"), ranks=(0,))
    ran = shardbook("diff", *args)
    assert (code, True) == (ran.code, said in ran.err)
