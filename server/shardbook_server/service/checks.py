"""Checks of single values that requests carry; every refusal names its field."""

from __future__ import annotations

from shardbook.core import limits
from shardbook.core.names import DEFAULT_PART, PartName, RunName, check_segment
from shardbook.core.table import TensorTable, printable
from shardbook.core.texts import encode_name
from shardbook.core.uris import check_no_credentials, check_stays_inside
from shardbook.errors import InvalidArgumentError

#: Largest session number that an attempt may be recorded with.
MAX_RECORDED_SESSION = 2**62
#: End of the year 9999, microseconds since the epoch: the last moment that a timestamp can say.
LATEST_TIME_US = 253_402_300_799_999_999

#: No job has been running for longer than thirty years, microseconds.
LONGEST_AGE_US = 30 * 366 * 86_400_000_000


def check_int(value: int, field: str, *, smallest: int = 0, largest: int = limits.INT64_MAX) -> int:
    """Returns ``value`` when it lies within ``smallest`` and ``largest``."""
    if not smallest <= value <= largest:
        raise InvalidArgumentError(f"{value} is not between {smallest} and {largest}", field=field)
    return value


def check_rank(rank: int, world_size: int, field: str) -> int:
    """Returns ``rank`` when it is one of ``world_size`` ranks."""
    if not 0 <= rank < world_size:
        raise InvalidArgumentError(
            f"rank {rank} is not one of the {world_size} that take part", reason="RANK_OUT_OF_RANGE", field=field
        )
    return rank


def check_size(payload: bytes, field: str, limit_bytes: int) -> bytes:
    """Returns ``payload`` when it has at most ``limit_bytes`` bytes."""
    if len(payload) > limit_bytes:
        raise InvalidArgumentError(
            f"{len(payload)} bytes, the limit is {limit_bytes}", reason="LIMIT_EXCEEDED", field=field
        )
    return payload


def check_part(run: str, part: str) -> PartName:
    """Returns the (run, part) that two request fields name; an empty part is the default one."""
    return PartName(RunName.parse(run, "run"), check_segment(part or DEFAULT_PART, "part"))


def check_text(text: str, field: str, limit_bytes: int) -> str:
    """Returns ``text`` when it is short, printable on one line, and has a UTF-8 form."""
    if not text.isprintable():
        raise InvalidArgumentError(f"{text[:80]!a} has control or formatting characters", field=field)
    if len(text.encode()) > limit_bytes:
        raise InvalidArgumentError(
            f"{len(text.encode())} bytes, the limit is {limit_bytes}", reason="LIMIT_EXCEEDED", field=field
        )
    return text


def check_label(text: str, field: str) -> str:
    """Returns ``text`` when it may be a host, user or job id; empty is fine."""
    if len(text) > limits.MAX_LABEL_CHARS:
        raise InvalidArgumentError(
            f"{len(text)} characters, the limit is {limits.MAX_LABEL_CHARS}", reason="LIMIT_EXCEEDED", field=field
        )
    return check_text(text, field, 4 * limits.MAX_LABEL_CHARS)


def prose(text: str, limit_chars: int) -> str:
    """Returns a person's or program's words made storable: unprintable characters escaped, the rest cut off.

    A rank that reports why it failed must not be refused because its message holds a strange character.
    """
    kept = text[:limit_chars]
    shown = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in kept)
    return shown[:limit_chars]


def check_location(location: str, field: str) -> str:
    """Returns ``location`` when it is a place that may be stored: no credentials, no way out, not empty."""
    if not location:
        raise InvalidArgumentError("a location is needed", field=field)
    # First: what other checks refuse they repeat.
    check_no_credentials(location, field)
    check_text(location, field, limits.MAX_LOCATION_BYTES)
    return check_stays_inside(location, field)


def check_prefix(prefix: str, field: str) -> str:
    """Returns ``prefix`` when it is empty or a directory below the location."""
    check_text(prefix, field, limits.MAX_LOCATION_BYTES)
    if prefix and any(segment in ("", ".", "..") for segment in prefix.split("/")):
        raise InvalidArgumentError("a prefix is a relative directory without a trailing slash", field=field)
    return prefix


def check_fqns(table: TensorTable) -> None:
    """Refuses a table with a name beyond what is kept; the codec reads any, so that every directory can be loaded.

    Raises:
        InvalidArgumentError: An fqn is longer; ``metadata`` has the limit.
    """
    for fqn in table.fqns:
        # No character takes more than four bytes.
        if len(fqn) > limits.MAX_FQN_BYTES // 4 and (size_bytes := len(encode_name(fqn))) > limits.MAX_FQN_BYTES:
            raise InvalidArgumentError(
                f"the fqn {printable(fqn)!r} has {size_bytes} bytes, the limit is {limits.MAX_FQN_BYTES}",
                reason="LIMIT_EXCEEDED",
                metadata={"limit": str(limits.MAX_FQN_BYTES)},
            )
