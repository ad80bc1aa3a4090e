"""Checkpoints know where they come from, and what came of them."""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_NAME = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_SMALL = sa.SmallInteger().with_variant(sa.Integer(), "sqlite")
_NEVER_REUSED: Final[dict[str, Any]] = {"sqlite_strict": True, "sqlite_autoincrement": True}
_IS_NAMED: Final = sa.text("name <> ''")
_IS_TOLD: Final = sa.text("incarnation IS NOT NULL")


def upgrade() -> None:
    """Adds a table that servers of the revisions before know nothing of."""
    op.create_table(
        "lineage",
        sa.Column("id", _INT64, primary_key=True),
        sa.Column("kind", _SMALL, nullable=False),
        sa.Column("parent_id", _INT64, sa.ForeignKey("checkpoints.id")),
        sa.Column("child_id", _INT64, sa.ForeignKey("checkpoints.id")),
        sa.Column("name", _NAME, nullable=False),
        sa.Column("incarnation", sa.LargeBinary(16)),
        sa.Column("create_time_us", _INT64, nullable=False),
        **_NEVER_REUSED,
    )
    op.create_index("ix_lineage_parent", "lineage", ["parent_id", "id"])
    op.create_index("ix_lineage_child", "lineage", ["child_id", "id"])
    op.create_index("ix_lineage_named", "lineage", ["name"], sqlite_where=_IS_NAMED, postgresql_where=_IS_NAMED)
    op.create_index("ix_lineage_told", "lineage", ["incarnation"], sqlite_where=_IS_TOLD, postgresql_where=_IS_TOLD)


def downgrade() -> None:
    """Forgets all edges."""
    op.drop_table("lineage")
