"""Records what the service missed while it was away, once a save finds it answering again."""

from __future__ import annotations

import logging
import pickle
import threading
from typing import Final

from shardbook.client import Client
from shardbook.core.fold import FoldedAttempt
from shardbook.dcp.best_effort import best_effort
from shardbook.dcp.metadata import build_metadata, default_header
from shardbook.dcp.runtime import Runtime
from shardbook.sync import sync_directory, unsettled

_LOG = logging.getLogger(__name__)

#: How long a save waits for this; what is not done by then goes on in the background.
_PATIENCE_S: Final = 5.0


def record_missing(runtime: Runtime) -> None:
    """Brings the session's earlier saves into the catalogue; best effort, on the coordinator, never raises.

    At most one such thread works in a process; a save that finds it at work goes on.
    """
    client = runtime.plain_client
    if client is None or not runtime.unregistered or not runtime.catching_up.acquire(blocking=False):
        return
    thread = threading.Thread(target=_work, args=(runtime, client), name="shardbook-sync", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter ends, and a save in the background with it: `shardbook sync` has the rest
        runtime.catching_up.release()
        return
    thread.join(_PATIENCE_S)


def _work(runtime: Runtime, client: Client) -> None:
    try:
        with best_effort("record earlier saves in the catalogue; the next save tries again"):
            for place, path in list(runtime.unregistered.items()):
                left = unsettled(sync_directory(client, path, stores=runtime.config.stores, export=export_metadata))
                if left:
                    _LOG.warning("%s is not in the catalogue yet: %s", path, left[0].message)
                else:
                    runtime.unregistered.pop(place, None)
                    _LOG.info("%s is in the catalogue now", path)
    finally:
        runtime.catching_up.release()


def export_metadata(directory: str, folded: FoldedAttempt) -> bytes:
    """Returns the content of DCP's own ``.metadata`` for a folded attempt."""
    prefix = folded.manifest.identity.prefix
    metadata = build_metadata(folded.structure, folded.located, prefix, default_header(directory, prefix))
    return pickle.dumps(metadata)
