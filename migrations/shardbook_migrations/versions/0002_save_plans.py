"""Decisions about plans are stored."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes a table that servers of the first revision leave alone: they decide anew each time."""
    op.create_table(
        "save_plans",
        sa.Column("project_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("first_rank", sa.Integer(), nullable=False),
        sa.Column("last_used_day", sa.Integer(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_save_plans_project_id"),
        sa.PrimaryKeyConstraint("project_id", "digest", "first_rank", name="pk_save_plans"),
        sqlite_strict=True,
    )


def downgrade() -> None:
    """Drops it: what it held is decided anew."""
    op.drop_table("save_plans")
