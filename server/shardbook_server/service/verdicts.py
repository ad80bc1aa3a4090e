"""Small helpers of the batched writes."""

from __future__ import annotations

from shardbook.errors import AlreadyExistsError, InvalidArgumentError, ShardbookError


def about(error: InvalidArgumentError, field: str) -> InvalidArgumentError:
    """Returns the same error about ``field``: codecs do not know which field their payload came in."""
    return InvalidArgumentError(error.message, reason=error.reason, field=field, metadata=error.metadata)


def other_content(what: str, rank: int, field: str) -> ShardbookError:
    """Returns the error for a rank that said something else before."""
    return AlreadyExistsError(f"rank {rank} has {what} with other content before", field=field)
