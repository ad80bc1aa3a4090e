"""Times of messages as people and programs get them."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp


def datetime_of(stamp: Timestamp) -> datetime | None:
    """Returns a time in UTC; None where it is not set."""
    if stamp.seconds == 0 and stamp.nanos == 0:
        return None
    return stamp.ToDatetime(tzinfo=UTC)


def rfc3339(time: datetime | None) -> str | None:
    """Returns a time for JSON; None for none."""
    return None if time is None else time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
