"""How two checkpoints differ, wherever each of them is: ``diff``.

Structures are addressed by content: checkpoints with equal digests hold equal tensors, and nothing of them is fetched.
Of others only the tensors are decoded whose stored blocks are not equal byte for byte. May import the client, core and
``shardbook.reading``; never torch.
"""

from __future__ import annotations

from shardbook.comparing.api import diff
from shardbook.comparing.report import Change, CheckpointDiff, ComparedCheckpoint, TensorChange, TensorFacts

__all__ = ["Change", "CheckpointDiff", "ComparedCheckpoint", "TensorChange", "TensorFacts", "diff"]
