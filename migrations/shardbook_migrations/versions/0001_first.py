"""The first schema."""

from __future__ import annotations

import os
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_NAME = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_SMALL = sa.SmallInteger().with_variant(sa.Integer(), "sqlite")
_STRICT: dict[str, Any] = {"sqlite_strict": True}
_CLUSTERED: dict[str, Any] = {"sqlite_strict": True, "sqlite_with_rowid": False}
_NEVER_REUSED: dict[str, Any] = {"sqlite_strict": True, "sqlite_autoincrement": True}


def upgrade() -> None:
    """Makes every table, and the rows that are there from the start."""
    _catalog()
    _runs()
    _content()
    _checkpoints()
    _staging()
    catalog = sa.table("catalog", *map(sa.column, ("id", "epoch", "cursor", "token_key", "reap_time_us")))
    first = {"id": 1, "epoch": os.urandom(16), "cursor": 0, "token_key": os.urandom(32), "reap_time_us": 0}
    op.bulk_insert(catalog, [first])
    op.bulk_insert(sa.table("schema_compat", sa.column("id"), sa.column("oldest")), [{"id": 1, "oldest": "0001"}])


def downgrade() -> None:
    """Drops everything."""
    for name in (
        "registrations",
        "plan_submissions",
        "extent_segments",
        "sessions",
        "leases",
        "checkpoints",
        "parts",
        "structure_tensors",
        "runs",
        "rank_structures",
        "checkpoint_structures",
        "schema_compat",
        "projects",
        "events",
        "catalog",
    ):
        op.drop_table(name)


def _catalog() -> None:
    op.create_table(
        "catalog",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("epoch", sa.LargeBinary(16), nullable=False),
        sa.Column("cursor", _INT64, nullable=False),
        sa.Column("token_key", sa.LargeBinary(32), nullable=False),
        sa.Column("reap_time_us", _INT64, nullable=False),
        **_STRICT,
    )
    op.create_table(
        "schema_compat",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("oldest", sa.Text, nullable=False),
        **_STRICT,
    )
    op.create_table(
        "events",
        sa.Column("cursor", _INT64, primary_key=True, autoincrement=False),
        sa.Column("time_us", _INT64, nullable=False),
        sa.Column("kind", _SMALL, nullable=False),
        sa.Column("part_id", _INT64, nullable=False),
        sa.Column("checkpoint_id", _INT64, nullable=False),
        **_STRICT,
    )


def _runs() -> None:
    op.create_table(
        "projects",
        sa.Column("id", _INT64, primary_key=True),
        sa.Column("name", _NAME, nullable=False, unique=True),
        **_STRICT,
    )
    op.create_table(
        "runs",
        sa.Column("id", _INT64, primary_key=True),
        sa.Column("project_id", _INT64, sa.ForeignKey("projects.id"), nullable=False),
        sa.Column("name", _NAME, nullable=False),
        sa.Column("create_time_us", _INT64, nullable=False),
        sa.UniqueConstraint("project_id", "name"),
        **_STRICT,
    )
    op.create_table(
        "parts",
        sa.Column("id", _INT64, primary_key=True),
        sa.Column("run_id", _INT64, sa.ForeignKey("runs.id"), nullable=False),
        sa.Column("name", _NAME, nullable=False),
        sa.Column("session", _INT64, nullable=False),
        sa.Column("last_session", _INT64, nullable=False),
        sa.Column("latest_id", _INT64),
        sa.UniqueConstraint("run_id", "name"),
        **_STRICT,
    )
    op.create_table(
        "sessions",
        sa.Column("part_id", _INT64, sa.ForeignKey("parts.id"), primary_key=True, autoincrement=False),
        sa.Column("number", _INT64, primary_key=True, autoincrement=False),
        sa.Column("incarnation", sa.LargeBinary(16), nullable=False),
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("user", sa.Text, nullable=False),
        sa.Column("start_time_us", _INT64, nullable=False),
        sa.UniqueConstraint("part_id", "incarnation"),
        **_CLUSTERED,
    )
    op.create_table(
        "leases",
        sa.Column("part_id", _INT64, sa.ForeignKey("parts.id"), primary_key=True, autoincrement=False),
        sa.Column("session", _INT64, nullable=False),
        sa.Column("seen_time_us", _INT64, nullable=False),
        sa.Column("expire_time_us", _INT64, nullable=False),
        sa.Column("ended", _SMALL, nullable=False),
        **_STRICT,
    )
    op.create_index(
        "ix_leases_running",
        "leases",
        ["expire_time_us"],
        sqlite_where=sa.text("ended = 0"),
        postgresql_where=sa.text("ended = 0"),
    )


def _content() -> None:
    op.create_table(
        "rank_structures",
        sa.Column("id", _INT64, primary_key=True),
        sa.Column("project_id", _INT64, sa.ForeignKey("projects.id"), nullable=False),
        sa.Column("kind", _SMALL, nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("reference_id", _INT64, sa.ForeignKey("rank_structures.id")),
        sa.Column("entry_count", sa.Integer, nullable=False),
        sa.Column("item_count", sa.Integer, nullable=False),
        sa.Column("variable_count", sa.Integer, nullable=False),
        sa.Column("fixed_bytes", _INT64, nullable=False),
        sa.Column("last_used_day", sa.Integer, nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("project_id", "kind", "digest"),
        **_NEVER_REUSED,
    )
    op.create_table(
        "checkpoint_structures",
        sa.Column("id", _INT64, primary_key=True),
        sa.Column("project_id", _INT64, sa.ForeignKey("projects.id"), nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("tensor_count", _INT64, nullable=False),
        sa.Column("chunk_count", _INT64, nullable=False),
        sa.Column("bytes_entry_count", _INT64, nullable=False),
        sa.Column("last_used_day", sa.Integer, nullable=False),
        sa.Column("warnings", sa.Text, nullable=False),
        sa.Column("rank_structure_ids", sa.LargeBinary, nullable=False),
        sa.Column("tensor_ids", sa.LargeBinary, nullable=False),
        sa.Column("head", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("project_id", "digest"),
        **_NEVER_REUSED,
    )
    op.create_table(
        "structure_tensors",
        sa.Column("id", _INT64, primary_key=True),
        sa.Column("project_id", _INT64, sa.ForeignKey("projects.id"), nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("kind", _SMALL, nullable=False),
        sa.Column("dtype", _SMALL, nullable=False),
        sa.Column("shape", sa.Text, nullable=False),
        sa.Column("chunk_count", _INT64, nullable=False),
        sa.Column("fixed_bytes", _INT64, nullable=False),
        sa.Column("fqn", sa.LargeBinary, nullable=False),
        sa.Column("fqn_text", sa.Text, nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("project_id", "digest"),
        **_NEVER_REUSED,
    )


def _checkpoints() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("id", _INT64, primary_key=True),
        sa.Column("part_id", _INT64, sa.ForeignKey("parts.id"), nullable=False),
        sa.Column("session", _INT64, nullable=False),
        sa.Column("step", _INT64, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("incarnation", sa.LargeBinary(16), nullable=False),
        sa.Column("world_size", sa.Integer, nullable=False),
        sa.Column("registration_count", sa.Integer, nullable=False),
        sa.Column("state", _SMALL, nullable=False),
        sa.Column("live", _SMALL, nullable=False),
        sa.Column("staged", _SMALL, nullable=False),
        sa.Column("recovered", _SMALL, nullable=False),
        sa.Column("explicit", _SMALL, nullable=False),
        sa.Column("location", sa.Text, nullable=False),
        sa.Column("prefix", sa.Text, nullable=False),
        sa.Column("create_time_us", _INT64, nullable=False),
        sa.Column("commit_time_us", _INT64),
        sa.Column("write_time_us", _INT64),
        sa.Column("structure_id", _INT64, sa.ForeignKey("checkpoint_structures.id")),
        sa.Column("size_bytes", _INT64, nullable=False),
        sa.Column("metadata_header", sa.LargeBinary, nullable=False),
        sa.Column("failure", sa.Text, nullable=False),
        sa.Column("failed_rank", sa.Integer),
        sa.Column("failed_host", sa.Text),
        sa.Column("failed_phase", sa.Text),
        sa.UniqueConstraint("part_id", "session", "step", "attempt", "incarnation", name="uq_checkpoints_attempt"),
        **_NEVER_REUSED,
    )
    op.create_index(
        "uq_checkpoints_live",
        "checkpoints",
        ["part_id", "step"],
        unique=True,
        sqlite_where=sa.text("live = 1"),
        postgresql_where=sa.text("live = 1"),
    )
    op.create_index(
        "ix_checkpoints_staged",
        "checkpoints",
        ["part_id"],
        sqlite_where=sa.text("staged = 1"),
        postgresql_where=sa.text("staged = 1"),
    )
    op.create_table(
        "extent_segments",
        sa.Column("checkpoint_id", _INT64, sa.ForeignKey("checkpoints.id"), primary_key=True, autoincrement=False),
        sa.Column("first_rank", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        **_STRICT,
    )


def _staging() -> None:
    op.create_table(
        "plan_submissions",
        sa.Column("checkpoint_id", _INT64, sa.ForeignKey("checkpoints.id"), primary_key=True, autoincrement=False),
        sa.Column("rank", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("plan_id", _INT64, sa.ForeignKey("rank_structures.id"), nullable=False),
        sa.Column("lowest_rank", _SMALL, nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        **_CLUSTERED,
    )
    op.create_table(
        "registrations",
        sa.Column("checkpoint_id", _INT64, sa.ForeignKey("checkpoints.id"), primary_key=True, autoincrement=False),
        sa.Column("rank", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("structure_id", _INT64, sa.ForeignKey("rank_structures.id"), nullable=False),
        sa.Column("explicit", _SMALL, nullable=False),
        sa.Column("size_bytes", _INT64, nullable=False),
        sa.Column("extents", sa.LargeBinary, nullable=False),
        sa.Column("volatile", sa.LargeBinary, nullable=False),
        **_CLUSTERED,
    )
