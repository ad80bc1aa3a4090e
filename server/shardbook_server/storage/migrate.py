"""Brings a database's schema up to date, and refuses one that is not."""

from __future__ import annotations


def upgrade(url: str) -> str:
    """Creates or upgrades the schema at ``url`` under a lock; returns its revision."""
    raise NotImplementedError


def check(url: str) -> str:
    """Returns the revision of a schema that this release can serve.

    Raises:
        FailedPreconditionError: It is stale (reason ``SCHEMA_STALE``), missing, or too new (``SCHEMA_TOO_NEW``); the
            message names the command to run.
    """
    raise NotImplementedError
