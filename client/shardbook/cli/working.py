"""``shardbook watch --exec``: claims checkpoints one after the other and runs a command on each.

The claim is renewed while the command runs. A command whose claim cannot be renewed in time is ended before the lease
is: another watcher may begin then. What is done, failed or released is told to the server until it has heard.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from shardbook._retry import may_pass
from shardbook.cli import failures, output
from shardbook.cli.commands import Command, Running, facts_of
from shardbook.client import Client
from shardbook.core.names import RunName
from shardbook.errors import ClaimLostError, ShardbookError
from shardbook.events import Claim, ClaimState
from shardbook.stores import Stores

#: Longest wait in one call for something to do, seconds.
_WAIT_S: Final = 20.0
#: Longest pause between tries of a server that is away, seconds.
_AWAY_S: Final = 2.0
_CALL_S: Final = 5.0
#: The longest delay before a checkpoint is tried again, seconds.
MAX_DELAY_S: Final = 3_600.0


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        name: The subscription.
        command: What to run.
        run: A run, or a pattern of runs.
        part: One part; None for all.
        filter: Which checkpoints.
        since: Where a new subscription begins.
        lease_s: How long a claim lasts without being renewed.
        attempts: At one checkpoint.
        retry_delay_s: Before the second attempt; twice as long before each further one.
        limit: End after so many checkpoints; 0 never.
        once: End when there is nothing to do.
        as_json: Print JSON, one object a line.
        is_plain: Print text for other programs.
    """

    name: str
    command: Command
    run: RunName | str
    part: str | None
    filter: str
    since: str
    lease_s: float
    attempts: int
    retry_delay_s: float
    limit: int
    once: bool
    as_json: bool
    is_plain: bool

    @property
    def grace_s(self) -> float:
        """Between SIGTERM and SIGKILL of a command that has to end."""
        return min(10.0, self.lease_s / 8)


class _StoppedError(BaseException):
    """A signal came while nothing ran."""


class Worker:
    """Does the work. For the main thread: it handles signals."""

    def __init__(self, client: Client, stores: Stores, work: Work) -> None:
        self._client = client
        self._stores = stores
        self._work = work
        self._holder = f"{socket.gethostname()[:200]} {os.getpid()}"
        self._running: Running | None = None
        self._stopped = 0
        self._may_raise = self._was_answered = False

    def run(self) -> int:
        """Works until there is nothing more to do, or a signal comes; returns the exit code."""
        count, code = 0, failures.OK
        with self._signals():
            while not self._stopped and not (self._work.limit and count >= self._work.limit):
                claim_id = uuid.uuid4().bytes
                try:
                    claim, claimed_s = self._next(claim_id)
                except _StoppedError:
                    # It may have been claimed while the signal came.
                    self._tell(claim_id, None, "released")
                    break
                if claim is None:
                    break
                count += 1
                if not self._do(claim, claim_id, claimed_s):
                    code = failures.NEGATIVE
        return 128 + self._stopped if self._stopped else code

    # ------------------------------------------------------------------ claims

    def _next(self, claim_id: bytes) -> tuple[Claim | None, float]:
        """Returns what was claimed, and when its lease began at the earliest, seconds of the monotonic clock.

        None when there is nothing, and none is to be waited for.
        """
        work = self._work
        # A call that waits long tells less of when the lease began.
        wait_s = 0.0 if work.once else min(_WAIT_S, work.lease_s / 4)
        asked_s = time.monotonic()
        while True:
            self._may_raise = True
            if self._stopped:
                raise _StoppedError
            try:
                claim = self._client.claim_checkpoint(
                    work.name,
                    claim_id,
                    run=work.run,
                    part=work.part,
                    filter=work.filter,
                    since=work.since,
                    holder=self._holder,
                    lease_s=work.lease_s,
                    max_attempts=work.attempts,
                    wait_s=wait_s,
                )
            except ShardbookError as error:
                if not self._was_answered or not may_pass(error):
                    raise
                time.sleep(max(_AWAY_S, error.retry_delay_s or 0.0))
                continue
            finally:
                self._may_raise = False
            self._was_answered = True
            if claim is not None:
                return claim, self._held_since(claim_id, asked_s)
            if work.once:
                return None, asked_s
            # However long there was nothing to do: the lease of what comes begins after this.
            asked_s = time.monotonic()

    def _held_since(self, claim_id: bytes, asked_s: float) -> float:
        """Returns when a lease began at the earliest; renews it when that may be long ago, after lost answers."""
        renewed_s = time.monotonic()
        if renewed_s - asked_s <= self._work.lease_s / 2:
            return asked_s
        try:
            self._client.renew_claim(self._work.name, claim_id, lease_s=self._work.lease_s, deadline_s=_CALL_S)
        except ShardbookError:
            # Lost, or nobody knows: the command is ended as soon as it would be renewed.
            return asked_s
        return renewed_s

    def _do(self, claim: Claim, claim_id: bytes, claimed_s: float) -> bool:
        """Runs the command on a checkpoint; returns True when that was done."""
        facts = facts_of(claim, self._stores)
        self._say(claim, "running", f"attempt {claim.attempt} of {self._work.attempts}")
        began_s = time.monotonic()
        self._running = Running(
            self._work.command.argv(facts),
            facts,
            self._client.target,
            grace_s=self._work.grace_s,
            is_quiet=self._work.as_json,
        )
        try:
            if self._stopped:
                self._running.send(self._stopped)
            exit_code = self._keep(self._running, claim_id, claimed_s)
        finally:
            running, self._running = self._running, None
            running.close()
        return self._ended(claim, claim_id, exit_code, time.monotonic() - began_s)

    def _keep(self, running: Running, claim_id: bytes, claimed_s: float) -> int | None:
        """Renews the claim until the command has ended; returns its exit code, None when the claim was lost."""
        lease_s, grace_s = self._work.lease_s, self._work.grace_s
        renewed_s, next_s = claimed_s, claimed_s + lease_s / 3
        while True:
            code = running.wait(next_s - time.monotonic())
            if code is not None:
                return code
            asked_s = time.monotonic()
            # One more try may take this long, and ending the command its grace.
            left_s = renewed_s + lease_s - 2 * grace_s - asked_s
            try:
                if left_s <= 0:
                    raise ClaimLostError("the claim could not be renewed in time")
                self._client.renew_claim(self._work.name, claim_id, lease_s=lease_s, deadline_s=min(_CALL_S, left_s))
                renewed_s, next_s = asked_s, asked_s + lease_s / 3
            except ClaimLostError:
                running.end(grace_s)
                return None
            except ShardbookError as error:
                if not may_pass(error):
                    running.end(grace_s)
                    return None
                next_s = time.monotonic() + min(1.0, lease_s / 10)

    def _ended(self, claim: Claim, claim_id: bytes, exit_code: int | None, took_s: float) -> bool:
        if exit_code is None:
            self._say(claim, "lost", "another watcher may have it: the command was ended")
            return False
        if exit_code == 0:
            is_told = self._tell(claim_id, claim, "done") is not None
            self._say(claim, "done" if is_told else "lost", f"{took_s:.1f} s", exit_code)
            return is_told
        if self._stopped:
            self._tell(claim_id, claim, "released")
            self._say(claim, "released", f"signal {self._stopped}", exit_code)
            return False
        delay_s = min(MAX_DELAY_S, self._work.retry_delay_s * 2 ** min(claim.attempt - 1, 20))
        why = f"exit code {exit_code}"
        state = self._tell(claim_id, claim, "failed", failure=why, retry_delay_s=delay_s)
        if state is ClaimState.WAITING:
            self._say(claim, "failed", f"{why}, again in {delay_s:.0f} s", exit_code)
        else:
            self._say(claim, "skipped", f"{why}, attempt {claim.attempt} was the last one", exit_code)
        return False

    def _tell(self, claim_id: bytes, claim: Claim | None, outcome: str, **more: Any) -> ClaimState | None:
        """Tells the server until it has heard; returns where the work stands, None when another watcher has it."""
        name = None if claim is None else claim.checkpoint.name
        while True:
            with suppress(ClaimLostError):
                try:
                    return self._client.finish_claim(
                        self._work.name, claim_id, name, outcome, max_attempts=self._work.attempts, **more
                    )
                except ShardbookError as error:
                    if not may_pass(error):
                        raise
                    # One that is to end does not wait: the lease ends by itself.
                    if self._stopped or name is None:
                        return None
                    time.sleep(_AWAY_S)
                    continue
            return None

    # ------------------------------------------------------------------ signals, words

    @contextmanager
    def _signals(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {number: signal.signal(number, self._signalled) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signalled(self, number: int, _frame: object) -> None:
        again, self._stopped = self._stopped, number
        if self._running is not None:
            # Who asks twice does not wait for what takes its time.
            self._running.send(signal.SIGKILL if again else number)
        elif self._may_raise:
            self._may_raise = False
            raise _StoppedError

    def _say(self, claim: Claim, what: str, more: str, exit_code: int | None = None) -> None:
        if self._work.as_json:
            fact = {"ref": claim.ref, "outcome": what, "attempt": claim.attempt, "exit_code": exit_code}
            output.print_json_line({**fact, "checkpoint": claim.checkpoint.to_json()})
        else:
            output.print_line(f"{claim.ref}  {what}: {more}", is_plain=self._work.is_plain)
        sys.stdout.flush()
