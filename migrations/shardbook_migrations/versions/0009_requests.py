"""Writes of the catalogue are remembered by the ids of their requests."""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_NAME = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_CLUSTERED: Final[dict[str, Any]] = {"sqlite_strict": True, "sqlite_with_rowid": False}


def upgrade() -> None:
    """Adds a table that servers of the revisions before know nothing of: they make what is asked twice twice."""
    op.create_table(
        "requests",
        sa.Column("project", _NAME, primary_key=True),
        sa.Column("principal", _NAME, primary_key=True),
        sa.Column("method", _NAME, primary_key=True),
        sa.Column("request_id", sa.LargeBinary(16), primary_key=True),
        sa.Column("content_digest", sa.LargeBinary(32), nullable=False),
        sa.Column("answer", sa.LargeBinary, nullable=False),
        sa.Column("time_us", _INT64, nullable=False),
        **_CLUSTERED,
    )
    op.create_index("ix_requests_time_us", "requests", ["time_us"])


def downgrade() -> None:
    """Forgets which requests were made."""
    op.drop_table("requests")
