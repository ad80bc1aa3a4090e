"""``diff``: what two checkpoints hold, held against each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from shardbook._described import Source, Target
from shardbook.client import Client
from shardbook.comparing.report import Change, CheckpointDiff, ComparedCheckpoint, TensorChange, TensorFacts
from shardbook.comparing.sides import CatalogueSide, ManifestSide, Side, side_of
from shardbook.config import ClientConfig
from shardbook.core.columns import Int64Array
from shardbook.core.compare import Geometry, differences
from shardbook.core.dtype import dtype_name

#: Checkpoints whose entries are stored as blocks.
_STORED: Final = (CatalogueSide, ManifestSide)


def diff(a: Target, b: Target, *, config: ClientConfig | None = None, client: Client | None = None) -> CheckpointDiff:
    """Compares what two checkpoints hold: tensors by name, dtype, shape and chunks, bytes, and ranks that saved.

    Values are not compared, nor who wrote a chunk and where it lies. Two checkpoints of the catalogue that have one
    structure cost two small calls; others a call for the metadata of each. Reads no data files. Can be called from
    several threads.

    Args:
        a: ``project/run@1500``, ``@latest``, ...; or a directory or URL, whose newest whole checkpoint counts.
        b: Likewise.
        config: Settings; those of the environment when None.
        client: The server, for refs; by default the one that ``config`` names.

    Returns:
        What differs. A difference is no error: ``is_same`` says.

    Raises:
        NotFoundError: There is no such checkpoint or directory.
        FailedPreconditionError: A checkpoint is not committed (reason ``NOT_COMMITTED``); ``.metadata`` is not DCP's
            metadata alone (``UNSAFE_METADATA``).
        CorruptManifestError: What describes a directory is damaged.
        StorageError: The storage could not be asked.
        PermissionDeniedError: It did not let itself be asked (``STORAGE_DENIED``).
        ShardbookError: The service could not be asked.
    """
    settings = ClientConfig.from_env() if config is None else config
    left, right = side_of(a, settings, client), side_of(b, settings, client)
    mine, theirs = left.facts, right.facts
    same = bool(mine.structure_digest) and mine.structure_digest == theirs.structure_digest
    added, removed, changed = ((), (), ()) if same else _compare(left, right)
    if Source.CATALOGUE in (mine.source, theirs.source) and mine.source is not theirs.source:
        # The catalogue counts what ranks wrote twice, where they did; a directory is counted by what it holds.
        mine = _counted(left, right if same else None)
        theirs = _counted(right, left if same else None)
    return CheckpointDiff(mine, theirs, same, added, removed, changed)


def _counted(side: Side, twin: Side | None) -> ComparedCheckpoint:
    """Returns a checkpoint with the bytes of its chunks, each once; ``twin`` is a directory of the same structure."""
    if not isinstance(side, CatalogueSide):
        return side.facts
    blocks = twin.blocks() if isinstance(twin, ManifestSide) else None
    return replace(side.facts, size_bytes=side.unique_bytes(blocks))


def _compare(
    left: Side, right: Side
) -> tuple[tuple[TensorFacts, ...], tuple[TensorFacts, ...], tuple[TensorChange, ...]]:
    """Returns what only the second one has, what only the first one has, and what differs."""
    one, other = _unlike(left, right)
    rows = {fqn: row for row, fqn in enumerate(other.fqns)}
    partner = np.fromiter((rows.get(fqn, -1) for fqn in one.fqns), np.int64, len(one.fqns))
    ones = np.flatnonzero(partner >= 0).astype(np.int64, copy=False)
    others = partner[ones]
    alone = np.ones(len(other.fqns), dtype=np.bool_)
    alone[others] = False
    return (
        tuple(_facts(other, row) for row in np.flatnonzero(alone).tolist()),
        tuple(_facts(one, row) for row in np.flatnonzero(partner < 0).tolist()),
        _changes(one, other, ones, others),
    )


def _unlike(left: Side, right: Side) -> tuple[Geometry, Geometry]:
    """Returns the entries of both that are not stored alike; all, where one of them is not stored in blocks."""
    if not isinstance(left, _STORED) or not isinstance(right, _STORED):
        return left.geometry(), right.geometry()
    mine, theirs = left.blocks(), right.blocks()
    alike = set(mine) & set(theirs)
    return (
        left.geometry_of([block for block in mine if block not in alike]),
        right.geometry_of([block for block in theirs if block not in alike]),
    )


def _changes(one: Geometry, other: Geometry, ones: Int64Array, others: Int64Array) -> tuple[TensorChange, ...]:
    found = differences(one, other, ones, others)
    flags = {
        Change.KIND: found.kind,
        Change.DTYPE: found.dtype,
        Change.SHAPE: found.shape,
        Change.SHARDING: found.sharding,
    }
    changes = []
    for at in np.flatnonzero(found.any).tolist():
        mine, theirs = _facts(one, int(ones[at])), _facts(other, int(others[at]))
        changed = tuple(change for change, flag in flags.items() if flag[at])
        changes.append(TensorChange(mine.fqn, changed, mine, theirs))
    return tuple(changes)


def _facts(geometry: Geometry, row: int) -> TensorFacts:
    return TensorFacts(
        fqn=geometry.fqns[row],
        is_tensor=bool(geometry.is_tensor[row]),
        dtype=dtype_name(int(geometry.dtypes[row])),
        shape=tuple(geometry.shapes[row, : int(geometry.ndims[row])].tolist()) if geometry.is_tensor[row] else (),
        chunk_count=int(geometry.chunk_counts[row]),
    )


__all__ = ["diff"]
