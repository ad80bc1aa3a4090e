"""The session of this process: how ``init`` starts it, shares it and keeps it alive, and what ``save`` asks of it."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch.distributed as dist

from shardbook.breaker import SaveBudget, is_outage
from shardbook.client import Client
from shardbook.config import ClientConfig, Mode
from shardbook.core.names import DEFAULT_PART
from shardbook.dcp._torch import group_timeout_s
from shardbook.dcp.lease import LeaseKeeper
from shardbook.dcp.session import OnLive, Session, new_session, start_session
from shardbook.errors import (
    FailedPreconditionError,
    ForkedClientError,
    InternalError,
    InvalidArgumentError,
    ShardbookError,
)
from shardbook.v1 import registration_pb2 as pb

_LOG = logging.getLogger(__name__)

#: Longest that ``on_live="wait"`` waits unless told otherwise, seconds.
DEFAULT_LIVE_WAIT_S: Final = 600.0


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


class Runtime:
    """State of a session in this process. Thread-safe; never pickled.

    Args:
        session: The session.
        config: Settings of this process.
        alone: Place of this process while no process group says otherwise.
        joined: Place of this process among those that called ``init`` with it.
        is_shared: True when other ranks hold the same session: it was broadcast, or carried over.
    """

    def __init__(
        self, session: Session, config: ClientConfig, alone: Member, joined: Member, *, is_shared: bool
    ) -> None:
        self.session = session
        self.config = config
        self.alone = alone
        self.joined = joined
        self.is_shared = is_shared
        self.breaker = config.breaker()
        #: Saves that the service does not know yet: path of the directory by (part, step).
        self.unregistered: dict[tuple[str, int], str] = {}
        #: Names of entries that were looked at for what `load` will refuse.
        self.checked_entries: set[str] = set()
        #: Blobs that the server has from this process, so that later saves send digests alone.
        self.known_blobs: set[tuple[int, bytes]] = set()
        #: Held while a thread records what the service missed.
        self.catching_up = threading.Lock()
        self._lock = threading.Lock()
        self._numbers = {session.part: session.number} if session.number else {}
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
            if self.joined.world_size > 1:
                raise InvalidArgumentError(
                    "no_dist=True would make every rank write as rank 0; this session has several ranks: leave it "
                    "out, or init a run or part of their own for saves by one process",
                    reason="NO_DIST",
                    field="no_dist",
                )
            return Member(0, 1)
        member = self.alone
        if is_distributed():
            rank, world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
            if rank < 0:
                raise InvalidArgumentError("this process is not in the process group", field="process_group")
            member = Member(rank, world_size)
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
            attempt = 1 + max(counts.of_step.get((part, step), 0), counts.of_directory.get(location, 0))
            counts.of_step[part, step] = counts.of_directory[location] = attempt
        return attempt

    def client(self, budget: SaveBudget) -> Client | None:
        """Returns a client whose calls are charged to one save; None when the service is not to be asked.

        Raises:
            ForkedClientError: This process was forked from the one that called ``init``.
        """
        if self._client is None:
            return None
        if os.getpid() != self._pid:
            raise ForkedClientError(
                f"process {os.getpid()} was forked from process {self._pid}, whose session it cannot use: gRPC does "
                "not survive fork. Save in the parent, or start processes by 'spawn'"
            )
        return self._client.guarded(budget)

    @property
    def plain_client(self) -> Client | None:
        """A client that charges nobody; None when the service is not to be asked."""
        return self._client

    def session_number(self, part: str, client: Client) -> int:
        """Returns the number of this incarnation's session of ``part``, starting it when it is not yet.

        Any rank may be the first: the server knows an incarnation again, so all get the same number, without a word
        between them.

        Raises:
            ShardbookError: What the server answered, or that it did not.
        """
        with self._lock:
            number = self._numbers.get(part)
        if number is None:
            request = self.session.start_request(part)
            if part == self.session.part:
                # ``init`` met an outage. Whoever took the run since then came later: it is not to be fenced.
                request.on_live = pb.ON_LIVE_FAIL
            answer = client.start_session(request)
            with self._lock:
                number = self._numbers.setdefault(part, answer.session)
            self._keep(answer.lease_ttl.ToTimedelta().total_seconds())
        return number

    def start_keeping(self) -> None:
        """Renews the leases of the session's parts in the background; on the coordinator only."""
        if self._client is not None and self.joined.is_coordinator and self._keeper is None:
            self._keeper = LeaseKeeper(self._client, self.session, self._known_numbers)
            self._keep(self.session.lease_ttl_s)

    def _keep(self, lease_ttl_s: float) -> None:
        if self._keeper is not None and lease_ttl_s > 0:
            self._keeper.keep(lease_ttl_s)

    def _known_numbers(self) -> dict[str, int]:
        with self._lock:
            return dict(self._numbers)

    def close(self) -> None:
        """Ends the leases of this process's session, so that another job may start at once. Never raises."""
        if self._keeper is not None and os.getpid() == self._pid:
            self._keeper.close()
            self._keeper = None


_current: Runtime | None = None
_current_lock = threading.Lock()


def init(
    run: str | None = None,
    *,
    part: str = DEFAULT_PART,
    resumed_from: str | None = None,
    on_live: str = OnLive.FAIL,
    live_wait_s: float = DEFAULT_LIVE_WAIT_S,
    process_group: dist.ProcessGroup | None = None,
    session: Session | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    job_id: str | None = None,
    server: str | None = None,
    mode: str | None = None,
) -> Session:
    """Starts this job's session on a run; every rank calls it once, before the first save.

    Rank 0 asks the server, then tells the others in one broadcast over the process group: the last collective of
    all, ``save``, ``async_save`` and ``load`` run none. A server that is away is no reason not to train: the session
    begins without a number, and the first save that reaches the server asks for one.

    Args:
        run: ``project/run``; made when it is new.
        part: Part that saves go to unless they name one.
        resumed_from: Ref of the checkpoint that the job resumed from. After a rollback this moves ``@latest`` back to
            it, so that the next restart does not undo the rollback.
        on_live: What to do when another job writes the run: ``fail``, ``wait`` or ``takeover``. A job with the same
            ``job_id`` is taken over at once.
        live_wait_s: With ``wait``, for how long, seconds; at most half the process group's timeout.
        process_group: The ranks that save together; the default group when None.
        session: A session that the caller carried over to this rank; the server is not asked again.
        rank: Rank of this process when there is no process group; else from ``RANK``.
        world_size: Number of ranks when there is no process group; else from ``WORLD_SIZE``.
        job_id: Id by which a restarted job is known again; found by itself (Slurm, torchelastic, Kubernetes, ...).
        server: Address of the server, instead of ``SHARDBOOK_SERVER``.
        mode: ``online``, ``offline`` or ``disabled``, instead of ``SHARDBOOK_MODE``.

    Returns:
        The session, the same on every rank.

    Raises:
        RunBusyError: Another job writes the run; host, user and last sign of life are in its ``metadata``.
        InvalidArgumentError: An argument or setting is wrong.
        FailedPreconditionError: Several ranks, but neither a process group nor a session.
    """
    global _current  # noqa: PLW0603 - one session a process
    config = _config(server, mode, session)
    close()  # a second init is a new incarnation; its own old lease must not stand in its way
    alone, is_shared = _place(process_group, session, rank, world_size)
    if session is None:
        if run is None:
            raise InvalidArgumentError("name the run: init(run='project/run')", field="run")
        mine = new_session(run, config, part=part, resumed_from=resumed_from, on_live=on_live, job_id=job_id)
        limit_s = min(live_wait_s, group_timeout_s(process_group) / 2) if is_distributed() else live_wait_s
        session = _started(mine, config, process_group, limit_s)
    elif run is not None and Session(run, incarnation=session.incarnation).run != session.run:
        raise InvalidArgumentError(f"the session belongs to {session.run}, not to {run}", field="session")
    runtime = Runtime(session, config, alone, _member_or(alone, process_group), is_shared=is_shared)
    runtime.start_keeping()
    with _current_lock:
        _current = runtime
    return session


def close() -> None:
    """Ends this process's session: its leases end now, so another job may start at once. Also done at exit."""
    global _current
    with _current_lock:
        runtime, _current = _current, None
    if runtime is not None:
        runtime.close()


atexit.register(close)


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


def _config(server: str | None, mode: str | None, session: Session | None) -> ClientConfig:
    if mode is not None and mode not in set(Mode):
        raise InvalidArgumentError(f"mode is {mode!r}, not one of {', '.join(map(str, Mode))}", field="mode")
    environ = dict(os.environ)
    if session is not None:
        server, mode = session.server, session.mode
    if server is not None:
        environ["SHARDBOOK_SERVER"] = server
    if mode is not None:
        environ["SHARDBOOK_MODE"] = mode
    return ClientConfig.from_env(environ)


def is_distributed() -> bool:
    """Returns True when there is a default process group."""
    return dist.is_available() and dist.is_initialized()


def _place(
    process_group: dist.ProcessGroup | None, session: Session | None, rank: int | None, world_size: int | None
) -> tuple[Member, bool]:
    """Place of this process without a process group, and whether other ranks hold the session too."""
    if is_distributed():
        if rank is not None or world_size is not None:
            raise InvalidArgumentError("rank and world_size are for processes without a process group", field="rank")
        if dist.get_rank(process_group) < 0:
            raise InvalidArgumentError("this process is not in the process group", field="process_group")
        return Member(0, 1), True
    alone = Member(_number(rank, "RANK", 0), _number(world_size, "WORLD_SIZE", 1))
    if alone.world_size > 1 and session is None:
        raise FailedPreconditionError(
            f"{alone.world_size} ranks, but no process group to share a session over: call "
            "torch.distributed.init_process_group first, or carry a session over and pass init(session=...)",
            reason="NO_PROCESS_GROUP",
        )
    return alone, session is not None


def _number(given: int | None, variable: str, default: int) -> int:
    if given is not None:
        return given
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    if not text.isascii() or not text.isdigit():
        raise InvalidArgumentError(f"{variable} is {text!r}, not a number", field=variable.lower())
    return int(text)


def _member_or(alone: Member, process_group: dist.ProcessGroup | None) -> Member:
    if not is_distributed():
        return alone
    return Member(dist.get_rank(process_group), dist.get_world_size(process_group))


def _started(
    session: Session, config: ClientConfig, process_group: dist.ProcessGroup | None, live_wait_s: float
) -> Session:
    """Starts the session on rank 0 and broadcasts it, or the failure: no rank is left waiting for the broadcast."""
    told: list[Any] = [InternalError("rank 0 could not start the session; its traceback says why")]
    try:
        if not is_distributed() or dist.get_rank(process_group) == 0:
            told[0] = _asked(session, config, live_wait_s)
    except ShardbookError as error:
        told[0] = error
    finally:
        if is_distributed() and dist.get_world_size(process_group) > 1:
            source = 0 if process_group is None else dist.get_global_rank(process_group, 0)
            dist.broadcast_object_list(told, src=source, group=process_group)
    if isinstance(told[0], ShardbookError):
        raise told[0]
    started: Session = told[0]
    return started


def _asked(session: Session, config: ClientConfig, live_wait_s: float) -> Session:
    if session.server is None:
        return session
    client = Client(session.server, token=config.token, timeout_s=config.timeout_s)
    try:
        return start_session(session, client, wait_s=live_wait_s, deadline_s=config.outage_first_s)
    except ShardbookError as error:
        if not is_outage(error):
            raise
        _LOG.warning("%s: the Shardbook server does not answer; saves stay unregistered until it does", error)
        return replace(session, number=0)
