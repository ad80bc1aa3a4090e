"""Whatever is committed, held, deleted, brought back, pruned and lost, in whatever order: rules that always hold."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from shardbook.core.retention import KeepBest, RetentionPolicy
from shardbook.errors import FailedPreconditionError, NotFoundError, ShardbookError
from shardbook_server.service.aliases import AliasRequest, Direction
from shardbook_server.service.describing import Description
from shardbook_server.service.services import Services
from shardbook_server.service.types import OnLive
from shardbook_server.service.views import CheckpointInfo, CheckpointState
from tests.behaviour.service.conftest import Clock
from tests.behaviour.service.saves import Job, Model, whole

STEPS = st.integers(1, 5)
POLICIES = st.sampled_from(
    [
        RetentionPolicy(keep_last=1),
        RetentionPolicy(keep_every=2),
        RetentionPolicy(keep_best=(KeepBest("loss", 1),)),
        RetentionPolicy(newer_than_s=30, keep_last=2),
    ]
)
_numbers = itertools.count(1)


class Keeping(RuleBasedStateMachine):
    """One run; the services are asked, and held against what must be true of them."""

    def __init__(self, services: Services, clock: Clock) -> None:
        super().__init__()
        self.services, self.clock = services, clock
        self.run = f"projects/keep/runs/r{next(_numbers)}"
        self.part = f"{self.run}/parts/default"
        self.ref = self.run.replace("projects/", "").replace("/runs/", "/")
        self.job = self._job()
        self.attempts: dict[int, int] = {}
        self.held: dict[str, int] = {}
        self.purged: set[str] = set()
        self.job.register(1, whole(self.job.model), self._attempt(1))
        self.job.commit(1, 1)
        self.services.aliases.set(AliasRequest(f"{self.part}/aliases/best", metric="loss", direction=Direction.MIN))

    def _job(self) -> Job:
        job = Job(self.services, Model(1), run=self.run)
        job.start(on_live=OnLive.TAKEOVER)
        return job

    def _attempt(self, step: int) -> int:
        self.attempts[step] = self.attempts.get(step, 0) + 1
        return self.attempts[step]

    def _all(self) -> list[CheckpointInfo]:
        return list(self.services.catalog.list_checkpoints(self.part, show_all=True, page_size=1000).items)

    def _meant(self, alias: str) -> CheckpointInfo | None:
        try:
            return self.services.catalog.get_checkpoint(f"{self.ref}@{alias}")
        except NotFoundError:
            return None

    def _try(self, call: Any, *args: Any, **more: Any) -> str:
        try:
            call(*args, **more)
        except (FailedPreconditionError, NotFoundError) as error:
            assert isinstance(error, ShardbookError)
            return error.reason
        return ""

    @rule(step=STEPS, loss=st.floats(-1, 1))
    def commit(self, step: int, loss: float) -> None:
        """A save of the current session is always committed, and live."""
        attempt = self._attempt(step)
        self.job.register(step, whole(self.job.model), attempt)
        info = self.services.commits.commit(self.job.key(step, attempt), Description(metrics={"loss": loss}))
        assert (CheckpointState.COMMITTED, True) == (info.state, info.live)

    @rule()
    def take_over(self) -> None:
        """The next session."""
        self.job, self.attempts = self._job(), {}

    @rule(seconds=st.integers(1, 40))
    def wait(self, seconds: int) -> None:
        """Time passes."""
        self.clock.advance(seconds)

    @rule(data=st.data(), seconds=st.integers(1, 60))
    def hold(self, data: st.DataObject, seconds: int) -> None:
        """What is committed can be held."""
        one = data.draw(st.sampled_from(self._all()))
        if not self._try(self.services.holds.hold, one.name, "reader", seconds * 1_000_000):
            until_us = self.clock.now_us + seconds * 1_000_000
            self.held[one.name] = max(self.held.get(one.name, 0), until_us)

    @rule(data=st.data(), force=st.booleans(), files=st.booleans())
    def delete(self, data: st.DataObject, force: bool, files: bool) -> None:
        """Not what is held, and what latest means by force alone."""
        one = data.draw(st.sampled_from(self._all()))
        latest = self._meant("latest")
        reason = self._try(self.services.deletions.delete, one.name, force=force, files=files)
        if one.state is CheckpointState.COMMITTED:
            if self.held.get(one.name, 0) > self.clock.now_us:
                assert "CHECKPOINT_HELD" == reason
            elif not force and latest is not None and latest.name == one.name:
                assert "LATEST_CHECKPOINT" == reason
            else:
                assert "" == reason
        if not reason and files:
            self.purged.add(one.name)

    @rule(data=st.data())
    def undelete(self, data: st.DataObject) -> None:
        """What was deleted comes back, unless its files were to go."""
        one = data.draw(st.sampled_from(self._all()))
        reason = self._try(self.services.deletions.undelete, one.name)
        assert ("FILES_DELETED" if one.name in self.purged else "") == reason

    @rule(data=st.data(), missing=st.booleans())
    def lose(self, data: st.DataObject, missing: bool) -> None:
        """Data is lost, or found."""
        one = data.draw(st.sampled_from(self._all()))
        reason = self._try(self.services.deletions.report_missing, one.name, missing=missing)
        assert (one.state is CheckpointState.COMMITTED) is (reason == "")

    @rule(policy=POLICIES)
    @precondition(lambda self: any(one.state is CheckpointState.COMMITTED for one in self._all()))
    def prune(self, policy: RetentionPolicy) -> None:
        """Nothing that is held or meant, and not the last one, goes; the same again deletes nothing more."""
        before = self._meant("latest"), self._meant("best")
        gone = [
            one.name for one in self.services.retention.preview(self.part, policy, page_size=1000).items if not one.keep
        ]
        if gone:
            assert not any(one.keep for one in self.services.retention.prune(self.part, policy, gone))
        assert all(one.keep for one in self.services.retention.preview(self.part, policy, page_size=1000).items)
        assert not {name for name, until_us in self.held.items() if until_us > self.clock.now_us} & set(gone)
        after = self._meant("latest"), self._meant("best")
        assert [one and one.name for one in before] == [one and one.name for one in after]
        assert any(one.state is CheckpointState.COMMITTED for one in self._all())

    @invariant()
    def names_mean_what_is_there(self) -> None:
        """One live checkpoint a step; latest means a committed one while any is live, and a whole one if it can."""
        committed = [one for one in self._all() if one.state is CheckpointState.COMMITTED]
        live = [one for one in committed if one.live]
        assert len(live) == len({one.step for one in live})
        latest, best = self._meant("latest"), self._meant("best")
        assert (latest is None) is (not live)
        if latest is not None:
            assert latest.state is CheckpointState.COMMITTED
            assert not latest.data_missing or all(one.data_missing for one in live)
        measured = [one for one in live if not one.data_missing and "loss" in one.metrics]
        assert (best is None) is (not measured)
        if best is not None:
            assert min(one.metrics["loss"] for one in measured) == best.metrics["loss"]


@pytest.mark.soak_with("postgres")
def test_rules_hold_in_any_order(services: Services, clock: Clock) -> None:
    """A state machine of sessions, saves, holds, deletions, prunes and losses."""
    some = settings(
        max_examples=6,
        stateful_step_count=18,
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(lambda: Keeping(services, clock), settings=some)  # type: ignore[arg-type]
