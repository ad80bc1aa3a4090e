"""Times of the catalogue, as messages."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp


def timestamp(time_us: int | None) -> Timestamp | None:
    """Returns a time, or None, which leaves the field unset."""
    if time_us is None:
        return None
    return Timestamp(seconds=time_us // 1_000_000, nanos=time_us % 1_000_000 * 1_000)
