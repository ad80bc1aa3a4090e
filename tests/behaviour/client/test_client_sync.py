"""What sync finds in directories, what it sends of it, and what it says about the rest."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from shardbook import recording
from shardbook._attempts import TreeFiles, find_attempts
from shardbook._trees import open_tree
from shardbook.client import Client
from shardbook.core.fold import FoldedAttempt
from shardbook.core.manifest import Manifest
from shardbook.errors import CorruptManifestError, InvalidArgumentError, NotFoundError, UnavailableError
from shardbook.recording import record_attempt
from shardbook.stores import Stores
from shardbook.sync import SyncedAttempt, SyncOutcome, sync_directories, sync_directory, unsettled
from shardbook.v1 import types_pb2
from tests.behaviour.client.catalogue import Catalogue
from tests.behaviour.client.directories import CheckpointDirectory, identity, manifest, record
from tests.behaviour.client.scripted import ScriptedServer, scripted_server


@pytest.fixture
def catalogue() -> Catalogue:
    """An empty catalogue."""
    return Catalogue()


@pytest.fixture
def server(catalogue: Catalogue) -> Iterator[ScriptedServer]:
    """A server of the catalogue."""
    with scripted_server(GetCheckpoint=catalogue.get, RecordCheckpoint=catalogue.record) as running:
        yield running


@pytest.fixture
def step(tmp_path: Path) -> CheckpointDirectory:
    """An empty checkpoint directory."""
    return CheckpointDirectory(tmp_path / "run" / "step-1500")


def synced(server: ScriptedServer, *paths: Path, stores: Stores | None = None) -> list[SyncedAttempt]:
    """Runs sync once."""
    return list(sync_directories(Client(server.target), paths, stores=stores))


def outcomes(results: list[SyncedAttempt]) -> list[str]:
    """What became of each attempt, in order."""
    return [result.outcome.value for result in results]


@pytest.mark.parametrize("form", ["records", "manifest"])
def test_complete_attempt_is_recorded_once(
    form: str, step: CheckpointDirectory, server: ScriptedServer, catalogue: Catalogue, tmp_path: Path
) -> None:
    """Records and manifest are enough; a second run finds everything there and sends nothing."""
    who = identity(session=0)
    step.add_records(who) if form == "records" else step.add_manifest(who)
    assert ["recorded"] == outcomes(synced(server, tmp_path))
    (checkpoint,) = catalogue.checkpoints.values()
    assert ("llm/8b@1500.s0.a1.0102030405", str(step.path), who.prefix) == (
        checkpoint.ref[:28],
        checkpoint.location.location,
        checkpoint.location.prefix,
    )
    calls = server.count("RecordCheckpoint")
    assert ["present"] == outcomes(synced(server, tmp_path))
    assert calls == server.count("RecordCheckpoint")


def test_records_are_folded_into_a_manifest_and_kept(step: CheckpointDirectory, server: ScriptedServer) -> None:
    """Whoever comes next finds a manifest; the records stay for a coordinator that may be counting them."""
    who = identity()
    step.add_records(who)
    synced(server, step.path)
    folded = Manifest.from_bytes((step.path / ".shardbook" / who.prefix / "manifest").read_bytes())
    assert manifest(who) == folded
    assert folded == Manifest.from_bytes((step.path / ".shardbook" / "manifest").read_bytes())
    assert 4 == len(list((step.path / ".shardbook" / who.prefix).glob("*.record")))
    assert [] == list((step.path / ".shardbook").rglob("*.tmp"))


def test_folding_an_older_attempt_leaves_the_newest_manifest(step: CheckpointDirectory, server: ScriptedServer) -> None:
    """What a straggler left is history; what the directory means does not go back."""
    newer = identity(session=5, write_time_s=2_000_000_000)
    older = identity(session=4, incarnation=b"o" * 16, write_time_s=1_000_000_000)
    step.add_manifest(newer).add_records(older)
    assert ["recorded", "recorded"] == outcomes(synced(server, step.path))
    assert newer == Manifest.from_bytes((step.path / ".shardbook" / "manifest").read_bytes()).identity


def test_records_that_a_coordinator_folds_meanwhile_are_not_missed(
    step: CheckpointDirectory, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records that vanish between two looks have become a manifest: that one is taken."""
    who = identity()
    step.add_records(who)
    (found,) = find_attempts(TreeFiles(open_tree(step.path), str(step.path)))
    step.add_manifest(who)
    (step.path / ".shardbook" / who.prefix / "rank-2.record").unlink()
    assert (manifest(who), None) == found.read()


def test_export_of_dcp_metadata_can_be_replaced(step: CheckpointDirectory, server: ScriptedServer) -> None:
    """Given an exporter, the folded directory gets its `.metadata` too; an older attempt's never replaces it."""
    newer, older = identity(session=5), identity(session=4, incarnation=b"o" * 16)
    client = Client(server.target)
    step.add_records(newer)
    sync_directory(client, step.path, export=lambda directory, folded: folded.manifest.identity.prefix.encode())
    step.add_records(older)
    sync_directory(client, step.path, export=lambda directory, folded: b"older")
    assert newer.prefix.encode() == (step.path / ".metadata").read_bytes()


def test_directory_that_cannot_be_written_is_recorded_all_the_same(
    step: CheckpointDirectory, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only mount keeps its records; the catalogue gets the checkpoint, and the person a note."""
    step.add_records(identity())

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("shardbook._trees._LocalTree.write", refuse)
    (result,) = synced(server, step.path)
    assert SyncOutcome.RECORDED is result.outcome
    assert "was not written: [Errno 13] Permission denied" in result.message


def test_missing_ranks_are_named(step: CheckpointDirectory, server: ScriptedServer) -> None:
    """An attempt that is not whole is not recorded; the first ranks and the count are told."""
    step.add_records(identity(world_size=70), without=tuple(range(5, 65)))
    (result,) = synced(server, step.path)
    assert (SyncOutcome.INCOMPLETE, 60, tuple(range(5, 55))) == (
        result.outcome,
        result.missing_count,
        result.missing_ranks,
    )
    assert 0 == server.count("RecordCheckpoint")


def test_incomplete_attempt_beside_a_settled_one_of_its_save_is_done(
    step: CheckpointDirectory, server: ScriptedServer
) -> None:
    """The job crashed and saved the step again: nothing is left to do."""
    step.add_records(identity(attempt=1), without=(2,)).add_manifest(identity(attempt=2))
    results = synced(server, step.path)
    assert ["incomplete", "recorded"] == sorted(outcomes(results))
    assert [] == unsettled(results)


def test_ranks_that_were_cut_off_knew_no_session(
    step: CheckpointDirectory, server: ScriptedServer, catalogue: Catalogue
) -> None:
    """A rank without a route to the server left session 0; the attempt has the number that the others knew."""
    numbered, cut_off = identity(session=7), identity(session=0)
    for rank in range(4):
        step.add_record(record(cut_off if rank == 2 else numbered, rank))
    (result,) = synced(server, step.path)
    assert (SyncOutcome.RECORDED, 7) == (result.outcome, result.session)
    assert ["llm/8b@1500.s7.a1"] == [checkpoint.ref for checkpoint in catalogue.checkpoints.values()]


def test_chunks_that_overlap_are_refused_with_the_reason(step: CheckpointDirectory, server: ScriptedServer) -> None:
    """What the server would refuse is refused here, by the same check."""
    who = identity()
    step.add_records(who).add_record(record(who, 3, first_row=5))
    (result,) = synced(server, step.path)
    assert (SyncOutcome.REFUSED, True) == (result.outcome, result.reason.startswith("GEOMETRY_"))
    assert [result] == unsettled([result])


def test_superseded_attempt_is_settled(step: CheckpointDirectory, server: ScriptedServer, catalogue: Catalogue) -> None:
    """A later session saved the step: history that the catalogue does not want, and no failure."""
    catalogue.superseded_steps.add(1500)
    step.add_manifest(identity(session=2))
    results = synced(server, step.path)
    assert ["superseded"] == outcomes(results)
    assert [] == unsettled(results)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_damaged_files_are_refused_and_the_rest_goes_on(damage: str, tmp_path: Path, server: ScriptedServer) -> None:
    """One bad directory does not stop the others, and nothing in it is executed."""
    bad, good = CheckpointDirectory(tmp_path / "a"), CheckpointDirectory(tmp_path / "b")
    bad.add_manifest(identity(1))
    good.add_manifest(identity(2))
    for path in (bad.path / ".shardbook").rglob("manifest"):
        content = path.read_bytes()
        changed = {"truncate": content[:-40], "flip": content[:-40] + bytes(40), "empty": b""}[damage]
        path.write_bytes(changed)
    results = synced(server, tmp_path)
    assert ["refused", "recorded"] == outcomes(results)
    assert "CORRUPT_MANIFEST" == results[0].reason


def test_copied_directory_with_the_newest_manifest_alone(step: CheckpointDirectory, server: ScriptedServer) -> None:
    """Who copied only `.shardbook/manifest` copied enough."""
    who = identity()
    step.add_manifest(who)
    (step.path / ".shardbook" / who.prefix / "manifest").unlink()
    assert ["recorded"] == outcomes(synced(server, step.path))


def test_walk_finds_checkpoints_at_any_depth_and_nothing_else(tmp_path: Path, server: ScriptedServer) -> None:
    """Every directory with Shardbook's files below the one given, in order; other directories are left alone."""
    for path, number in (("r1/step-1", 1), ("r1/step-2", 2), ("deep/er/r2/step-3", 3)):
        CheckpointDirectory(tmp_path / path).add_manifest(identity(number))
    (tmp_path / "r1" / "notes").mkdir()
    (tmp_path / "r1" / "step-1" / "0102030405-a1").mkdir()
    (tmp_path / "r3" / ".shardbook").mkdir(parents=True)
    assert [3, 1, 2] == [result.step for result in synced(server, tmp_path)]


def test_location_is_relative_to_its_store(
    step: CheckpointDirectory, server: ScriptedServer, catalogue: Catalogue, tmp_path: Path
) -> None:
    """Below a configured root the catalogue records `store:relative`."""
    step.add_manifest(identity())
    synced(server, step.path, stores=Stores({"lustre": str(tmp_path)}))
    assert ["lustre:run/step-1500"] == [one.location.location for one in catalogue.checkpoints.values()]


def test_name_with_another_incarnation_is_not_taken_for_the_same(
    step: CheckpointDirectory, server: ScriptedServer, catalogue: Catalogue
) -> None:
    """After a restore the server may hand a number out again: only the incarnation says who wrote it."""
    who = identity(session=3)
    step.add_manifest(who)
    synced(server, step.path)
    next(iter(catalogue.checkpoints.values())).incarnation = b"z" * 16
    synced(server, step.path)
    # Once to learn which blobs are missing, once with them, once more for the one that was taken for another's.
    assert 3 == server.count("RecordCheckpoint")


def test_server_that_goes_away_ends_the_run(tmp_path: Path, server: ScriptedServer) -> None:
    """What was yielded before is recorded; the rest comes with the next run."""
    for number in (1, 2):
        CheckpointDirectory(tmp_path / str(number)).add_manifest(identity(number))
    results = sync_directories(Client(server.target, timeout_s=0.5), [tmp_path])
    assert 1 == next(results).step
    server.stop()
    with pytest.raises(UnavailableError):
        next(results)


def test_directory_that_is_not_there_is_said(tmp_path: Path, server: ScriptedServer) -> None:
    """A misspelt path is an error, not an empty result."""
    with pytest.raises(NotFoundError, match="nowhere"):
        synced(server, tmp_path / "nowhere")


def test_url_is_walked_through_fsspec(server: ScriptedServer, catalogue: Catalogue, step: CheckpointDirectory) -> None:
    """With fsspec, object stores are synced the same way."""
    step.add_records(identity())
    memory = fsspec.filesystem("memory")
    memory.put(str(step.path / ".shardbook"), "/bucket/ckpt/step-9/.shardbook", recursive=True)
    try:
        results = list(sync_directories(Client(server.target), ["memory://bucket/ckpt"]))
        assert ["recorded"] == outcomes(results)
        assert memory.exists(f"/bucket/ckpt/step-9/.shardbook/{identity().prefix}/manifest")
        assert ["present"] == outcomes(list(sync_directories(Client(server.target), ["memory://bucket/ckpt"])))
    finally:
        memory.rm("/bucket", recursive=True)


def test_url_without_its_package_names_it(server: ScriptedServer) -> None:
    """A scheme that nothing here opens is an error that says what to install."""
    with pytest.raises(InvalidArgumentError, match="cannot be opened"):
        list(sync_directories(Client(server.target), ["nosuchscheme://bucket/x"]))


def test_large_attempt_is_sent_in_parts(
    server: ScriptedServer, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts carry at most what fits a call with everything they need; the last one completes the attempt."""
    monkeypatch.setattr(recording, "_PART_BYTES", 700)
    whole = manifest(identity(world_size=9))
    checkpoint = record_attempt(Client(server.target), whole, "/somewhere", recovered=True)
    assert types_pb2.CHECKPOINT_STATE_COMMITTED == checkpoint.state
    requests = server.of("RecordCheckpoint")
    parts = {tuple(one.rank for one in request.registrations): request.complete for request in requests}
    assert len(parts) > 2
    assert list(range(9)) == [rank for part in parts for rank in part]
    assert [False] * (len(parts) - 1) + [True] == list(parts.values())
    assert all(sum(len(blob.payload) for blob in request.blobs) <= 12 << 20 for request in requests)
    assert {9} == {request.registration_count for request in requests}


def test_known_structures_are_not_sent_again(server: ScriptedServer) -> None:
    """The second save of a structure costs its registrations only."""
    client = Client(server.target)
    record_attempt(client, manifest(identity(1)), "/a", recovered=True)
    sent = server.count("RecordCheckpoint")
    record_attempt(client, manifest(identity(2)), "/b", recovered=True)
    assert [0] == [len(request.blobs) for request in server.of("RecordCheckpoint")[sent:]]


def test_manifest_that_lacks_a_blob_is_corrupt(server: ScriptedServer) -> None:
    """A manifest that contradicts itself is named so, not sent."""
    whole = manifest(identity())
    broken = Manifest(
        whole.identity, whole.head, whole.blocks, whole.fqns, whole.segments, whole.structure_digests, whole.blobs[1:]
    )
    with pytest.raises(CorruptManifestError, match="lacks its table"):
        record_attempt(Client(server.target), broken, "/a", recovered=True)


def test_links_are_not_followed(tmp_path: Path, server: ScriptedServer, step: CheckpointDirectory) -> None:
    """A link back up does not make the walk endless, and nothing is found twice."""
    step.add_manifest(identity())
    (step.path / "up").symlink_to(tmp_path)
    assert ["recorded"] == outcomes(synced(server, tmp_path))


@pytest.mark.parametrize(
    "changed", [{"run": "no run"}, {"part": "../x"}, {"prefix": "../../../elsewhere"}, {"prefix": "/elsewhere"}]
)
def test_record_that_names_what_cannot_be_is_told_and_the_walk_goes_on(
    changed: dict[str, object], tmp_path: Path, server: ScriptedServer
) -> None:
    """Nothing is made of such a name, neither a call nor a path."""
    CheckpointDirectory(tmp_path / "a").add_altered(identity(1, world_size=1), **changed)
    CheckpointDirectory(tmp_path / "b").add_manifest(identity(2))
    before = _outside(tmp_path, "b")
    results = synced(server, tmp_path)
    assert [("refused", "CORRUPT_MANIFEST"), ("recorded", "")] == [(one.outcome.value, one.reason) for one in results]
    assert results[:1] == unsettled(results)
    assert before == _outside(tmp_path, "b")


def _outside(path: Path, name: str) -> list[Path]:
    """Everything below a directory but what is below one of its own."""
    return sorted(one for one in path.rglob("*") if path / name not in one.parents)


def test_record_in_the_place_of_another_attempt(step: CheckpointDirectory, server: ScriptedServer) -> None:
    """It is not taken for that one, and makes no manifest there."""
    who = identity(world_size=1)
    step.add_records(who)
    folder = step.path / ".shardbook"
    (folder / who.prefix).rename(folder / "ffffffffffff-a1")
    (result,) = synced(server, step.path)
    assert (SyncOutcome.REFUSED, "CORRUPT_MANIFEST") == (result.outcome, result.reason)
    assert not (folder / "manifest").exists()


def test_newest_manifest_that_is_not_on_top_is_put_there(step: CheckpointDirectory, server: ScriptedServer) -> None:
    """Its coordinator was killed between two files; the catalogue had it already."""
    older, newer = identity(attempt=1), identity(attempt=2)
    step.add_manifest(newer).add_manifest(older)
    synced(server, step.path)
    assert newer == Manifest.from_bytes((step.path / ".shardbook" / "manifest").read_bytes()).identity
    assert newer.prefix == pickle.loads((step.path / ".metadata").read_bytes()).storage_meta.save_id


def test_metadata_of_an_older_attempt_is_told_without_export_and_repaired_with_it(
    step: CheckpointDirectory, server: ScriptedServer
) -> None:
    """Who cannot write it says who can; a third run has nothing to say."""
    client, older, newer = Client(server.target), identity(attempt=1), identity(attempt=2)

    def export(_: str, folded: FoldedAttempt) -> bytes:
        return folded.manifest.identity.prefix.encode()

    step.add_records(older)
    sync_directory(client, step.path, export=export)
    step.add_records(newer)
    for exports, told in ((False, True), (False, True), (True, False), (True, False), (False, False)):
        results = sync_directory(client, step.path, export=export if exports else None)
        assert [False, told] == ["run `shardbook sync`" in one.message for one in results]
        kept = newer if exports or not told else older
        assert kept.prefix == (step.path / ".metadata").read_text()
