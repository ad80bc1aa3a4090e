"""Shardbook: metadata of distributed PyTorch checkpoints, without collectives.

Saving and loading are in ``shardbook.dcp``; ``read`` gives tensors to whoever has no torch. Errors are in
``shardbook.errors``, what the catalogue returns in ``shardbook.catalog``. Importing this package is light: neither
torch nor SQLAlchemy nor the command line, and gRPC only with the first use of a name that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shardbook._version import __version__
from shardbook.errors import (
    AbortedError,
    AlreadyExistsError,
    CheckpointClosedError,
    CheckpointMismatchError,
    ClaimLostError,
    CorruptDataError,
    CorruptManifestError,
    CursorExpiredError,
    DeadlineExceededError,
    EpochChangedError,
    FailedPreconditionError,
    ForkedClientError,
    InternalError,
    InvalidArgumentError,
    InvalidGeometryError,
    Mismatch,
    MismatchKind,
    NotFoundError,
    PermissionDeniedError,
    RankFailedError,
    RanksMissingError,
    ResourceExhaustedError,
    RunBusyError,
    SaveProcessError,
    SessionFencedError,
    SessionUnknownError,
    ShardbookError,
    StorageError,
    UnauthenticatedError,
    UnavailableError,
    UnregisteredError,
    UnsupportedMetadataError,
    UnsupportedPlannerError,
    UnsupportedWriterError,
)

if TYPE_CHECKING:
    from shardbook.catalog import Checkpoint, CheckpointState, Run, RunPart, TensorInfo
    from shardbook.client import Client
    from shardbook.comparing import CheckpointDiff, diff
    from shardbook.config import ClientConfig, Mode
    from shardbook.core.names import Ref
    from shardbook.events import Event, EventKind
    from shardbook.lineage import Lineage, LineageEdge, LineageKind, LineageNode
    from shardbook.moving import MovedCheckpoint, move
    from shardbook.reading import read, read_many
    from shardbook.stored_metadata import StoredMetadata
    from shardbook.verifying import VerifyReport, verify

_HOME = {
    "Client": "shardbook.client",
    "ClientConfig": "shardbook.config",
    "Mode": "shardbook.config",
    "Ref": "shardbook.core.names",
    "Checkpoint": "shardbook.catalog",
    "CheckpointState": "shardbook.catalog",
    "Run": "shardbook.catalog",
    "RunPart": "shardbook.catalog",
    "StoredMetadata": "shardbook.stored_metadata",
    "TensorInfo": "shardbook.catalog",
    "Event": "shardbook.events",
    "EventKind": "shardbook.events",
    "Lineage": "shardbook.lineage",
    "LineageEdge": "shardbook.lineage",
    "LineageKind": "shardbook.lineage",
    "LineageNode": "shardbook.lineage",
    "MovedCheckpoint": "shardbook.moving",
    "move": "shardbook.moving",
    "read": "shardbook.reading",
    "read_many": "shardbook.reading",
    "CheckpointDiff": "shardbook.comparing",
    "diff": "shardbook.comparing",
    "VerifyReport": "shardbook.verifying",
    "verify": "shardbook.verifying",
}

__all__ = [
    "AbortedError",
    "__version__",
    "Client",
    "ClientConfig",
    "Mode",
    "Ref",
    "Checkpoint",
    "CheckpointState",
    "Run",
    "RunPart",
    "StoredMetadata",
    "TensorInfo",
    "Event",
    "EventKind",
    "Lineage",
    "LineageEdge",
    "LineageKind",
    "LineageNode",
    "MovedCheckpoint",
    "move",
    "read",
    "read_many",
    "CheckpointDiff",
    "diff",
    "VerifyReport",
    "verify",
    "AlreadyExistsError",
    "CheckpointClosedError",
    "CheckpointMismatchError",
    "ClaimLostError",
    "CorruptDataError",
    "CorruptManifestError",
    "CursorExpiredError",
    "DeadlineExceededError",
    "EpochChangedError",
    "FailedPreconditionError",
    "ForkedClientError",
    "InternalError",
    "InvalidArgumentError",
    "InvalidGeometryError",
    "Mismatch",
    "MismatchKind",
    "NotFoundError",
    "PermissionDeniedError",
    "RankFailedError",
    "RanksMissingError",
    "ResourceExhaustedError",
    "RunBusyError",
    "SaveProcessError",
    "SessionFencedError",
    "SessionUnknownError",
    "ShardbookError",
    "StorageError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnregisteredError",
    "UnsupportedMetadataError",
    "UnsupportedPlannerError",
    "UnsupportedWriterError",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the public names, imported or not."""
    return sorted(__all__)
