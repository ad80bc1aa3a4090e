"""Watchers keep their place in the catalogue, and claim the checkpoints that they work on."""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_NAME = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_SMALL = sa.SmallInteger().with_variant(sa.Integer(), "sqlite")
_NEVER_REUSED: Final[dict[str, Any]] = {"sqlite_strict": True, "sqlite_autoincrement": True}
_CLUSTERED: Final[dict[str, Any]] = {"sqlite_strict": True, "sqlite_with_rowid": False}


def upgrade() -> None:
    """Adds tables that servers of the revisions before know nothing of."""
    op.create_table(
        "subscriptions",
        sa.Column("id", _INT64, primary_key=True),
        sa.Column("name", _NAME, nullable=False),
        sa.Column("parent", sa.Text, nullable=False),
        sa.Column("filter", sa.Text, nullable=False),
        sa.Column("cursor", _INT64, nullable=False),
        sa.Column("done_count", _INT64, nullable=False),
        sa.Column("create_time_us", _INT64, nullable=False),
        sa.UniqueConstraint("name"),
        **_NEVER_REUSED,
    )
    op.create_table(
        "claims",
        sa.Column("subscription_id", _INT64, sa.ForeignKey("subscriptions.id"), primary_key=True, autoincrement=False),
        sa.Column("checkpoint_id", _INT64, sa.ForeignKey("checkpoints.id"), primary_key=True, autoincrement=False),
        sa.Column("claim", sa.LargeBinary(16), nullable=False),
        sa.Column("state", _SMALL, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("due_time_us", _INT64, nullable=False),
        sa.Column("holder", sa.Text, nullable=False),
        sa.Column("failure", sa.Text, nullable=False),
        **_CLUSTERED,
    )
    op.create_index("ix_claims_due", "claims", ["subscription_id", "state", "due_time_us"])
    op.create_index("ix_claims_checkpoint_id", "claims", ["checkpoint_id"])


def downgrade() -> None:
    """Forgets the subscriptions."""
    op.drop_table("claims")
    op.drop_table("subscriptions")
