"""Checkpoints are described, named by alias, and listed in many orders."""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa
from alembic import op
from sqlalchemy.types import TypeEngine

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_NAME = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_NUMBER: TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")
_SMALL = sa.SmallInteger().with_variant(sa.Integer(), "sqlite")
_STRICT: Final[dict[str, Any]] = {"sqlite_strict": True}
_CLUSTERED: Final[dict[str, Any]] = {"sqlite_strict": True, "sqlite_with_rowid": False}
_ORDERS: Final[dict[str, list[str | sa.TextClause]]] = {
    "session": ["live", "session", "step", "id"],
    "step": ["live", "step", "id"],
    "time": ["live", sa.text("coalesce(write_time_us, create_time_us)"), "id"],
    "size": ["live", "size_bytes", "id"],
    "world": ["live", "world_size", "id"],
    "state": ["live", "state", "id"],
    "part": ["part_id", "id"],
}


def upgrade() -> None:
    """Adds what servers of the revisions before leave alone: their commits are described by nobody."""
    _descriptions()
    _aliases()
    op.add_column("registrations", sa.Column("phases", sa.LargeBinary))
    op.add_column("events", sa.Column("alias", sa.Text))
    op.create_index("ix_parts_name", "parts", ["name", "id"])
    for name, columns in _ORDERS.items():
        op.create_index(f"ix_checkpoints_by_{name}", "checkpoints", columns)


def downgrade() -> None:
    """Drops what was said of checkpoints."""
    for name in reversed(_ORDERS):
        op.drop_index(f"ix_checkpoints_by_{name}", "checkpoints")
    op.drop_index("ix_parts_name", "parts")
    op.drop_column("events", "alias")
    op.drop_column("registrations", "phases")
    for name in ("aliases", "rank_stats", "descriptions", "metrics", "labels"):
        op.drop_table(name)


def _checkpoint(**options: Any) -> sa.Column[int]:
    return sa.Column("checkpoint_id", _INT64, sa.ForeignKey("checkpoints.id"), **options)


def _descriptions() -> None:
    op.create_table(
        "labels",
        _checkpoint(primary_key=True, autoincrement=False),
        sa.Column("name", _NAME, primary_key=True),
        sa.Column("value", _NAME, nullable=False),
        **_CLUSTERED,
    )
    op.create_index("ix_labels_value", "labels", ["name", "value", "checkpoint_id"])
    op.create_table(
        "metrics",
        _checkpoint(primary_key=True, autoincrement=False),
        sa.Column("name", _NAME, primary_key=True),
        sa.Column("part_id", _INT64, sa.ForeignKey("parts.id"), nullable=False),
        sa.Column("value", _NUMBER, nullable=False),
        **_CLUSTERED,
    )
    op.create_index("ix_metrics_value", "metrics", ["name", "value", "checkpoint_id"])
    op.create_index("ix_metrics_part", "metrics", ["part_id", "name", "value", "checkpoint_id"])
    op.create_table(
        "descriptions",
        _checkpoint(primary_key=True, autoincrement=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("writer", sa.Text, nullable=False),
        sa.Column("timing", sa.Text, nullable=False),
        **_STRICT,
    )
    op.create_table(
        "rank_stats",
        _checkpoint(primary_key=True, autoincrement=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        **_STRICT,
    )


def _aliases() -> None:
    op.create_table(
        "aliases",
        sa.Column("part_id", _INT64, sa.ForeignKey("parts.id"), primary_key=True, autoincrement=False),
        sa.Column("name", _NAME, primary_key=True),
        _checkpoint(),
        sa.Column("metric", sa.Text, nullable=False),
        sa.Column("direction", _SMALL, nullable=False),
        sa.Column("protected", _SMALL, nullable=False),
        sa.Column("update_time_us", _INT64, nullable=False),
        **_CLUSTERED,
    )
    op.create_index("ix_aliases_checkpoint_id", "aliases", ["checkpoint_id"])
