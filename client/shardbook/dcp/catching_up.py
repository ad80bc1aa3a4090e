"""What a save does for earlier ones: records what the service missed, and folds what a killed coordinator left.

All of it is best effort: on the coordinator, by one thread of the process at a time, and for so long as a save is
willing to wait; the rest goes on in the background. It never fails a save.
"""

from __future__ import annotations

import logging
import re
import threading
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from shardbook._attempts import FoundAttempt, find_manifests, list_attempts
from shardbook._publishing import export_dcp_metadata, fold_sets, settle
from shardbook.client import Client
from shardbook.dcp.best_effort import best_effort
from shardbook.dcp.writer import CheckpointFiles
from shardbook.stores import encodable
from shardbook.sync import SyncedAttempt, SyncOutcome, sync_directory

if TYPE_CHECKING:
    from shardbook.dcp.runtime import Runtime

_LOG = logging.getLogger(__name__)

#: How long a save waits for this; what is not done by then goes on in the background.
_PATIENCE_S: Final = 5.0
#: Looks at a place that has not come to rest, at ever longer intervals: with the 1st, 2nd, 4th, ... 128th save.
_MOST_LOOKS: Final = 8
#: Checkpoint directories beside a save's own that are looked at once in a process, those of the nearest steps.
_MOST_NEIGHBOURS: Final = 32
#: How many of them are looked at with one save.
_NEIGHBOURS_A_SAVE: Final = 8
_DIGITS: Final = re.compile(r"[0-9]+")


@dataclass
class Waiting:
    """A place that is looked at again with later saves, ever less often. Not thread-safe: one thread works.

    Attributes:
        path: Directory of the checkpoint.
        prefix: Attempt in it; empty when it is about all of them.
    """

    path: str
    prefix: str = ""
    _saves: int = 0
    _looks: int = 0

    def is_due(self) -> bool:
        """Counts a save; returns True when the place is to be looked at."""
        self._saves += 1
        if self._saves < 2**self._looks:
            return False
        self._looks += 1
        return True

    @property
    def is_given_up(self) -> bool:
        """True when it has been looked at often enough."""
        return self._looks >= _MOST_LOOKS


@dataclass
class Neighbours:
    """Directories beside those that a process saves to, by the directory above them.

    Attributes:
        ahead: Those that are to be looked at, the nearest step first.
        waiting: Those that held an attempt that was not whole.
    """

    ahead: dict[str, list[CheckpointFiles]] = field(default_factory=dict)
    waiting: list[tuple[CheckpointFiles, Waiting]] = field(default_factory=list)


@dataclass
class CatchingUp:
    """What is left to do for earlier saves of a session.

    Attributes:
        unregistered: Saves that the service does not know yet, by (part, step).
        running: Attempts of this process that are being finished, by directory and prefix.
        neighbours: Directories in which another process may have left something.
        lock: Held while a thread works.
    """

    unregistered: dict[tuple[str, int], Waiting] = field(default_factory=dict)
    running: set[tuple[str, str]] = field(default_factory=set)
    neighbours: Neighbours = field(default_factory=Neighbours)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def look_again_at(self, files: CheckpointFiles) -> None:
        """Has later saves look at a directory in which an attempt was not whole."""
        self.neighbours.waiting.append((files, Waiting(str(files.root))))


def catch_up(runtime: Runtime, files: CheckpointFiles, step: int, *, is_committed: bool, exports: bool) -> None:
    """Does for earlier saves what is left to do; best effort, on the coordinator, never raises.

    Args:
        runtime: The session of this process.
        files: Directory of the save that has just ended.
        step: Its step.
        is_committed: The service answers: it may be told what it missed.
        exports: Write DCP's own ``.metadata`` too.
    """
    left = runtime.catching_up
    client = runtime.plain_client if is_committed and left.unregistered else None
    if not left.lock.acquire(blocking=False):
        return
    try:
        work = partial(_work, runtime, client, files, step, exports=exports)
        thread = threading.Thread(target=work, name="shardbook-sync", daemon=True)
        thread.start()
    except RuntimeError:  # the interpreter ends: the next process looks after it
        left.lock.release()
        return
    thread.join(_PATIENCE_S)


def _work(runtime: Runtime, client: Client | None, files: CheckpointFiles, step: int, *, exports: bool) -> None:
    left = runtime.catching_up
    try:
        with best_effort("fold earlier attempts"):
            _fold_earlier(runtime, files, step, exports=exports)
        if client is not None:
            with best_effort("record earlier saves in the catalogue; the next save tries again"):
                _record_missing(runtime, client)
    finally:
        left.lock.release()


def _record_missing(runtime: Runtime, client: Client) -> None:
    """Brings the session's earlier saves into the catalogue."""
    waiting = runtime.catching_up.unregistered
    for place, one in list(waiting.items()):
        if not one.is_due():
            continue
        found = sync_directory(client, one.path, stores=runtime.config.stores)
        own = next((result for result in found if result.prefix == one.prefix), None)
        if own is not None and own.is_settled:
            _LOG.info("%s is in the catalogue now", encodable(one.path))
        elif own is not None and _may_come(own) and not one.is_given_up:
            _LOG.warning("%s is not in the catalogue yet: %s", encodable(one.path), own.message)
            continue
        else:
            why = "its files are gone" if own is None else own.message
            _LOG.warning(
                "%s is not in the catalogue, and later saves leave it alone: %s. `shardbook sync` records it once it "
                "can be",
                encodable(one.path),
                why,
            )
        if waiting.get(place) is one:
            del waiting[place]


def _may_come(result: SyncedAttempt) -> bool:
    """True for what time may heal: ranks that are late, a storage that fails now."""
    return result.outcome is SyncOutcome.INCOMPLETE or result.reason in ("UNREADABLE", "STORAGE_FAILED")


def _fold_earlier(runtime: Runtime, files: CheckpointFiles, step: int, *, exports: bool) -> None:
    """Folds complete sets of records of this run whose coordinator is gone, here and in directories beside this one."""
    neighbours = runtime.catching_up.neighbours
    _fold(runtime, files, exports=exports, is_own=True)
    for one, waiting in list(neighbours.waiting):
        if waiting.is_due() and (_fold_near(runtime, one, exports=exports) or waiting.is_given_up):
            neighbours.waiting.remove((one, waiting))
    _fold_next(runtime, files, step, exports=exports)


def _fold_next(runtime: Runtime, files: CheckpointFiles, step: int, *, exports: bool) -> None:
    """Looks at some of the directories beside this one that nobody of this process has looked at."""
    neighbours = runtime.catching_up.neighbours
    above = files.beside("")
    if above is None:
        return
    ahead = neighbours.ahead.get(above.place)
    if ahead is None:
        ahead = neighbours.ahead[above.place] = _nearest(files, above, step)
    chosen, ahead[:] = ahead[:_NEIGHBOURS_A_SAVE], ahead[_NEIGHBOURS_A_SAVE:]
    for one in chosen:
        if not _fold_near(runtime, one, exports=exports):
            runtime.catching_up.look_again_at(one)


def _nearest(files: CheckpointFiles, above: CheckpointFiles, step: int) -> list[CheckpointFiles]:
    """Returns the directories beside a checkpoint's that end in a step, the nearest first."""
    own = str(files.root).rstrip("/").rpartition("/")[2]
    steps = {name: int(digits[-1]) for name in above.names("") if name != own and (digits := _DIGITS.findall(name))}
    chosen = sorted(steps, key=lambda name: (abs(steps[name] - step), name))[:_MOST_NEIGHBOURS]
    return [one for name in chosen if (one := files.beside(name)) is not None]


def _fold_near(runtime: Runtime, files: CheckpointFiles, *, exports: bool) -> bool:
    """Folds what is whole in a directory; returns True when nothing there is left to wait for."""
    with best_effort(f"look after {encodable(str(files.root))}"):
        return _fold(runtime, files, exports=exports, is_own=False)
    return False


def _fold(runtime: Runtime, files: CheckpointFiles, *, exports: bool, is_own: bool) -> bool:
    """Folds what is whole in a directory and makes it mean its newest attempt; returns False when sets are not whole.

    Args:
        runtime: The session of this process.
        files: The directory.
        exports: Write ``.metadata`` too.
        is_own: This process has just made it mean its newest manifest.
    """
    left, run = runtime.catching_up, runtime.session.run
    listed = list_attempts(files)

    def is_mine(one: FoundAttempt) -> bool:
        is_running = (files.place, one.prefix) in left.running
        return one.identity is not None and one.identity.run == run and not is_running

    folded_count, waiting_count = fold_sets(files, listed, is_mine)
    if folded_count:
        place = encodable(str(files.root))
        _LOG.info("%d attempts in %s were whole and had no coordinator any more: folded", folded_count, place)
    if folded_count or (not is_own and any(map(is_mine, find_manifests(files, listed)))):
        settle(files, (lambda one: export_dcp_metadata(str(files.root), one)) if exports else None)
    return not waiting_count


__all__ = ["CatchingUp", "Waiting", "catch_up"]
