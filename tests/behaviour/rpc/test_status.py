"""Errors on the wire: always typed, always small enough for gRPC."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from shardbook import errors
from shardbook.core import limits
from shardbook.errors import FieldViolation, InvalidArgumentError, RunBusyError, ShardbookError
from shardbook_server.rpc.status import MAX_STATUS_BYTES, rich_status, status_code


def _details(status: status_pb2.Status) -> dict[str, Message]:
    found: dict[str, Message] = {}
    for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
        for detail in status.details:
            message = kind()
            if detail.Unpack(message):
                found[kind.__name__] = message
    return found


def _percent_encoded_chars(text: str) -> int:
    return sum(1 if 0x20 <= byte < 0x7F and byte != 0x25 else 3 for byte in text.encode())


def test_an_error_keeps_reason_metadata_violations_and_delay() -> None:
    """Rule: what a client needs to raise the same error is in the status."""
    error = RunBusyError("busy", metadata={"host": "n1"}, retry_delay_s=1.5, field="run")
    status = rich_status(error, "id-1")
    details = _details(status)
    info, request, retry = details["ErrorInfo"], details["BadRequest"], details["RetryInfo"]
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert isinstance(request, error_details_pb2.BadRequest)
    assert isinstance(retry, error_details_pb2.RetryInfo)
    assert (9, "busy") == (status.code, status.message)
    assert (errors.DOMAIN, "RUN_BUSY") == (info.domain, info.reason)
    assert {"host": "n1", "request_id": "id-1"} == dict(info.metadata)
    assert [("run", "busy")] == [(v.field, v.description) for v in request.field_violations]
    assert 1500 == retry.retry_delay.ToMilliseconds()


def test_every_error_class_has_a_status() -> None:
    """Rule: no error of ours can fail to become a status."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ShardbookError)]
    assert len(kinds) > 20
    for kind in kinds:
        assert kind.status == status_code(kind("x")).name


@pytest.mark.parametrize("count", [0, 50, 51, 5_000])
def test_violations_are_cut_at_fifty(count: int) -> None:
    """Rule: at most 50 violations; more say `truncated` and how many there were."""
    violations = [FieldViolation(f"f[{i}]", "no") for i in range(count)]
    details = _details(rich_status(InvalidArgumentError("bad", violations=violations)))
    info = details["ErrorInfo"]
    assert isinstance(info, error_details_pb2.ErrorInfo)
    kept = details.get("BadRequest", error_details_pb2.BadRequest())
    assert isinstance(kept, error_details_pb2.BadRequest)
    assert min(count, limits.MAX_VIOLATIONS) == len(kept.field_violations)
    expected = {"truncated": "true", "violation_count": str(count)} if count > limits.MAX_VIOLATIONS else {}
    assert expected == dict(info.metadata)


texts = st.text(st.characters(), max_size=3000) | st.builds(lambda c, n: c * n, st.characters(), st.integers(0, 9000))


@given(
    message=texts,
    violations=st.lists(st.builds(FieldViolation, texts, texts), max_size=80),
    metadata=st.dictionaries(st.text("abcdefgh_", min_size=1, max_size=12), texts, max_size=8),
    delay_s=st.none() | st.floats(0, 100),
)
def test_any_error_stays_below_the_metadata_limit(
    message: str, violations: list[FieldViolation], metadata: dict[str, str], delay_s: float | None
) -> None:
    """Rule: text and details together stay below gRPC's 8 KiB of headers, whatever an error holds, surrogates too."""
    error = InvalidArgumentError(message, violations=violations, metadata=metadata, retry_delay_s=delay_s)
    status = rich_status(error, "r" * 64)
    details = _details(status)
    info = details["ErrorInfo"]
    assert isinstance(info, error_details_pb2.ErrorInfo)
    size_bytes = status.ByteSize()
    assert size_bytes <= MAX_STATUS_BYTES
    assert _percent_encoded_chars(status.message) + size_bytes * 4 / 3 < 7.5 * 1024
    assert "INVALID_ARGUMENT" == info.reason
    kept = details.get("BadRequest", error_details_pb2.BadRequest())
    assert isinstance(kept, error_details_pb2.BadRequest)
    lost = len(kept.field_violations) < len(violations) or any(key not in info.metadata for key in metadata)
    assert lost == ("truncated" in info.metadata and "truncated" not in metadata)
    assert ("RetryInfo" in details) == (delay_s is not None)
