"""`shardbook gc` and the catalogue: who is at work, what may come back, and what is closed before its files go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shardbook.client import Client
from shardbook.collecting import Verdict, find_orphans, remove_orphan
from shardbook.collecting.known import Known
from shardbook.core.names import RunName
from shardbook.errors import CheckpointClosedError, FailedPreconditionError
from shardbook.recording import attempt_key
from shardbook.stores import Stores
from shardbook.v1 import catalog_pb2, types_pb2
from shardbook.v1 import registration_pb2 as pb
from shardbook_server.app import running_server
from shardbook_server.settings import Settings
from tests.behaviour.cli.left import KILLED, WHO, aged, everything, killed, verdicts
from tests.behaviour.cli.test_cli_output import checkpoint
from tests.behaviour.client.directories import identity
from tests.behaviour.client.saves import register, start_session
from tests.behaviour.client.scripted import scripted_server
from tests.behaviour.rpc.api import wait_until


@pytest.mark.parametrize("has_records", [True, False], ids=["records", "data-alone"])
def test_the_catalogue_knows_who_is_at_work(has_records: bool, client: Client, tmp_path: Path) -> None:
    """Rule: open and committed attempts are kept, also those whose name no record tells; failed ones are not."""
    run = f"gc/at-work-{has_records}"
    session = start_session(client, run, WHO).session
    who = replace(identity(10, run=run, incarnation=WHO), session=session)
    killed(tmp_path, who, without=(1, 3) if has_records else (0, 1, 2, 3))
    register(client, who, tmp_path, ranks=(0, 2))
    known = Known(client, RunName.parse(run))
    assert {who.prefix: Verdict.OPEN} == verdicts(aged(tmp_path), known)
    place = types_pb2.AttemptLocation(location=str(tmp_path), prefix=who.prefix)
    failed = replace(who, step=20, attempt=2, prefix=identity(20, incarnation=WHO, attempt=2).prefix)
    failure = types_pb2.RankFailure(rank=0, phase="write", reason="disk full")
    place = types_pb2.AttemptLocation(location=str(tmp_path), prefix=failed.prefix)
    client.report_failure(pb.ReportFailureRequest(key=attempt_key(failed), location=place, failure=failure))
    killed(tmp_path, failed, without=(1, 3) if has_records else (0, 1, 2, 3))
    known.forget()
    assert {who.prefix: Verdict.OPEN, failed.prefix: Verdict.ORPHAN} == verdicts(aged(tmp_path), known)
    register(client, who, tmp_path, ranks=(1, 3))
    client.commit_when_complete(pb.CommitCheckpointRequest(key=attempt_key(who)), timeout_s=10)
    known.forget()
    assert {who.prefix: Verdict.COMMITTED, failed.prefix: Verdict.ORPHAN} == verdicts(tmp_path, known)
    # All runs are looked at where none is named.
    assert verdicts(tmp_path, known) == verdicts(tmp_path, Known(client))


@pytest.mark.parametrize(
    ("state", "is_writing", "verdict"),
    [
        ("EXPIRED", True, Verdict.REVIVABLE),
        ("EXPIRED", False, Verdict.ORPHAN),
        ("DELETED", False, Verdict.DELETED),
        ("UNSPECIFIED", False, Verdict.OPEN),
    ],
    ids=["alive", "gone", "deleted", "of-a-newer-release"],
)
def test_what_may_come_back_is_kept(state: str, is_writing: bool, verdict: Verdict, tmp_path: Path) -> None:
    """Ranks of a session that lives may go on with what expired; a deletion may be undone; who knows what is new."""
    killed(tmp_path, without=(0, 1, 2, 3))
    number = types_pb2.CheckpointState.Value(f"CHECKPOINT_STATE_{state}")
    place = types_pb2.AttemptLocation(location=str(tmp_path))
    expired = checkpoint(10, state=number, incarnation=KILLED.incarnation, live=False, location=place)
    run = types_pb2.Run(name="projects/llm/runs/8b", parts=[{"part": "default", "session": 3, "writing": is_writing}])
    with scripted_server(
        ListRuns=lambda *_: catalog_pb2.ListRunsResponse(runs=[run]),
        GetRun=lambda *_: catalog_pb2.GetRunResponse(run=run),
        ListCheckpoints=lambda *_: catalog_pb2.ListCheckpointsResponse(checkpoints=[expired]),
    ) as server:
        assert {KILLED.prefix: verdict} == verdicts(aged(tmp_path), Known(Client(server.target)))


@pytest.mark.parametrize(
    ("location", "state", "verdict"),
    [
        ("FOLDER/step-10", "COMMITTED", Verdict.COMMITTED),
        ("disk:step-10", "COMMITTED", Verdict.COMMITTED),
        ("disk:step-10", "EXPIRED", Verdict.ORPHAN),
        ("FOLDER/step-20", "COMMITTED", Verdict.ORPHAN),
        ("elsewhere:step-20", "OPEN", Verdict.ORPHAN),
        ("/mounted/elsewhere/step-10", "COMMITTED", Verdict.COMMITTED),
        ("elsewhere:run/step-10", "OPEN", Verdict.OPEN),
        ("elsewhere:step-10", "EXPIRED", Verdict.REVIVABLE),
    ],
    ids=["path", "store", "store-expired", "other-step", "other-step-store", "mount", "other-store", "mount-expired"],
)
def test_data_without_a_record_is_known_by_where_it_lies(
    location: str, state: str, verdict: Verdict, tmp_path: Path
) -> None:
    """Rule: a session's attempts share a name, so the directory decides; where it may be the same it is kept."""
    killed(tmp_path / "step-10", without=(0, 1, 2, 3))
    number = types_pb2.CheckpointState.Value(f"CHECKPOINT_STATE_{state}")
    place = types_pb2.AttemptLocation(location=location.replace("FOLDER", str(tmp_path)))
    known_one = checkpoint(10, state=number, incarnation=KILLED.incarnation, location=place)
    run = types_pb2.Run(name="projects/llm/runs/8b", parts=[{"part": "default", "session": 4, "writing": True}])
    with scripted_server(
        ListRuns=lambda *_: catalog_pb2.ListRunsResponse(runs=[run]),
        GetRun=lambda *_: catalog_pb2.GetRunResponse(run=run),
        ListCheckpoints=lambda *_: catalog_pb2.ListCheckpointsResponse(checkpoints=[known_one]),
    ) as server:
        known = Known(Client(server.target), stores=Stores({"disk": str(tmp_path)}))
        assert {KILLED.prefix: verdict} == verdicts(aged(tmp_path), known)


def test_an_expired_attempt_is_failed_for_good_before_its_files_go(tmp_path: Path) -> None:
    """Rule: ranks that come back, however late, never complete a checkpoint whose files are gone."""
    url = f"sqlite:///{tmp_path / 'db'}"
    short = Settings(
        listen="127.0.0.1:0", http_listen="", database_url=url, drain_s=5, lease_ttl_s=0.6, reap_interval_s=0.1
    )
    with running_server(short) as server:
        client = Client(server.address)
        known = Known(client)
        session = start_session(client, "gc/late", WHO).session
        who = replace(identity(10, run="gc/late", incarnation=WHO), session=session)
        other = replace(who, step=20, attempt=2, prefix=identity(20, incarnation=WHO, attempt=2).prefix)
        orphans = {}
        for one in (who, other):
            folder = killed(tmp_path / f"step-{one.step}", one)
            register(client, one, folder, ranks=(0, 2))
        wait_until(
            lambda: {"EXPIRED"} == {one.state.value for one in client.list_checkpoints("gc/late", show_all=True)}
        )
        for one in (who, other):
            [orphans[one.step]] = find_orphans([aged(tmp_path / f"step-{one.step}")], known=known)
        # One is completed between the look and the removal, by ranks that do not leave records here.
        register(client, other, tmp_path / "step-20", ranks=(1, 3))
        client.commit_when_complete(pb.CommitCheckpointRequest(key=attempt_key(other)), timeout_s=10)
        with pytest.raises(FailedPreconditionError, match="no orphan any more: committed"):
            remove_orphan(orphans[20], known=known)
        wait_until(lambda: not known.is_alive(client.get_checkpoint("gc/late@20")))
        remove_orphan(orphans[10], known=known)
        assert not everything(tmp_path / "step-10")
        with pytest.raises(CheckpointClosedError):
            register(client, who, tmp_path / "step-10", ranks=(1, 3))
        assert "FAILED" == client.get_checkpoint(f"gc/late@10.s{session}.a1").state.value
