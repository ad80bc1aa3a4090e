"""Names of entries as bytes, and back. Any ``str`` is a name, also one with NUL and lone surrogates."""

from __future__ import annotations

from shardbook.errors import InvalidArgumentError


def encode_name(name: str) -> bytes:
    """Returns a name in UTF-8 with lone surrogates passed through, so that every ``str`` has bytes."""
    return name.encode("utf-8", "surrogatepass")


def decode_name(content: bytes) -> str:
    """Returns the name that ``encode_name`` packed; raises InvalidArgumentError for other bytes."""
    try:
        return content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as exc:
        raise InvalidArgumentError(
            "malformed payload: a name is not UTF-8", reason="MALFORMED_PAYLOAD", field="payload"
        ) from exc
