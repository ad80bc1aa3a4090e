"""A session: one incarnation of a job that writes to a run, as every rank of it knows it.

Nothing here talks to torch: a controller process may start a session and hand it to its workers.
"""

from __future__ import annotations

import getpass
import logging
import os
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from typing import Final

from shardbook.client import Client
from shardbook.config import ClientConfig, Mode
from shardbook.core import limits
from shardbook.core.lineage import LineageKind, Origin, check_end
from shardbook.core.names import DEFAULT_PART, CheckpointName, PartName, RunName, check_incarnation
from shardbook.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    RunBusyError,
    ShardbookError,
)
from shardbook.v1 import registration_pb2 as pb

_LOG = logging.getLogger(__name__)

#: Where schedulers say which job this is, the most telling first. A restarted job keeps its id.
_JOB_ID_VARIABLES: Final = (
    "SHARDBOOK_JOB_ID",
    "SLURM_JOB_ID",
    "TORCHELASTIC_RUN_ID",
    "PBS_JOBID",
    "LSB_JOBID",
    "RAY_JOB_ID",
)
#: Names that Kubernetes operators and job templates give the job; meaningful inside a cluster only.
_KUBERNETES_VARIABLES: Final = ("JOBSET_NAME", "JOB_NAME", "KUBERNETES_JOB_NAME")
#: How often a job looks again when another one starts a session at the same moment.
_LOOKS: Final = 8
#: torchrun's rendezvous id when nobody chose one: two unrelated jobs may both have it.
_NO_RUN_ID: Final = "none"


class OnLive(StrEnum):
    """What ``init`` does when another job's lease on the run is alive."""

    #: Refuse with RunBusyError, which says who holds the run.
    FAIL = "fail"
    #: Wait for the lease to end, then refuse.
    WAIT = "wait"
    #: Fence the live job and take the run.
    TAKEOVER = "takeover"


_ON_LIVE: Final = {
    OnLive.FAIL: pb.ON_LIVE_FAIL,
    OnLive.WAIT: pb.ON_LIVE_WAIT,
    OnLive.TAKEOVER: pb.ON_LIVE_TAKEOVER,
}


@dataclass(frozen=True)
class Session:
    """One incarnation of a job writing to a (run, part). Immutable, picklable, without credentials.

    A session belongs to one incarnation of a job: a restarted job starts another one, it does not carry this one over.

    Attributes:
        run: ``project/run``.
        part: Part that saves go to unless they name one.
        number: The server's number; 0 when no server handed one out (mode offline, or an outage at the start, in
            which case the first save that reaches the server asks for one).
        incarnation: The 16 bytes of a UUID; with the number, the session's identity.
        job_id: The scheduler's id of the job; may be empty.
        server: Address of the server; None when there is none.
        mode: How far saves depend on the server.
        on_live: What to do when another job's lease is alive, for sessions of other parts.
        resumed_from: Checkpoint that the job resumed from; may be empty.
        origins: Where the checkpoints come from that the session is to save to its part, as ``init`` was told.
        latest: Resource name of what ``@latest`` meant when the session started; empty when nothing was committed.
        lease_ttl_s: The lease ends this long after the last sign of life, seconds; 0 without a number.
    """

    run: str
    part: str = DEFAULT_PART
    number: int = 0
    incarnation: bytes = b""
    job_id: str = ""
    server: str | None = None
    mode: Mode = Mode.ONLINE
    on_live: OnLive = OnLive.FAIL
    resumed_from: str = ""
    origins: tuple[Origin, ...] = ()
    latest: str = ""
    lease_ttl_s: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", RunName.parse(self.run).ref)
        _ = PartName(self.run_name, self.part)
        check_incarnation(self.incarnation)
        if not 0 <= self.number <= limits.INT64_MAX:
            raise InvalidArgumentError(f"session number {self.number}", field="number")

    def __repr__(self) -> str:
        part = "" if self.part == DEFAULT_PART else f":{self.part}"
        incarnation = self.incarnation.hex()[:12]
        return f"Session('{self.run}{part}', number={self.number}, incarnation={incarnation}, mode={self.mode})"

    @property
    def run_name(self) -> RunName:
        """The run."""
        return RunName.parse(self.run)

    def start_request(self, part: str) -> pb.StartSessionRequest:
        """Returns the request that starts this incarnation's session of ``part``. Asking twice is asking once."""
        return pb.StartSessionRequest(
            run=str(self.run_name),
            part=part,
            incarnation=self.incarnation,
            job_id=self.job_id,
            on_live=_ON_LIVE[self.on_live],
            resumed_from=self.resumed_from if part == self.part else "",
            host=host_name(),
            user=user_name(),
        )


def new_session(
    run: str,
    config: ClientConfig,
    *,
    part: str = DEFAULT_PART,
    resumed_from: str | None = None,
    fine_tuned_from: str | None = None,
    on_live: str = OnLive.FAIL,
    job_id: str | None = None,
) -> Session:
    """Returns a session of a new incarnation that no server knows yet.

    Raises:
        InvalidArgumentError: A name is none, or ``on_live`` is unknown.
    """
    if on_live not in set(OnLive):
        raise InvalidArgumentError(
            f"on_live is {on_live!r}, not one of {', '.join(map(repr, map(str, OnLive)))}", field="on_live"
        )
    told = ((LineageKind.RESUMED_FROM, resumed_from), (LineageKind.FINE_TUNED_FROM, fine_tuned_from))
    return Session(
        run=run,
        part=part,
        incarnation=uuid.uuid4().bytes,
        job_id=label(find_job_id(os.environ) if job_id is None else job_id),
        server=config.server if config.mode is Mode.ONLINE else None,
        mode=config.mode,
        on_live=OnLive(on_live),
        resumed_from=resumed_from or "",
        origins=tuple(_origin(kind, source) for kind, source in told if source),
    )


def _origin(kind: LineageKind, source: str) -> Origin:
    try:
        return Origin(kind, source)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(error.message, reason=error.reason, field=kind.label) from error


def _named(session: Session, client: Client, latest: str, deadline_s: float) -> tuple[Origin, ...]:
    """Returns the session's origins by names that mean the same for ever, as far as the server knows them.

    A rollback has moved ``latest`` to what the job resumed from. What the server does not know is told as it was.
    """
    named = []
    for origin in session.origins:
        source = origin.source
        if origin.kind is LineageKind.RESUMED_FROM:
            source = latest or source
        elif isinstance(meant := check_end(source, "source"), CheckpointName):
            try:
                source = client.get_checkpoint(meant, deadline_s=deadline_s).name
            except ShardbookError as error:
                _LOG.warning("%s %s: recorded by that name, for %s", origin.kind.words, meant.ref, error)
        named.append(Origin(origin.kind, source))
    return tuple(named)


def start_session(session: Session, client: Client, *, wait_s: float, deadline_s: float) -> Session:
    """Returns ``session`` with the number that the server gave it.

    Args:
        session: A new one.
        client: The server.
        wait_s: With OnLive.WAIT, how long to wait for another job's lease to end, seconds.
        deadline_s: Bound on one call, seconds, its wait not counted.

    Raises:
        RunBusyError: Another job's lease is alive.
        ShardbookError: What the server answered, or that it did not.
    """
    request = session.start_request(session.part)
    began_s = time.monotonic()
    end_s = began_s + wait_s
    while True:
        one_wait_s = 0.0
        if session.on_live is OnLive.WAIT:
            one_wait_s = min(limits.MAX_WAIT_S, max(0.0, end_s - time.monotonic()))
            request.wait.FromTimedelta(timedelta(seconds=one_wait_s))
        try:
            answer = ask_for_session(client, request, began_s, deadline_s=deadline_s + one_wait_s)
        except RunBusyError:
            if session.on_live is not OnLive.WAIT or time.monotonic() >= end_s:
                raise
            time.sleep(min(1.0, max(0.0, end_s - time.monotonic())))  # a server that did not wait is not hammered
        else:
            return replace(
                session,
                number=answer.session,
                latest=answer.latest,
                origins=_named(session, client, answer.latest, deadline_s),
                lease_ttl_s=answer.lease_ttl.ToTimedelta().total_seconds(),
            )


def ask_for_session(
    client: Client, request: pb.StartSessionRequest, began_s: float, *, deadline_s: float | None = None
) -> pb.StartSessionResponse:
    """Starts a session, or finds the one that the incarnation holds.

    However late the request is made, and however long it is on its way, it fences no incarnation of the job that began
    later: it says what its sender knew and how old the incarnation is, see decision 0016.

    Args:
        client: The server.
        request: What ``Session.start_request`` returned; ``known_session`` and ``age`` are set here.
        began_s: When the incarnation began, by ``time.monotonic``.
        deadline_s: Seconds for all; None gives every call the client's own deadline.

    Raises:
        SessionFencedError: A later incarnation of the job holds the run.
        ShardbookError: What the server answered, or that it did not.
    """
    end_s = None if deadline_s is None else time.monotonic() + deadline_s
    look_count = 0
    while True:
        look_count += 1
        left_s = None if end_s is None else max(0.001, end_s - time.monotonic())
        request.known_session = _current_session(client, request, left_s)
        request.age.FromTimedelta(timedelta(seconds=max(0.0, time.monotonic() - began_s)))
        left_s = None if end_s is None else max(0.001, end_s - time.monotonic())
        try:
            return client.start_session(request, deadline_s=left_s)
        except FailedPreconditionError as error:
            if error.reason != "SESSION_MOVED" or look_count >= _LOOKS:
                raise


def _current_session(client: Client, request: pb.StartSessionRequest, deadline_s: float | None) -> int:
    """Returns the number of the part's current session; 0 when there is none."""
    try:
        parts = client.get_run(request.run, deadline_s=deadline_s).parts
    except NotFoundError:
        return 0
    return max((part.session for part in parts if part.part == request.part), default=0)


def find_job_id(environ: Mapping[str, str]) -> str:
    """Returns the scheduler's id of the job that ``environ`` belongs to; empty when none says so."""
    for name in _JOB_ID_VARIABLES:
        value = environ.get(name, "").strip()
        if value and not (name == "TORCHELASTIC_RUN_ID" and value == _NO_RUN_ID):
            return value
    if environ.get("KUBERNETES_SERVICE_HOST"):
        for name in _KUBERNETES_VARIABLES:
            if value := environ.get(name, "").strip():
                return value
    return ""


def label(text: str) -> str:
    """Returns ``text`` as the server takes hosts, users and job ids: short and printable."""
    return "".join(char for char in text if char.isprintable())[: limits.MAX_LABEL_CHARS]


def host_name() -> str:
    """Returns this host's name, for people."""
    return label(socket.gethostname())


def user_name() -> str:
    """Returns who runs this process, for people."""
    try:
        return label(getpass.getuser())
    except (KeyError, OSError):  # containers often run under a uid that has no name
        return label(str(os.getuid()))
