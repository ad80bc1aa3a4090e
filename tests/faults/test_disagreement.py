"""P2: ranks that disagree about what they save make no checkpoint, and learn so at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from shardbook import CheckpointState
from shardbook.errors import InvalidArgumentError, NotFoundError, RankFailedError, ShardbookError
from tests.faults import jobs
from tests.faults.server import ServerProcess
from tests.faults.validators import p2_no_torn_checkpoint
from tests.torch.harness import RankPool

#: Far from the two minutes that a rank waits for plans, and from the half hour for data.
_AT_ONCE_S = 30.0


def _of(path: Path, what: str) -> list[dict[str, Any]]:
    """What two ranks pass to ``save``."""
    if what == "step":
        return [{"path": str(path / "d"), "step": 4}, {"path": str(path / "d"), "step": 5}]
    if what == "part":
        return [{"path": str(path / "d"), "step": 4, "part": part} for part in ("weights", "optimizer")]
    return [{"path": str(path / "a" / "step-4")}, {"path": str(path / "b" / "step-4")}]


@pytest.mark.parametrize("what", ["step", "directory"])
def test_ranks_that_disagree_are_told_at_once(
    pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path, what: str
) -> None:
    """One is refused, saying what both said; the other one learns that it failed, and why."""
    pool.run(jobs.nothing, world_size=2)
    began_s = time.monotonic()
    start = {"run": run, "server": shared_server.address}
    outcomes = pool.start(jobs.disagree, start, _of(tmp_path, what), world_size=2).outcomes()
    assert time.monotonic() - began_s < _AT_ONCE_S
    errors = sorted((one.error for one in outcomes), key=lambda error: isinstance(error, RankFailedError))
    refused, failed = errors
    assert isinstance(refused, InvalidArgumentError)
    assert "ATTEMPT_MISMATCH" == refused.reason
    assert isinstance(failed, RankFailedError)
    said = ("4", "5") if what == "step" else (f"{tmp_path}/a/step-4", f"{tmp_path}/b/step-4")
    for error in (refused, failed):
        assert all(one in str(error) for one in said), str(error)
    listed = p2_no_torn_checkpoint(shared_server.client, run)
    assert [CheckpointState.FAILED] == [one.state for one in listed]


@pytest.mark.parametrize("what", ["step", "part"])
def test_a_record_of_another_save_is_never_registered(
    pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path, what: str
) -> None:
    """A coordinator that registers for a rank without a route looks at what that rank's record is of."""
    start = {"run": run, "server": shared_server.address}
    by_rank = [one | {"timeout_s": 6.0} for one in _of(tmp_path, what)]
    outcomes = pool.start(jobs.disagree, start, by_rank, True, world_size=2).outcomes()
    error = outcomes[0].error
    assert isinstance(error, InvalidArgumentError), outcomes[0].traceback
    assert "ATTEMPT_MISMATCH" == error.reason
    assert f"rank 1 said {what}" in error.message
    assert not any(one.state is CheckpointState.COMMITTED for one in p2_no_torn_checkpoint(shared_server.client, run))


def test_offline_their_records_do_not_mix(pool: RankPool, run: str, tmp_path: Path) -> None:
    """Without a service the directory tells: neither rank's data is taken for a part of the other one's checkpoint."""
    by_rank = [one | {"timeout_s": 3.0} for one in _of(tmp_path, "step")]
    outcomes = pool.start(jobs.disagree, {"run": run, "mode": "offline"}, by_rank, world_size=2).outcomes()
    assert "COMMITTED" not in {getattr(one.value.result.state, "name", "") for one in outcomes if one.value}
    loaded = pool.start(jobs.load_once, str(tmp_path / "d"), world_size=1).outcomes()
    assert isinstance(loaded[0].error, (NotFoundError, ShardbookError))
