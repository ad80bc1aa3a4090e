"""Checkpoints are held, deleted and brought back; runs have retention policies."""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_NAME = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_SMALL = sa.SmallInteger().with_variant(sa.Integer(), "sqlite")
_CLUSTERED: Final[dict[str, Any]] = {"sqlite_strict": True, "sqlite_with_rowid": False}
_IS_DELETED: Final = sa.text("purge_time_us IS NOT NULL")


def upgrade() -> None:
    """Adds what servers of the revisions before leave alone: to them a deleted checkpoint is one that is closed."""
    op.add_column("checkpoints", sa.Column("delete_time_us", _INT64))
    op.add_column("checkpoints", sa.Column("purge_time_us", _INT64))
    op.add_column("checkpoints", sa.Column("flags", _SMALL, nullable=False, server_default=sa.text("0")))
    op.create_index(
        "ix_checkpoints_purge",
        "checkpoints",
        ["purge_time_us"],
        sqlite_where=_IS_DELETED,
        postgresql_where=_IS_DELETED,
    )
    op.create_index("ix_checkpoints_location", "checkpoints", [sa.text("substr(location, 1, 256)")])
    op.create_table(
        "holds",
        sa.Column("checkpoint_id", _INT64, sa.ForeignKey("checkpoints.id"), primary_key=True, autoincrement=False),
        sa.Column("holder", _NAME, primary_key=True),
        sa.Column("create_time_us", _INT64, nullable=False),
        sa.Column("expire_time_us", _INT64, nullable=False),
        **_CLUSTERED,
    )
    op.create_table(
        "retention_policies",
        sa.Column("run_id", _INT64, sa.ForeignKey("runs.id"), primary_key=True, autoincrement=False),
        sa.Column("part", _NAME, primary_key=True),
        sa.Column("policy", sa.Text, nullable=False),
        sa.Column("update_time_us", _INT64, nullable=False),
        **_CLUSTERED,
    )


def downgrade() -> None:
    """Forgets holds and policies; what is deleted stays closed."""
    for name in ("retention_policies", "holds"):
        op.drop_table(name)
    for name in ("location", "purge"):
        op.drop_index(f"ix_checkpoints_{name}", "checkpoints")
    for name in ("flags", "purge_time_us", "delete_time_us"):
        op.drop_column("checkpoints", name)
