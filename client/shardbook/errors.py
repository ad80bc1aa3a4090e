"""Every error that Shardbook raises on purpose, on both sides of the wire.

::

    ShardbookError
    ├── InvalidArgumentError            INVALID_ARGUMENT     bad input, names the field
    │   ├── UnsupportedMetadataError    (client only)        metadata that has no exact wire form
    │   ├── UnsupportedWriterError      (client only)        a storage writer that cannot be fenced
    │   └── UnsupportedPlannerError     (client only)        a planner that plans globally
    ├── NotFoundError                   NOT_FOUND
    ├── AlreadyExistsError              ALREADY_EXISTS       same key, other content
    ├── FailedPreconditionError         FAILED_PRECONDITION
    │   ├── SessionFencedError          SESSION_FENCED       a later session holds the run
    │   ├── SessionUnknownError         SESSION_UNKNOWN
    │   ├── RunBusyError                RUN_BUSY             another job writes the run
    │   ├── CheckpointClosedError       CHECKPOINT_CLOSED
    │   ├── RanksMissingError           RANKS_MISSING
    │   ├── RankFailedError             RANK_FAILED
    │   ├── EpochChangedError           EPOCH_CHANGED        a cursor of a database that was put back since
    │   ├── CursorExpiredError          CURSOR_EXPIRED       a cursor whose events are not kept any more
    │   ├── ClaimLostError              CLAIM_LOST           another watcher has the checkpoint
    │   ├── CheckpointMismatchError     (client only)        a checkpoint that does not fit the state dict
    │   └── InvalidGeometryError        GEOMETRY_*           overlap, hole, out of bounds, disagreement
    ├── AbortedError                    ABORTED              somebody changed it since it was read
    ├── ResourceExhaustedError          RESOURCE_EXHAUSTED   a limit, named
    ├── UnavailableError                UNAVAILABLE          retry later
    ├── DeadlineExceededError           DEADLINE_EXCEEDED
    ├── InternalError                   INTERNAL             a bug, always
    ├── UnregisteredError               (client only)        strict=True and the service did not record the save
    ├── CorruptManifestError            (client only)        a file of a checkpoint directory does not parse
    ├── CorruptDataError                (client only)        a data file is not what the metadata says
    ├── StorageError                    (client only)        a filesystem failed in words of its own; an OSError too
    ├── SaveProcessError                (client only)        the process of saves in the background is gone
    └── ForkedClientError               (client only)        a client used in a forked child

The class is chosen by ErrorInfo reason, else by status; never by message text. Errors are picklable and
their message names the next command where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

# Public here.
from shardbook._mismatches import Mismatch as Mismatch  # noqa: PLC0414
from shardbook._mismatches import MismatchKind as MismatchKind  # noqa: PLC0414

#: Domain of every google.rpc.ErrorInfo that Shardbook sends.
DOMAIN = "shardbook"


@dataclass(frozen=True)
class FieldViolation:
    """One field of a request and what is wrong with it.

    Attributes:
        field: Path in the request, such as ``registration.rank``.
        description: What is wrong, for people.
    """

    field: str
    description: str


class ShardbookError(Exception):
    """Root of every error raised on purpose.

    Attributes:
        reason: UPPER_SNAKE reason, what programs branch on.
        violations: Fields at fault; empty when no field is.
        metadata: Further facts by name, as in ``google.rpc.ErrorInfo.metadata``.
        retry_delay_s: Seconds after which a retry makes sense; None when it does not.
    """

    #: Name of the gRPC status, such as ``INVALID_ARGUMENT``.
    status: ClassVar[str] = "UNKNOWN"
    #: Reason used when none is given.
    default_reason: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        field: str | None = None,
        violations: Sequence[FieldViolation] = (),
        metadata: Mapping[str, str] | None = None,
        retry_delay_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.violations = tuple(violations)
        if field is not None:
            self.violations += (FieldViolation(field, message),)
        self.metadata = dict(metadata or {})
        self.retry_delay_s = retry_delay_s

    def __reduce__(self) -> tuple[object, ...]:
        return (
            _rebuild,
            (type(self), self.message, self.reason, self.violations, self.metadata, self.retry_delay_s),
        )

    def within(self, prefix: str) -> ShardbookError:
        """Returns the same error with every field path below ``prefix``."""
        moved = [FieldViolation(f"{prefix}.{v.field}" if v.field else prefix, v.description) for v in self.violations]
        return _rebuild(type(self), self.message, self.reason, tuple(moved), self.metadata, self.retry_delay_s)


def _rebuild(
    cls: type[ShardbookError],
    message: str,
    reason: str,
    violations: tuple[FieldViolation, ...],
    metadata: dict[str, str],
    retry_delay_s: float | None,
) -> ShardbookError:
    return cls(message, reason=reason, violations=violations, metadata=metadata, retry_delay_s=retry_delay_s)


class InvalidArgumentError(ShardbookError):
    """A request that no state of the system would make valid."""

    status = "INVALID_ARGUMENT"
    default_reason = "INVALID_ARGUMENT"


class UnsupportedMetadataError(InvalidArgumentError):
    """Metadata with no exact wire form; the message names the type and the fqn."""

    default_reason = "UNSUPPORTED_METADATA"


class UnsupportedWriterError(InvalidArgumentError):
    """A storage writer whose files cannot be fenced or located."""

    default_reason = "UNSUPPORTED_WRITER"


class UnsupportedPlannerError(InvalidArgumentError):
    """A save planner that needs the global plan, or caches it."""

    default_reason = "UNSUPPORTED_PLANNER"


class NotFoundError(ShardbookError):
    """The named thing does not exist."""

    status = "NOT_FOUND"
    default_reason = "NOT_FOUND"


class AlreadyExistsError(ShardbookError):
    """The same key was written before with other content."""

    status = "ALREADY_EXISTS"
    default_reason = "ALREADY_EXISTS"


class FailedPreconditionError(ShardbookError):
    """The request is well formed, and the state of the system refuses it."""

    status = "FAILED_PRECONDITION"
    default_reason = "FAILED_PRECONDITION"


class SessionFencedError(FailedPreconditionError):
    """A later session holds the (run, part); this job must not write it any more."""

    default_reason = "SESSION_FENCED"


class SessionUnknownError(FailedPreconditionError):
    """No session has this number and incarnation."""

    default_reason = "SESSION_UNKNOWN"


class RunBusyError(FailedPreconditionError):
    """Another job's lease on the (run, part) is alive; ``metadata`` has host, user, last_seen."""

    default_reason = "RUN_BUSY"


class CheckpointClosedError(FailedPreconditionError):
    """The attempt is committed, failed or expired and takes no more writes."""

    default_reason = "CHECKPOINT_CLOSED"


class RanksMissingError(FailedPreconditionError):
    """Ranks did not register in time; the first 50 and the count are named."""

    default_reason = "RANKS_MISSING"


class RankFailedError(FailedPreconditionError):
    """A rank said that it cannot finish; ``metadata`` has rank, host, phase."""

    default_reason = "RANK_FAILED"


class EpochChangedError(FailedPreconditionError):
    """The database was put back since the cursor was told: a watcher has to begin anew."""

    default_reason = "EPOCH_CHANGED"


class CursorExpiredError(FailedPreconditionError):
    """Events behind the cursor are not kept any more: a watcher has to begin anew."""

    default_reason = "CURSOR_EXPIRED"


class ClaimLostError(FailedPreconditionError):
    """The lease of a claim ended and another watcher took the checkpoint, or the subscription is gone."""

    default_reason = "CLAIM_LOST"


class InvalidGeometryError(FailedPreconditionError):
    """The ranks' chunks do not make whole tensors; tensor and ranks are named.

    Reasons: ``GEOMETRY_OUT_OF_BOUNDS``, ``GEOMETRY_OVERLAP``, ``GEOMETRY_HOLE``, ``GEOMETRY_DISAGREEMENT``.
    """

    default_reason = "GEOMETRY_INVALID"


#: Mismatches that a message names; the error has all of them.
_TOLD = 10


class CheckpointMismatchError(FailedPreconditionError, RuntimeError, ValueError):
    """A checkpoint that does not fit the state dict, with everything that does not; nothing was read.

    A RuntimeError and a ValueError too, which is what DCP raises of one missing key and of one that has another size.

    Attributes:
        mismatches: Every entry that does not fit, in the order of the state dict.
    """

    default_reason = "CHECKPOINT_MISMATCH"

    def __init__(self, mismatches: Sequence[Mismatch], hint: str = "") -> None:
        self.mismatches = tuple(mismatches)
        self.hint = hint
        told = [str(mismatch) for mismatch in self.mismatches[:_TOLD]]
        if len(self.mismatches) > _TOLD:
            told.append(f"and {len(self.mismatches) - _TOLD} more, see .mismatches")
        super().__init__(
            f"the checkpoint does not fit the state dict: {'; '.join(told)}{'. ' if hint else ''}{hint}",
            metadata={"mismatch_count": str(len(self.mismatches))},
        )

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.mismatches, self.hint)

    def of(self, kind: MismatchKind) -> tuple[str, ...]:
        """Returns the names that differ in one way."""
        return tuple(mismatch.fqn for mismatch in self.mismatches if mismatch.kind is kind)


class AbortedError(ShardbookError):
    """What was to be changed is not as the caller saw it; read it again, and decide again."""

    status = "ABORTED"
    default_reason = "ETAG_MISMATCH"


class ResourceExhaustedError(ShardbookError):
    """A limit was reached; the message names it."""

    status = "RESOURCE_EXHAUSTED"
    default_reason = "RESOURCE_EXHAUSTED"


class UnavailableError(ShardbookError):
    """The service cannot answer now; retrying is safe."""

    status = "UNAVAILABLE"
    default_reason = "UNAVAILABLE"


class DeadlineExceededError(ShardbookError):
    """No answer in time; the operation may or may not have happened."""

    status = "DEADLINE_EXCEEDED"
    default_reason = "DEADLINE_EXCEEDED"


class UnauthenticatedError(ShardbookError):
    """No token, or one that is not valid."""

    status = "UNAUTHENTICATED"
    default_reason = "UNAUTHENTICATED"


class PermissionDeniedError(ShardbookError):
    """The token does not allow the call."""

    status = "PERMISSION_DENIED"
    default_reason = "PERMISSION_DENIED"


class InternalError(ShardbookError):
    """A bug in Shardbook."""

    status = "INTERNAL"
    default_reason = "INTERNAL"


class UnregisteredError(ShardbookError):
    """``strict=True`` and the save is on storage but not in the catalogue; run ``shardbook sync DIR``."""

    default_reason = "UNREGISTERED"


class CorruptManifestError(ShardbookError):
    """A manifest or registration record does not parse; nothing in it is ever executed."""

    default_reason = "CORRUPT_MANIFEST"


class CorruptDataError(ShardbookError):
    """A data file is damaged, ends early or holds something else than the metadata says; ``metadata`` may have the
    ``file``, relative to the checkpoint's directory, and the ``offset`` of the item in it, bytes.
    """

    default_reason = "CORRUPT_DATA"


class StorageError(ShardbookError, OSError):
    """A filesystem raised something that is no OSError, as libraries behind fsspec do; ``__cause__`` is what it was.

    An OSError too, so that whoever bears with a failing disk bears with a failing store.
    """

    default_reason = "STORAGE_FAILED"


class SaveProcessError(ShardbookError):
    """The process that saves in the background ended, or did not begin; ``metadata`` has ``exit_code``.

    What it was saving may be incomplete. The next save starts another process.
    """

    default_reason = "SAVE_PROCESS_DIED"


class ForkedClientError(ShardbookError):
    """A client made before ``fork`` was used in the child, where gRPC would hang."""

    default_reason = "FORKED_CLIENT"


_BY_REASON: dict[str, type[ShardbookError]] = {
    cls.default_reason: cls
    for cls in (
        UnsupportedMetadataError,
        SessionFencedError,
        SessionUnknownError,
        RunBusyError,
        CheckpointClosedError,
        RanksMissingError,
        RankFailedError,
        EpochChangedError,
        CursorExpiredError,
        ClaimLostError,
        InvalidGeometryError,
    )
}
_BY_STATUS: dict[str, type[ShardbookError]] = {
    cls.status: cls
    for cls in (
        InvalidArgumentError,
        NotFoundError,
        AlreadyExistsError,
        FailedPreconditionError,
        AbortedError,
        ResourceExhaustedError,
        UnavailableError,
        DeadlineExceededError,
        UnauthenticatedError,
        PermissionDeniedError,
        InternalError,
    )
}


def error_class(status: str, reason: str) -> type[ShardbookError]:
    """Returns the class for a gRPC status name and an ErrorInfo reason."""
    if reason.startswith("GEOMETRY_"):
        return InvalidGeometryError
    return _BY_REASON.get(reason) or _BY_STATUS.get(status, ShardbookError)
