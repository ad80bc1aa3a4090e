"""What a killed rank left is seen while its save is open, kept as long, and removed once nobody can need it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from shardbook import Client
from shardbook.collecting import Verdict, find_orphans, remove_orphan
from shardbook.collecting.known import Known
from shardbook.core.names import RunName
from shardbook.dcp import SaveState
from shardbook.errors import FailedPreconditionError
from shardbook.status import OpenAttempt, SavePhase
from tests.faults import hurt, jobs
from tests.faults.processes import await_stop, await_that
from tests.faults.server import ServerProcess
from tests.faults.validators import p2_no_torn_checkpoint
from tests.torch.harness import RankPool, files_below


def test_torn_files_go_once_a_new_session_has_saved(
    pool: RankPool, later_pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path
) -> None:
    """A rank hangs in the middle of its data: its attempt is open, and no age makes it an orphan.

    The job is killed, and restarted; it saves the step again, into the same directory. Then the torn files go, and
    nothing else.
    """
    path = tmp_path / "step-1"
    start = {"run": run, "server": shared_server.address, "job_id": run}
    running = pool.start(hurt.straggle, start, str(path), 1, world_size=3)
    await_stop(running.pids[1])
    client, known = shared_server.client, Known(shared_server.client, RunName.parse(run))
    await_that("the others have registered", lambda: 2 == _open_attempt(client, run).registered_count)
    attempt = _open_attempt(client, run)
    assert (SavePhase.WRITING, 3, 2, 1) == (
        attempt.phase,
        attempt.planned_count,
        attempt.registered_count,
        attempt.missing_count,
    )
    assert [1] == [one.rank for one in attempt.missing]
    assert all(one.host for one in (*attempt.missing, *attempt.registered))
    torn = set(files_below(path))
    (found,) = find_orphans([tmp_path], known=known, older_than_s=0)
    assert Verdict.OPEN is found.verdict
    with pytest.raises(FailedPreconditionError, match="open"):
        remove_orphan(found, known=known, older_than_s=0)
    assert torn == set(files_below(path))

    for pid in running.pids:
        os.kill(pid, signal.SIGKILL)
    running.outcomes()
    again = later_pool.run(jobs.save_once, start, str(path), {}, world_size=2)
    assert [SaveState.COMMITTED] * 2 == [one.state for one in again]
    saved = set(files_below(path)) - torn
    known.forget()
    verdicts = {one.verdict: one for one in find_orphans([tmp_path], known=known, older_than_s=0)}
    assert {Verdict.ORPHAN, Verdict.MANIFEST} == set(verdicts)
    removed = remove_orphan(verdicts[Verdict.ORPHAN], known=known, older_than_s=0)
    assert (found.prefix, saved) == (removed.prefix, set(files_below(path)))
    assert not [name for name in files_below(path) if removed.prefix in name]
    p2_no_torn_checkpoint(client, run)
    environment = {"SHARDBOOK_SERVER": shared_server.address}
    for target in (f"{run}@1", str(path)):
        assert [[]] * 3 == later_pool.run(jobs.load_once, target, world_size=3, environment=environment)


def _open_attempt(client: Client, run: str) -> OpenAttempt:
    (attempt,) = client.get_run_status(run).parts[0].open
    return attempt
