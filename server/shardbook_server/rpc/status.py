"""The wire form of an error: a ``google.rpc.Status`` small enough for gRPC's metadata limit.

HTTP/2 headers beyond 8 KiB are refused by the receiver, and then the client sees an INTERNAL error of the transport
instead of ours. The status travels twice, as text (percent-encoded) and as details (in base64), so both are bounded.
"""

from __future__ import annotations

from typing import Final

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from shardbook.core import limits
from shardbook.errors import DOMAIN, FieldViolation, ShardbookError

#: Most bytes of the whole status; base64 makes 5,464 characters of it.
MAX_STATUS_BYTES: Final = 4096
#: Most bytes of the status once ErrorInfo is in it, so that field paths still find room.
_MAX_INFO_BYTES: Final = 3584
#: Most characters of the percent-encoded message.
_MAX_MESSAGE_CHARS: Final = 1536
_MAX_FIELD_BYTES: Final = 120
_MAX_DESCRIPTION_BYTES: Final = 240
_MAX_VALUE_BYTES: Final = 2048


def status_code(error: ShardbookError) -> grpc.StatusCode:
    """Returns the gRPC status of an error; UNKNOWN for kinds that only a client raises."""
    return grpc.StatusCode[error.status]


def rich_status(error: ShardbookError, request_id: str = "") -> status_pb2.Status:
    """Returns the status with ErrorInfo always, BadRequest and RetryInfo where they apply.

    Violations are cut at 50 and where the size ends; ErrorInfo's metadata then says ``truncated`` and how many there
    were.
    """
    status = status_pb2.Status(code=status_code(error).value[0], message=_message(error.message))
    retry = _retry_info(error)
    violations = [_violation(v) for v in error.violations[: limits.MAX_VIOLATIONS]]
    metadata = {key: _cut(value, _MAX_VALUE_BYTES) for key, value in error.metadata.items()}
    if request_id:
        metadata["request_id"] = request_id
    info = error_details_pb2.ErrorInfo(domain=DOMAIN, reason=error.reason)
    room = _MAX_INFO_BYTES - status.ByteSize() - _packed_bytes(info) - _packed_bytes(retry)
    cut = False
    # Smallest first: one long list of hosts must not push out the rest.
    for key, value in sorted(metadata.items(), key=lambda item: len(item[0]) + len(item[1])):
        size_bytes = len(key.encode()) + len(value.encode()) + 8
        if size_bytes <= room:
            room -= size_bytes
            info.metadata[key] = value
        else:
            cut = True
    room += MAX_STATUS_BYTES - _MAX_INFO_BYTES - _TRUNCATED_BYTES
    bad_request = error_details_pb2.BadRequest()
    for violation in violations:
        room -= violation.ByteSize() + 4
        if room < _packed_bytes(error_details_pb2.BadRequest()):
            break
        bad_request.field_violations.append(violation)
    if cut or len(bad_request.field_violations) < len(error.violations):
        info.metadata["truncated"] = "true"
        info.metadata["violation_count"] = str(len(error.violations))
    for detail in (info, bad_request if bad_request.field_violations else None, retry):
        if detail is not None:
            status.details.add().Pack(detail)
    return status


#: Room kept for ``truncated`` and ``violation_count``.
_TRUNCATED_BYTES: Final = 64


def _retry_info(error: ShardbookError) -> error_details_pb2.RetryInfo | None:
    if error.retry_delay_s is None:
        return None
    delay = Duration()
    delay.FromMilliseconds(max(0, round(error.retry_delay_s * 1000)))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def _violation(violation: FieldViolation) -> error_details_pb2.BadRequest.FieldViolation:
    return error_details_pb2.BadRequest.FieldViolation(
        field=_cut(violation.field, _MAX_FIELD_BYTES), description=_cut(violation.description, _MAX_DESCRIPTION_BYTES)
    )


def _packed_bytes(message: Message | None) -> int:
    """Bytes that a detail takes in a status, its type's URL included."""
    if message is None:
        return 0
    return message.ByteSize() + len(message.DESCRIPTOR.full_name) + len("type.googleapis.com/") + 12


def _message(text: str) -> str:
    """Cuts a message to what it may take percent-encoded."""
    raw = _cut(text, _MAX_MESSAGE_CHARS).encode()
    used = 0
    for at, byte in enumerate(raw):
        used += 1 if 0x20 <= byte < 0x7F and byte != 0x25 else 3
        if used > _MAX_MESSAGE_CHARS:
            return raw[: at - 9].decode("utf-8", "ignore") + "..."
    return raw.decode()


def _cut(text: str, limit_bytes: int) -> str:
    """Cuts a text to a size in UTF-8; lone surrogates, which protobuf has no form for, are escaped."""
    raw = text.encode("utf-8", "backslashreplace")
    if len(raw) <= limit_bytes:
        return raw.decode()
    return raw[: limit_bytes - 3].decode("utf-8", "ignore") + "..."
