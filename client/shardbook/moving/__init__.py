"""Checkpoints whose files somebody has copied to another store: ``move`` looks at the copies, then switches.

May import the client and core; never torch. Copies nothing and removes nothing.
"""

from __future__ import annotations

from shardbook.moving.api import MovedCheckpoint, MoveOutcome, Progress, move
from shardbook.moving.places import Place

__all__ = ["MoveOutcome", "MovedCheckpoint", "Place", "Progress", "move"]
