"""Tables of what is kept: by whoever holds it, and by policies."""

from __future__ import annotations

from sqlalchemy import Column, ForeignKey, Table, Text

from shardbook_server.storage.columns import CLUSTERED, Int64, Name, metadata

#: Who needs a checkpoint for a while: it is not deleted meanwhile.
holds = Table(
    "holds",
    metadata,
    Column("checkpoint_id", ForeignKey("checkpoints.id"), primary_key=True, autoincrement=False),
    Column("holder", Name, primary_key=True),
    Column("create_time_us", Int64, nullable=False),
    Column("expire_time_us", Int64, nullable=False),
    **CLUSTERED,
)

#: What `prune` keeps when it is told nothing, as JSON. ``part`` is empty for the parts of a run without their own.
retention_policies = Table(
    "retention_policies",
    metadata,
    Column("run_id", ForeignKey("runs.id"), primary_key=True, autoincrement=False),
    Column("part", Name, primary_key=True),
    Column("policy", Text, nullable=False),
    Column("update_time_us", Int64, nullable=False),
    **CLUSTERED,
)
