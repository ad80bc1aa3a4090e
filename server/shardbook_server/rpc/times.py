"""Times and durations, as messages and as numbers."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from shardbook.core import limits
from shardbook.errors import InvalidArgumentError


def timestamp(time_us: int | None) -> Timestamp | None:
    """Returns a time, or None, which leaves the field unset."""
    if time_us is None:
        return None
    return Timestamp(seconds=time_us // 1_000_000, nanos=time_us % 1_000_000 * 1_000)


def microseconds(duration: Duration, field: str) -> int:
    """Returns a duration, microseconds; negative ones too, for whoever uses it to refuse.

    Raises:
        InvalidArgumentError: Its parts are no duration's.
    """
    nanos, is_mixed = duration.nanos, duration.seconds * duration.nanos < 0
    if is_mixed or abs(nanos) >= 1_000_000_000 or abs(duration.seconds) > limits.INT64_MAX // 10**9:
        raise InvalidArgumentError("this is no duration", field=field)
    return int(duration.seconds) * 1_000_000 + nanos // 1_000


def seconds(duration: Duration, field: str) -> float:
    """Returns a duration, seconds; raises InvalidArgumentError as ``microseconds`` does."""
    return microseconds(duration, field) / 1e6
