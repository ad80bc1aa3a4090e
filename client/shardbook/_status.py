"""Turns what gRPC raises into ``shardbook.errors``: by ErrorInfo reason, else by status, never by message text."""

from __future__ import annotations

from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from shardbook.errors import DOMAIN, FieldViolation, ShardbookError, error_class

_DETAILS_KEY: Final = "grpc-status-details-bin"
#: Statuses that gRPC's own machinery makes up and that mean what another one means to a caller.
_SAME_AS: Final = {"CANCELLED": "UNAVAILABLE"}


def error_from_rpc(error: grpc.RpcError, *, method: str, target: str) -> ShardbookError:
    """Returns the typed error for a failed call.

    Args:
        error: What gRPC raised; a call too, as every error of grpc's sync stack is.
        method: Name of the call, for the message.
        target: Address of the server, for the message.
    """
    code = getattr(error, "code", lambda: None)()
    name = code.name if isinstance(code, grpc.StatusCode) else "UNKNOWN"
    details = getattr(error, "details", lambda: None)() or ""
    status = _status_of(error)
    if status is not None:
        return _from_details(name, status.message or details, status)
    return _from_transport(name, details, method=method, target=target)


def _status_of(error: grpc.RpcError) -> status_pb2.Status | None:
    """Returns the rich status of a call, None when there is none or it does not parse."""
    metadata = getattr(error, "trailing_metadata", lambda: None)() or ()
    for key, value in metadata:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _from_details(status_name: str, message: str, status: status_pb2.Status) -> ShardbookError:
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    retry_delay_s: float | None = None
    for detail in status.details:
        if _unpack(detail, retry):
            retry_delay_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        elif not info.reason:
            _unpack(detail, info)
        _unpack(detail, bad_request)
    # Another domain's reasons (a proxy's) may collide with ours: only its status counts then.
    reason = info.reason if info.domain == DOMAIN else ""
    status_name = _SAME_AS.get(status_name, status_name)
    cls = error_class(status_name, reason)
    return cls(
        message,
        reason=reason or (status_name if cls is ShardbookError else None),
        violations=[FieldViolation(v.field, v.description) for v in bad_request.field_violations],
        metadata=dict(info.metadata),
        retry_delay_s=retry_delay_s,
    )


def _unpack(detail: Any, into: Message) -> bool:
    """Fills ``into`` from an Any of its type; False for another type and for bytes that do not parse."""
    try:
        return bool(detail.Unpack(into))
    except DecodeError:
        return False


def _from_transport(status_name: str, details: str, *, method: str, target: str) -> ShardbookError:
    """Returns the error for a call that no Shardbook handler answered: refused, timed out, cut, not known."""
    why = {
        "UNAVAILABLE": f"cannot reach a Shardbook server at {target}",
        "CANCELLED": f"the call {method} to {target} was cancelled",
        "DEADLINE_EXCEEDED": f"no answer to {method} from {target} in time; it may or may not have happened",
        "UNIMPLEMENTED": f"the server at {target} does not know {method}: it is older than this client, "
        "or not a Shardbook server",
    }.get(status_name, f"{method} failed at {target} with {status_name}")
    if status_name == "UNAVAILABLE":
        details += "; is `shardbook-server serve` running, and is SHARDBOOK_SERVER right?"
    mapped = _SAME_AS.get(status_name, status_name)
    cls = error_class(mapped, "")
    reason = status_name if cls is ShardbookError or mapped != status_name else None
    return cls(f"{why}: {details}" if details else why, reason=reason, metadata={"target": target, "method": method})
