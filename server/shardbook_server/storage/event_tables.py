"""Tables of what happens in the catalogue, and of who follows it."""

from __future__ import annotations

from sqlalchemy import Column, ForeignKey, Index, Integer, LargeBinary, Table, Text

from shardbook_server.storage.columns import CLUSTERED, NEVER_REUSED, STRICT, Int64, Name, Small, metadata

#: Lifecycle only, never registrations. ``cursor`` comes from the one row of ``catalog``. ``alias`` is the name of the
#: one that was moved.
events = Table(
    "events",
    metadata,
    Column("cursor", Int64, primary_key=True, autoincrement=False),
    Column("time_us", Int64, nullable=False),
    Column("kind", Small, nullable=False),
    Column("part_id", Int64, nullable=False),
    Column("checkpoint_id", Int64, nullable=False),
    Column("alias", Text),
    **STRICT,
)

#: What several watchers work on together: which checkpoints, and the event that they have come to.
subscriptions = Table(
    "subscriptions",
    metadata,
    Column("id", Int64, primary_key=True),
    Column("name", Name, nullable=False, unique=True),
    Column("parent", Text, nullable=False),
    Column("filter", Text, nullable=False),
    Column("cursor", Int64, nullable=False),
    Column("done_count", Int64, nullable=False),
    Column("create_time_us", Int64, nullable=False),
    **NEVER_REUSED,
)

#: One watcher's work on a checkpoint; none for what is done. ``due_time_us`` is when the lease of one that runs ends,
#: when one that waits is tried again, and when one failed for good. ``claim`` is a UUID that its holder made.
claims = Table(
    "claims",
    metadata,
    Column("subscription_id", ForeignKey("subscriptions.id"), primary_key=True, autoincrement=False),
    Column("checkpoint_id", ForeignKey("checkpoints.id"), primary_key=True, autoincrement=False),
    Column("claim", LargeBinary(16), nullable=False),
    Column("state", Small, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("due_time_us", Int64, nullable=False),
    Column("holder", Text, nullable=False),
    Column("failure", Text, nullable=False),
    Index("ix_claims_due", "subscription_id", "state", "due_time_us"),
    # Whether somebody works on a checkpoint.
    Index("ix_claims_checkpoint_id", "checkpoint_id"),
    **CLUSTERED,
)
