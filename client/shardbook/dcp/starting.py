"""``init`` and ``close``: how a session is started and shared with every rank, and how it ends."""

from __future__ import annotations

import atexit
import logging
import os
import time
from dataclasses import dataclass, replace
from typing import Final

import torch.distributed as dist

from shardbook.breaker import is_outage
from shardbook.client import Client
from shardbook.config import ClientConfig, Mode
from shardbook.core.names import DEFAULT_PART
from shardbook.dcp._torch import group_timeout_s
from shardbook.dcp.agreement import agreed, from_rank
from shardbook.dcp.checksums import check_available
from shardbook.dcp.runtime import Member, Runtime, is_distributed, replace_current
from shardbook.dcp.session import OnLive, Session, new_session, start_session
from shardbook.errors import FailedPreconditionError, InvalidArgumentError, ShardbookError

_LOG = logging.getLogger(__name__)

#: Longest that ``on_live="wait"`` waits unless told otherwise, seconds.
DEFAULT_LIVE_WAIT_S: Final = 600.0


def init(
    run: str | None = None,
    *,
    part: str = DEFAULT_PART,
    resumed_from: str | None = None,
    fine_tuned_from: str | None = None,
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

    The ranks agree, by one number, that none of them has failed so far; rank 0 asks the server, then tells the others
    in one broadcast over the process group. That is the last collective of all: ``save``, ``async_save`` and ``load``
    run none. A server that is away is no reason not to train: the session begins without a number, and the first save
    that reaches the server asks for one.

    Args:
        run: ``project/run``; made when it is new.
        part: Part that saves go to unless they name one.
        resumed_from: Ref of the checkpoint that the job resumed from. After a rollback this moves ``@latest`` back to
            it, so that the next restart does not undo the rollback. The first checkpoint of the session that is
            committed says so, see ``shardbook lineage``.
        fine_tuned_from: What the job's weights come from: the ref of a checkpoint of any run, or the name or URL of
            something else. Said likewise; no reason for a session not to begin, be it there or not.
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
        InvalidArgumentError: An argument or setting is wrong, on this rank or on another one.
        SessionFencedError: The job was restarted after this ``init`` began, and the later incarnation holds the run.
        FailedPreconditionError: Several ranks, but neither a process group nor a session.
    """
    began_s = time.monotonic()

    def begin() -> _Beginning:
        config = _config(server, mode, session)
        check_available(config.checksum)
        close()  # a second init is a new incarnation; its own old lease must not stand in its way
        alone, is_shared = _place(process_group, session, rank, world_size)
        if session is not None:
            if run is not None and Session(run, incarnation=session.incarnation).run != session.run:
                raise InvalidArgumentError(f"the session belongs to {session.run}, not to {run}", field="session")
            return _Beginning(config, alone, is_shared, session)
        if run is None:
            raise InvalidArgumentError("name the run: init(run='project/run')", field="run")
        mine = new_session(
            run,
            config,
            part=part,
            resumed_from=resumed_from,
            fine_tuned_from=fine_tuned_from,
            on_live=on_live,
            job_id=job_id,
        )
        if mode is None and config.mode is Mode.OFFLINE and _member_or(alone, process_group).is_coordinator:
            _warn_of_no_server(mine.run)
        limit_s = min(live_wait_s, group_timeout_s(process_group) / 2) if is_distributed() else live_wait_s
        return _Beginning(config, alone, is_shared, mine, limit_s)

    if session is None:
        begun = agreed(begin, process_group)
        session = _started(begun.session, begun.config, process_group, begun.live_wait_s)
    else:
        begun = begin()
    place = _member_or(begun.alone, process_group)
    runtime = Runtime(session, begun.config, begun.alone, place, is_shared=begun.is_shared, began_s=began_s)
    runtime.start_keeping()
    replace_current(runtime)
    return session


@dataclass(frozen=True)
class _Beginning:
    """What one rank knows before any server was asked.

    Attributes:
        config: Its settings.
        alone: Its place without a process group.
        is_shared: Other ranks hold the session too.
        session: The session, carried over or not started yet.
        live_wait_s: How long to wait for another job's lease to end, seconds.
    """

    config: ClientConfig
    alone: Member
    is_shared: bool
    session: Session
    live_wait_s: float = 0.0


def close() -> None:
    """Ends this process's session: its leases end now, so another job may start at once. Also done at exit."""
    runtime = replace_current(None)
    if runtime is not None:
        runtime.close()


atexit.register(close)


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


def _warn_of_no_server(run: str) -> None:
    """Says what a forgotten variable costs, unless somebody chose to be without a server."""
    if not os.environ.get("SHARDBOOK_MODE"):
        _LOG.warning(
            "no Shardbook server is configured, so saves of %s are described in their directories only: export "
            "SHARDBOOK_SERVER as `shardbook-server serve` prints it, or SHARDBOOK_MODE=offline to be without one",
            run,
        )


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
    return from_rank(0, lambda: _asked(session, config, live_wait_s), process_group)


def _asked(session: Session, config: ClientConfig, live_wait_s: float) -> Session:
    if session.server is None:
        return session
    client = Client(session.server, token=config.token, timeout_s=config.timeout_s)
    try:
        return start_session(session, client, wait_s=live_wait_s, deadline_s=config.outage_first_s)
    except ShardbookError as error:
        if not is_outage(error):
            raise
        _LOG.warning(
            "the Shardbook server does not answer (%s): saves of %s stay in their directories until it does",
            error,
            session.run,
        )
        return replace(session, number=0)
