"""What ``diff`` returns, as plain values. Frozen, so they may be shared by threads.

``to_json`` of each returns the object that the command line prints with ``--json``. Its keys are only ever added.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from shardbook._described import Source

Json = dict[str, Any]


class Change(StrEnum):
    """What differs between two entries of one name."""

    #: One is a tensor, the other a bytes entry.
    KIND = "kind"
    #: Both are tensors, of unlike dtypes.
    DTYPE = "dtype"
    #: Both are tensors, of unlike shapes.
    SHAPE = "shape"
    #: Both are tensors of one shape, cut into other chunks.
    SHARDING = "sharding"


@dataclass(frozen=True)
class TensorFacts:
    """What an entry of a checkpoint is.

    Attributes:
        fqn: Fully qualified name; any ``str``, also with NUL and lone surrogates.
        is_tensor: False for bytes entries.
        dtype: Name such as ``bfloat16``; empty when it is no tensor.
        shape: Sizes, elements; empty for a scalar and when it is no tensor.
        chunk_count: Chunks that it is cut into; 1 when it is no tensor.
    """

    fqn: str
    is_tensor: bool
    dtype: str
    shape: tuple[int, ...]
    chunk_count: int

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return {**vars(self), "shape": list(self.shape)}


@dataclass(frozen=True)
class TensorChange:
    """An entry that both checkpoints have, and not alike.

    Attributes:
        fqn: Its name.
        changed: `kind`, or any of `dtype`, `shape` and `sharding`; the last for chunks of one shape alone.
        a: What it is in the first checkpoint.
        b: What it is in the second one.
    """

    fqn: str
    changed: tuple[Change, ...]
    a: TensorFacts
    b: TensorFacts

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        changed = [change.value for change in self.changed]
        return {"fqn": self.fqn, "changed": changed, "a": self.a.to_json(), "b": self.b.to_json()}


@dataclass(frozen=True)
class ComparedCheckpoint:
    """One of the two checkpoints.

    Attributes:
        ref: Short form of its name; None for a directory by plain DCP.
        location: Where it is: as the catalogue has it, or the path or URL that was given.
        source: What said what it holds: `catalogue`, `manifest`, or `dcp` for DCP's own `.metadata`.
        world_size: Ranks that saved it; of plain DCP's directories what the names of their files tell.
        size_bytes: Bytes that its extents cover. Of two checkpoints of the catalogue as the catalogue has it; else
            each chunk once.
        structure_digest: Digest of its structure, hex; empty for plain DCP.
    """

    ref: str | None
    location: str
    source: Source
    world_size: int
    size_bytes: int
    structure_digest: str

    def to_json(self) -> Json:
        """Returns every attribute under its own name."""
        return {**vars(self), "source": self.source.value}


@dataclass(frozen=True)
class CheckpointDiff:
    """How two checkpoints differ.

    Attributes:
        a: The first one.
        b: The second one.
        same_structure: True when both have one structure, by its digest: tensors, chunks, ranks and order in files.
        added: Entries that only the second one has, in its order.
        removed: Entries that only the first one has, in its order.
        changed: Entries that both have, and not alike, in the first one's order.
    """

    a: ComparedCheckpoint
    b: ComparedCheckpoint
    same_structure: bool
    added: tuple[TensorFacts, ...]
    removed: tuple[TensorFacts, ...]
    changed: tuple[TensorChange, ...]

    @property
    def same_tensors(self) -> bool:
        """True when both have the same tensors, cut into the same chunks."""
        return not (self.added or self.removed or self.changed)

    @property
    def only_resharded(self) -> bool:
        """True when both have the same tensors, and some of them are cut into other chunks."""
        changes = {change.changed for change in self.changed}
        return changes == {(Change.SHARDING,)} and not (self.added or self.removed)

    @property
    def is_same(self) -> bool:
        """True when nothing differs: tensors, ranks that saved, bytes. Values are not compared."""
        mine, theirs = self.a, self.b
        return self.same_tensors and (mine.world_size, mine.size_bytes) == (theirs.world_size, theirs.size_bytes)

    def to_json(self, limit: int | None = None) -> Json:
        """Returns every attribute under its own name, and the counts of entries; lists have ``limit`` at most."""
        return {
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "is_same": self.is_same,
            "same_structure": self.same_structure,
            "same_tensors": self.same_tensors,
            "added": [one.to_json() for one in self.added[:limit]],
            "added_count": len(self.added),
            "removed": [one.to_json() for one in self.removed[:limit]],
            "removed_count": len(self.removed),
            "changed": [one.to_json() for one in self.changed[:limit]],
            "changed_count": len(self.changed),
        }


__all__ = ["Change", "CheckpointDiff", "ComparedCheckpoint", "TensorChange", "TensorFacts"]
