"""The order of times is read from its index alone."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_COLUMNS: list[str | sa.TextClause] = ["live", sa.text("coalesce(write_time_us, create_time_us)"), "id"]


def upgrade() -> None:
    """Builds the index anew: to Postgres one has no column that it has an expression of. SQLite sees that it has."""
    if op.get_context().dialect.name == "postgresql":
        op.drop_index("ix_checkpoints_by_time", "checkpoints")
        included = ["write_time_us", "create_time_us"]
        op.create_index("ix_checkpoints_by_time", "checkpoints", _COLUMNS, postgresql_include=included)


def downgrade() -> None:
    """Builds it as it was."""
    if op.get_context().dialect.name == "postgresql":
        op.drop_index("ix_checkpoints_by_time", "checkpoints")
        op.create_index("ix_checkpoints_by_time", "checkpoints", _COLUMNS)
