"""How a session reaches every rank: one broadcast, or by hand; and never a session of each rank's own."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from shardbook import Client, dcp
from shardbook.config import ClientConfig
from shardbook.dcp import SaveState
from shardbook.dcp.session import find_job_id
from shardbook.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from tests.torch import jobs
from tests.torch.harness import GROUP_TIMEOUT_S, RankPool


class TestInit:
    """What ``init`` tells the ranks."""

    def test_every_rank_has_the_same_session(self, pool: RankPool, server: str, run: str) -> None:
        """Rank 0 asks the server; the others are told."""
        sessions = pool.run(jobs.start_session, {"run": run, "server": server}, {}, world_size=3)
        assert {sessions[0]} == set(sessions)
        assert 1 == sessions[0].number

    def test_every_rank_learns_of_a_failure(self, pool: RankPool, server: str, run: str) -> None:
        """A refusal is broadcast too: nobody waits for a session that will not come."""
        start = {"run": run, "server": server, "resumed_from": f"{run}@77"}
        outcomes = pool.start(jobs.start_session, start, {}, world_size=3).outcomes()
        assert [NotFoundError] * 3 == [type(one.error) for one in outcomes]

    def test_an_unexpected_failure_of_rank_0(self, pool: RankPool, server: str, run: str) -> None:
        """Whatever happens on rank 0, the others are told."""
        outcomes = pool.start(
            jobs.start_session, {"run": run, "server": server}, {"live_wait_s": ["nonsense", 1.0]}, world_size=2
        ).outcomes()
        assert all(one.error is not None for one in outcomes)

    @pytest.mark.parametrize("rank", [0, 1, 2])
    @pytest.mark.parametrize(
        "bad", [{"SHARDBOOK_TIMEOUT_S": "soon"}, {"SHARDBOOK_SERVER": "no address"}, {"SHARDBOOK_MODE": "sometimes"}]
    )
    def test_a_bad_setting_on_one_rank(self, pool: RankPool, run: str, rank: int, bad: dict[str, str]) -> None:
        """Every rank raises, and is told where the setting is wrong; nobody waits in a collective."""
        environments = [bad if one == rank else {} for one in range(3)]
        running = pool.start(jobs.start_session, {"run": run}, {}, world_size=3, environments=environments)
        errors = [one.error for one in running.outcomes(GROUP_TIMEOUT_S / 2)]
        assert [InvalidArgumentError] * 3 == [type(error) for error in errors]
        (name,) = bad
        for one, error in enumerate(errors):
            assert one == rank or f"on rank {rank}: " in str(error)
            assert name in str(error) or bad[name] in str(error)

    def test_no_session_is_left_behind_by_a_bad_setting(self, pool: RankPool, server: str, run: str) -> None:
        """The ranks agree before the server is asked: the job that is started again is not in its own way."""
        environments: list[dict[str, str]] = [{}, {"SHARDBOOK_TIMEOUT_S": "soon"}]
        start = {"run": run, "server": server, "job_id": ""}
        pool.start(jobs.start_session, start, {}, world_size=2, environments=environments).outcomes()
        assert [1, 1] == [one.number for one in pool.run(jobs.start_session, start, {}, world_size=2)]

    def test_several_ranks_without_a_process_group(self, run: str) -> None:
        """Each would have a session of its own."""
        with pytest.raises(FailedPreconditionError) as caught:
            dcp.init(run=run, mode="offline", rank=0, world_size=2)
        assert "NO_PROCESS_GROUP" == caught.value.reason

    def test_torchruns_variables_are_believed(self, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A job of two ranks that forgot ``init_process_group`` is told so."""
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(FailedPreconditionError, match="init_process_group"):
            dcp.init(run=run, mode="offline")

    def test_a_forgotten_server_is_named_once(
        self, run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Aloud, with the line that helps; not to those who chose to be offline."""
        dcp.init(run=run, mode="offline")
        monkeypatch.setenv("SHARDBOOK_MODE", "offline")
        dcp.init(run=run)
        assert [] == [one for one in caplog.records if one.levelname == "WARNING"]
        monkeypatch.delenv("SHARDBOOK_MODE")
        dcp.init(run=run)
        dcp.close()
        (warning,) = (one.getMessage() for one in caplog.records if one.levelname == "WARNING")
        assert "export SHARDBOOK_SERVER" in warning

    @pytest.mark.parametrize("arguments", [{"on_live": "maybe"}, {"mode": "sometimes"}, {"part": "a/b"}])
    def test_arguments_that_mean_nothing(self, run: str, arguments: dict[str, Any]) -> None:
        """They are named."""
        with pytest.raises(InvalidArgumentError):
            dcp.init(run=run, **{"mode": "offline", **arguments})

    def test_init_before_the_process_group(self, pool: RankPool, run: str, tmp_path: Path) -> None:
        """The save says what is wrong, instead of one checkpoint a rank."""
        start = {"run": run, "mode": "offline"}
        outcomes = pool.start(
            jobs.init_too_early, start, str(tmp_path / "store"), str(tmp_path / "1"), world_size=2, process_group=False
        ).outcomes()
        assert ["SESSION_NOT_SHARED"] * 2 == [getattr(one.error, "reason", one.traceback) for one in outcomes]

    def test_no_dist_with_several_ranks(self, pool: RankPool, run: str, tmp_path: Path) -> None:
        """Every rank would write as rank 0."""
        start = {"run": run, "mode": "offline"}
        outcomes = pool.start(jobs.save_no_dist, start, str(tmp_path / "1"), world_size=2).outcomes()
        assert ["NO_DIST"] * 2 == [getattr(one.error, "reason", one.traceback) for one in outcomes]


class TestCarriedOver:
    """Sessions that a controller starts and hands to its workers."""

    def test_workers_save_without_a_process_group(self, pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
        """Rank and world size are given by hand; the session is started by a process that does not save."""
        config = ClientConfig(server=server)
        new = dcp.new_session(run, config, job_id="controller")
        session = dcp.start_session(new, Client(server), wait_s=0.0, deadline_s=10.0)
        path = str(tmp_path / "step-1")
        saved = pool.run(jobs.save_carried, session, path, world_size=3, process_group=False)
        assert [SaveState.COMMITTED] * 3 == [one.state for one in saved]
        assert {"w", "own0", "own1", "own2"} == {one.fqn for one in Client(server).list_tensors(f"{run}@1")}
        # Three copies of "w", one of each rank's own.
        assert 4 == sum(one.stats.written_count for one in saved)

    def test_a_session_pickles(self, run: str) -> None:
        """Without credentials."""
        session = dcp.new_session(run, ClientConfig(server="host:1", token="secret"))
        assert session == pickle.loads(pickle.dumps(session))
        assert b"secret" not in pickle.dumps(session)

    def test_a_session_of_another_run(self, run: str) -> None:
        """It is not taken by accident."""
        session = dcp.new_session(run, ClientConfig())
        with pytest.raises(InvalidArgumentError):
            dcp.init(run="tests/another", session=session)


def test_parts_have_sessions_of_their_own(pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
    """Started when they are first saved, by the same incarnation, without a word between the ranks."""
    saved = pool.run(jobs.save_parts, {"run": run, "server": server}, str(tmp_path), world_size=3)
    assert [[SaveState.COMMITTED] * 3] * 3 == [[one.state for one in ranks] for ranks in saved]
    assert [f"{run}@1", f"{run}:optim@1", f"{run}:optim@1"] == [one.ref for one in saved[0]]
    parts = Client(server).get_run(run).parts
    assert [("default", 1), ("optim", 1)] == [(part.part, part.session) for part in parts]


def test_a_forked_child_is_told_at_once(pool: RankPool, server: str, run: str, tmp_path: Path) -> None:
    """gRPC does not survive fork: the child gets an error instead of hanging, the parent saves on."""
    start = {"run": run, "server": server}
    outcome = pool.run(jobs.save_in_fork, start, str(tmp_path), world_size=1, process_group=False)
    assert [(SaveState.COMMITTED, "FORKED_CLIENT", SaveState.COMMITTED)] == outcome


@pytest.mark.parametrize(
    ("environ", "job_id"),
    [
        ({}, ""),
        ({"SLURM_JOB_ID": "42", "TORCHELASTIC_RUN_ID": "none"}, "42"),
        ({"TORCHELASTIC_RUN_ID": "none"}, ""),
        ({"TORCHELASTIC_RUN_ID": "rdzv-7"}, "rdzv-7"),
        ({"SHARDBOOK_JOB_ID": "mine", "SLURM_JOB_ID": "42"}, "mine"),
        ({"JOB_NAME": "not-in-a-cluster"}, ""),
        ({"JOB_NAME": "train-0", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "train-0"),
    ],
)
def test_the_jobs_id_is_found(environ: dict[str, str], job_id: str) -> None:
    """A restarted job is known again; torchrun's default id says nothing."""
    assert job_id == find_job_id(environ)
