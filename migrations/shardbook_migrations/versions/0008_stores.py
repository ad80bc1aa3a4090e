"""Checkpoints have more than one location."""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_CLUSTERED: Final[dict[str, Any]] = {"sqlite_strict": True, "sqlite_with_rowid": False}


def upgrade() -> None:
    """Adds a table that servers of the revisions before know nothing of: to them a checkpoint is where it is first."""
    op.create_table(
        "locations",
        sa.Column("checkpoint_id", _INT64, sa.ForeignKey("checkpoints.id"), primary_key=True, autoincrement=False),
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("location", sa.Text, nullable=False),
        **_CLUSTERED,
    )
    op.create_index("ix_locations_location", "locations", [sa.text("substr(location, 1, 256)")])


def downgrade() -> None:
    """Forgets all locations but the first."""
    op.drop_table("locations")
