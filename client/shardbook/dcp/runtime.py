"""The session of this process, and what saves ask of it: place among the ranks, attempt numbers, a client."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch.distributed as dist

from shardbook.breaker import SaveBudget
from shardbook.client import Client
from shardbook.config import ClientConfig, Mode
from shardbook.core.lineage import Origin
from shardbook.dcp.best_effort import best_effort
from shardbook.dcp.catching_up import CatchingUp
from shardbook.dcp.lease import LeaseKeeper
from shardbook.dcp.session import Session, ask_for_session
from shardbook.dcp.telling import ToldOrigins
from shardbook.errors import (
    FailedPreconditionError,
    ForkedClientError,
    InvalidArgumentError,
)
from shardbook.v1 import registration_pb2 as pb

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """Place of this process among those that save together.

    Attributes:
        rank: 0 to world_size - 1; rank 0 coordinates.
        world_size: How many take part.
    """

    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise InvalidArgumentError(f"rank {self.rank} is not one of {self.world_size}", field="rank")

    @property
    def is_coordinator(self) -> bool:
        """True for the rank that commits."""
        return self.rank == 0


@dataclass(eq=False)
class _Counts:
    """Last attempt by (part, step) and by directory."""

    of_step: dict[tuple[str, int], int] = field(default_factory=dict)
    of_directory: dict[str, int] = field(default_factory=dict)
    #: The highest of all, and the highest that another process may have used: those that follow are above it.
    highest: int = 0
    reserved: int = 0

    def note(self, part: str, step: int, location: str, number: int) -> int:
        """Counts an attempt; returns its number."""
        self.of_step[part, step] = max(number, self.of_step.get((part, step), 0))
        self.of_directory[location] = max(number, self.of_directory.get(location, 0))
        self.highest = max(number, self.highest)
        return number


class Runtime:
    """State of a session in this process. Thread-safe; never pickled.

    Args:
        session: The session.
        config: Settings of this process.
        alone: Place of this process while no process group says otherwise.
        joined: Place of this process among those that called ``init`` with it.
        is_shared: True when other ranks hold the same session: it was broadcast, or carried over.
        began_s: When ``init`` was called, by ``time.monotonic``; now when None.
    """

    def __init__(
        self,
        session: Session,
        config: ClientConfig,
        alone: Member,
        joined: Member,
        *,
        is_shared: bool,
        began_s: float | None = None,
    ) -> None:
        self.session = session
        self.config = config
        self.alone = alone
        self.joined = joined
        self.is_shared = is_shared
        self.breaker = config.breaker()
        #: What is left to do for earlier saves.
        self.catching_up = CatchingUp()
        #: The server did not answer the last save, and that was said.
        self.outage_told = False
        #: Items could not be given checksums, and that was said.
        self.unchecked_told = False
        #: Names of entries that were looked at for what `load` will refuse.
        self.checked_entries: set[str] = set()
        #: Blobs that the server has from this process, so that later saves send digests alone.
        self.known_blobs: set[tuple[int, bytes]] = set()
        #: What ends with the session, and whether it has.
        self.is_closed = False
        self.at_close: list[Callable[[], None]] = []
        #: Where the checkpoints of the session's own part come from.
        self.origins = ToldOrigins(session.origins)
        self.began_s = time.monotonic() if began_s is None else began_s
        self._lock = threading.Lock()
        self._numbers = {session.part: session.number} if session.number else {}
        #: Parts whose session had a number once; the server has forgotten some, perhaps.
        self._numbered = set(self._numbers)
        #: Parts whose leases this process keeps.
        self._kept: set[str] = set()
        self._lease_ttl_s = session.lease_ttl_s
        self._counts = _Counts()
        self._client = (
            Client(session.server, token=config.token, timeout_s=config.timeout_s)
            if session.mode is Mode.ONLINE and session.server is not None
            else None
        )
        self._keeper: LeaseKeeper | None = None
        self._pid = os.getpid()

    def member(self, process_group: dist.ProcessGroup | None, *, no_dist: bool) -> Member:
        """Returns the place of this process in a save.

        Raises:
            InvalidArgumentError: ``no_dist`` although several ranks hold the session, or the process is no member.
            FailedPreconditionError: The other ranks do not hold this session.
        """
        if no_dist:
            return self._alone()
        member = self.alone
        if is_distributed():
            rank, world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
            if rank < 0:
                raise InvalidArgumentError("this process is not in the process group", field="process_group")
            member = Member(rank, world_size)
        return self._shared(member)

    def coordinator(self, world_size: int) -> Member:
        """Returns the place of rank 0 of a save whose ranks torch has counted; raises as ``member`` does."""
        return self._alone() if world_size == 1 else self._shared(Member(0, world_size))

    def _alone(self) -> Member:
        if self.joined.world_size > 1:
            raise InvalidArgumentError(
                "no_dist=True would make every rank write as rank 0; this session has several ranks: leave it "
                "out, or init a run or part of their own for saves by one process",
                reason="NO_DIST",
                field="no_dist",
            )
        return Member(0, 1)

    def _shared(self, member: Member) -> Member:
        if member.world_size > 1 and not self.is_shared:
            raise FailedPreconditionError(
                "shardbook.dcp.init ran before the process group was there, so every rank has a session of its own: "
                "call torch.distributed.init_process_group first",
                reason="SESSION_NOT_SHARED",
            )
        return member

    def next_attempt(self, part: str, step: int, location: str) -> int:
        """Counts and returns the attempt of a save that is about to begin.

        One above the last attempt of the (part, step) and of the directory. Decision 0003: counting per (session, part,
        step, directory), two parts saved into one directory would share the prefix ``...-a1`` and
        overwrite each other's files, and a step saved into two directories would share the checkpoint's key. With
        the larger of the two no attempts in a directory share a prefix, and none of a (part, step) share a number.
        Every rank counts for itself; the counts agree because retrying is collective.
        """
        with self._lock:
            counts = self._counts
            last = max(counts.of_step.get((part, step), 0), counts.of_directory.get(location, 0), counts.reserved)
            return counts.note(part, step, location, last + 1)

    def note_attempt(self, part: str, step: int, location: str, number: int) -> None:
        """Counts an attempt that another rank has counted for this one, so that both go on alike."""
        with self._lock:
            self._counts.note(part, step, location, number)

    def reserve_attempt(self) -> int:
        """Returns a number above all that were handed out and below all that will be, whatever their step.

        For a save by another process, of which this one will not hear what it saved.
        """
        with self._lock:
            counts = self._counts
            counts.reserved = counts.highest = counts.highest + 1
            return counts.reserved

    def client(self, budget: SaveBudget) -> Client | None:
        """Returns a client whose calls are charged to one save; None when the service is not to be asked.

        Raises:
            ForkedClientError: This process was forked from the one that called ``init``.
        """
        if self._client is None:
            return None
        self.check_not_forked()
        return self._client.guarded(budget)

    def check_not_forked(self) -> None:
        """Refuses to serve a forked child.

        Raises:
            ForkedClientError: This process was forked from the one that called ``init``.
        """
        if os.getpid() != self._pid:
            raise ForkedClientError(
                f"process {os.getpid()} was forked from process {self._pid}, whose session it cannot use: gRPC does "
                "not survive fork. Save in the parent, or start processes by 'spawn'"
            )

    @property
    def plain_client(self) -> Client | None:
        """A client that charges nobody; None when the service is not to be asked."""
        return self._client

    def origins_of(self, part: str) -> tuple[Origin, ...]:
        """Returns what a save of a part has to say of where it comes from."""
        return self.origins.waiting if part == self.session.part else ()

    def session_number(self, part: str, client: Client) -> int:
        """Returns the number of this incarnation's session of ``part``, starting it when it is not yet.

        Any rank may be the first: the server knows an incarnation again, so all get the same number, without a word
        between them.

        Raises:
            SessionFencedError: A later incarnation of the job holds the part.
            ShardbookError: What the server answered, or that it did not.
        """
        with self._lock:
            number = self._numbers.get(part)
        if number is not None:
            return number
        request = self.session.start_request(part)
        if part == self.session.part:
            # ``init`` met an outage. Whoever took the run since then came later: it is not to be fenced.
            request.on_live = pb.ON_LIVE_FAIL
        if part in self._numbered:
            request.resumed_from = ""  # done once; what was committed since counts
        answer = ask_for_session(client, request, self.began_s)
        self.origins.name_resumed(request.resumed_from, answer.latest)
        with self._lock:
            number = self._numbers.setdefault(part, answer.session)
            self._numbered.add(part)
            kept = part in self._kept
            self._lease_ttl_s = answer.lease_ttl.ToTimedelta().total_seconds()
        if kept:
            self._keep(self._lease_ttl_s)
        return number

    @property
    def sessions(self) -> dict[str, int]:
        """Numbers of this incarnation's sessions, by part, as far as this process knows them."""
        with self._lock:
            return dict(self._numbers)

    @property
    def lease_ttl_s(self) -> float:
        """How long a lease of this session lives, seconds; 0 while no server has said."""
        with self._lock:
            return self._lease_ttl_s

    def adopt_sessions(self, numbers: dict[str, int], lease_ttl_s: float) -> None:
        """Takes over what another process of this incarnation was told: the later number counts.

        A number that the server has forgotten heals by itself, see ``forget_session``.
        """
        with self._lock:
            for part, number in numbers.items():
                self._numbers[part] = max(number, self._numbers.get(part, 0))
                self._numbered.add(part)
            lease_ttl_s = self._lease_ttl_s = self._lease_ttl_s or lease_ttl_s
            is_kept = not self._kept.isdisjoint(numbers)
        if is_kept:
            self._keep(lease_ttl_s)

    def forget_session(self, part: str, number: int) -> None:
        """Notes that the server does not know a session any more: its database was put back from a backup.

        The incarnation is the identity that outlives that. The next ``session_number`` starts a session for it under
        another number, unless a later incarnation was quicker.
        """
        with self._lock:
            if self._numbers.get(part) != number:
                return
            del self._numbers[part]
        _LOG.warning(
            "the Shardbook server has forgotten session %d of %s:%s: its database was put back from a backup. The job "
            "goes on in a new session; `shardbook sync` records what was lost of its earlier saves",
            number,
            self.session.run,
            part,
        )

    def start_keeping(self, part: str | None = None) -> None:
        """Renews the lease of a part's session in the background, until ``close``.

        Done by one process: for the session's own part by the coordinator of ``init``, for another part by the
        coordinator of its saves, which need not be the same.

        Args:
            part: The part; the session's own when None.
        """
        part = self.session.part if part is None else part
        if self._client is None or (part == self.session.part and not self.joined.is_coordinator):
            return
        with self._lock:
            is_new = part not in self._kept
            self._kept.add(part)
            if self._keeper is None:
                self._keeper = LeaseKeeper(self._client, self.session, self._kept_numbers, self._restart_session)
        if is_new:
            self._keep(self._lease_ttl_s)

    def _keep(self, lease_ttl_s: float) -> None:
        if self._keeper is not None and lease_ttl_s > 0:
            with best_effort("renew leases in the background"):  # an interpreter that ends starts no threads
                self._keeper.keep(lease_ttl_s)

    def _kept_numbers(self) -> dict[str, int]:
        """Numbers of the kept parts; 0 where the server has forgotten the session and given no new one yet."""
        with self._lock:
            return {part: self._numbers.get(part, 0) for part in self._kept & self._numbered}

    def _restart_session(self, part: str, number: int, client: Client) -> None:
        """Starts a session anew that the server has forgotten: until then another job could take the run."""
        self.forget_session(part, number)
        self.session_number(part, client)

    def close(self) -> None:
        """Ends the leases of this process's session, so that another job may start at once. Never raises."""
        if os.getpid() != self._pid:
            return
        self.is_closed = True
        while self.at_close:
            self.at_close.pop()()
        if self._keeper is not None:
            self._keeper.close()
            self._keeper = None


_current: Runtime | None = None
_current_lock = threading.Lock()


def replace_current(runtime: Runtime | None) -> Runtime | None:
    """Makes ``runtime`` the session of this process; returns the one that it was before."""
    global _current
    with _current_lock:
        before, _current = _current, runtime
    return before


def current_or_none() -> Runtime | None:
    """Returns the session of this process; None where there is none."""
    return _current


def current() -> Runtime:
    """Returns the session of this process.

    Raises:
        FailedPreconditionError: ``init`` was not called.
    """
    runtime = _current
    if runtime is None:
        raise FailedPreconditionError(
            "no session: call shardbook.dcp.init(run='project/run') once, on every rank, before the first save",
            reason="NO_SESSION",
        )
    return runtime


def current_config() -> ClientConfig:
    """Returns the settings that ``init`` found; without a session, those of the environment."""
    runtime = _current
    return ClientConfig.from_env() if runtime is None else runtime.config


def is_distributed() -> bool:
    """Returns True when there is a default process group."""
    return dist.is_available() and dist.is_initialized()
