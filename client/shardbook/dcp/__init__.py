"""Saving and loading with torch: ``torch.distributed.checkpoint`` without collectives, in a catalogue.

::

    import shardbook.dcp as dcp

    dcp.init(run="llm/8b-v3")                                    # once, on every rank
    dcp.async_save(state, checkpoint_id=f"{root}/step-{step}")   # DCP's arguments
    dcp.load(state, "llm/8b-v3@latest")                          # any world size; a path works too

Or torch's own ``save``, ``async_save`` and ``load``, with ``ShardbookWriter`` and ``ShardbookReader``.

The only package of Shardbook that imports torch. It may import everything else of the client, and never the server.
"""

from __future__ import annotations

from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from shardbook.dcp.async_saving import AsyncSaveResponse, async_save
from shardbook.dcp.load_planner import LoadPlanner, ShardbookLoadPlanner
from shardbook.dcp.load_report import LoadReport
from shardbook.dcp.loading import load
from shardbook.dcp.planner import UnsafeEntryWarning
from shardbook.dcp.results import SaveResult, SaveState, SaveStats
from shardbook.dcp.saving import save
from shardbook.dcp.session import OnLive, Session, new_session, start_session
from shardbook.dcp.starting import close, init
from shardbook.dcp.storage_reader import ShardbookReader
from shardbook.dcp.storage_writer import ShardbookWriter

__all__ = [
    "init",
    "close",
    "Session",
    "OnLive",
    "new_session",
    "start_session",
    "save",
    "async_save",
    "AsyncCheckpointerType",
    "AsyncSaveResponse",
    "SaveResult",
    "SaveState",
    "SaveStats",
    "UnsafeEntryWarning",
    "load",
    "LoadReport",
    "ShardbookLoadPlanner",
    "LoadPlanner",
    "ShardbookWriter",
    "ShardbookReader",
]


def __dir__() -> list[str]:
    return sorted(__all__)
