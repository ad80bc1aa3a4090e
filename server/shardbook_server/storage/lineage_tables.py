"""Where checkpoints come from: the edges between them."""

from __future__ import annotations

from sqlalchemy import Column, ForeignKey, Index, LargeBinary, Table, text

from shardbook_server.storage.columns import NEVER_REUSED, Int64, Name, Small, metadata

#: Edges of lineage, from the older end (parent) to the younger one. ``name`` is empty where both ends are checkpoints
#: of the catalogue; else it stands for the one that is not. ``incarnation`` is of the job that told it with a commit.
lineage = Table(
    "lineage",
    metadata,
    Column("id", Int64, primary_key=True),
    Column("kind", Small, nullable=False),
    Column("parent_id", ForeignKey("checkpoints.id")),
    Column("child_id", ForeignKey("checkpoints.id")),
    Column("name", Name, nullable=False),
    Column("incarnation", LargeBinary(16)),
    Column("create_time_us", Int64, nullable=False),
    Index("ix_lineage_parent", "parent_id", "id"),
    Index("ix_lineage_child", "child_id", "id"),
    Index("ix_lineage_named", "name", sqlite_where=text("name <> ''"), postgresql_where=text("name <> ''")),
    # What a session has told already.
    Index(
        "ix_lineage_told",
        "incarnation",
        sqlite_where=text("incarnation IS NOT NULL"),
        postgresql_where=text("incarnation IS NOT NULL"),
    ),
    **NEVER_REUSED,
)
