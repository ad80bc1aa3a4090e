"""Files of saves that never became checkpoints: ``find_orphans`` and ``remove_orphan``.

A save that is killed leaves data, and records of some of its ranks, in a directory that is the attempt's own. Nobody
reads them again. Whatever might still become a checkpoint, or be one, is kept: in doubt nothing is an orphan. May
import the client; never torch.
"""

from __future__ import annotations

from shardbook.collecting.api import find_orphans, remove_orphan
from shardbook.collecting.report import LeftAttempt, Verdict

__all__ = ["LeftAttempt", "Verdict", "find_orphans", "remove_orphan"]
