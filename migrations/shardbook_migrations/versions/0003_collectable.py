"""What nobody refers to any more is found by an index."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds indexes; servers of the revisions before do not mind them."""
    op.create_index("ix_checkpoints_structure_id", "checkpoints", ["structure_id"])
    op.create_index("ix_rank_structures_reference_id", "rank_structures", ["reference_id"])


def downgrade() -> None:
    """Drops them."""
    op.drop_index("ix_rank_structures_reference_id", "rank_structures")
    op.drop_index("ix_checkpoints_structure_id", "checkpoints")
