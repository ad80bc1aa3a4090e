"""Ranks of a small model that save without torch, for ``shardbook demo``. May import the client and core."""

from __future__ import annotations

from shardbook.demo.ranks import SHAPES, WORLD_SIZE, DemoJob, expected

__all__ = ["SHAPES", "WORLD_SIZE", "DemoJob", "expected"]
