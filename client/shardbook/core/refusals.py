"""What stands in the way of a change, in one wording: the service refuses with it, a dry run says it before."""

from __future__ import annotations

from shardbook.core.names import LATEST


def changed_since(what: str) -> str:
    """Returns why something with another etag is not changed."""
    return f"{what} was changed since it was read: read it again, then decide again"


def is_latest(ref: str) -> str:
    """Returns why what ``latest`` means is not deleted."""
    return f"{ref} is what @{LATEST} means, and what the next job would resume from; delete it with --force"


def is_protected(ref: str, alias: str) -> str:
    """Returns why what a protected alias means is not deleted."""
    return f"{ref} is what @{alias} means, which is protected: delete it with --force"
