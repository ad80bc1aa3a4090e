"""Publishers as processes of their own over one directory in memory, made to take turns at every look and write."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from shardbook._publishing import publish
from shardbook._trees import in_blocks
from shardbook.core import directory as names
from shardbook.core.exported import FileFacts
from shardbook.core.fold import FoldedAttempt, fold
from shardbook.core.manifest import AttemptIdentity, Manifest
from tests.behaviour.client.directories import record

#: How long a test waits for a publisher that does nothing, seconds.
_PATIENCE_S: Final = 30.0


class Killed(BaseException):
    """The process ends here."""


@dataclass
class Store:
    """A directory: contents and times of writing by path. Time goes on with every write."""

    contents: dict[str, bytes] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    now_s: float = 0.0

    def put(self, path: str, content: bytes) -> None:
        """Writes a file in one step."""
        self.contents[path] = content
        self.now_s += 1.0
        self.times[path] = self.now_s


@dataclass(frozen=True)
class MemoryFiles:
    """One process's view of a store; ``turn`` is called before each look and write."""

    store: Store
    place: str
    turn: Callable[[], None] = lambda: None

    def names(self, path: str) -> list[str]:
        """Lists."""
        self.turn()
        below = [name.removeprefix(f"{path}/") for name in self.store.contents if name.startswith(f"{path}/")]
        return sorted({name.partition("/")[0] for name in below})

    def read(self, path: str, limit_bytes: int | None = None) -> bytes | None:
        """Reads."""
        self.turn()
        content = self.store.contents.get(path)
        return content if content is None else content[:limit_bytes]

    def facts(self, path: str) -> FileFacts | None:
        """Says size and time."""
        self.turn()
        content = self.store.contents.get(path)
        return None if content is None else FileFacts(len(content), self.store.times[path])

    def tail(self, path: str, size_bytes: int, count: int) -> bytes:
        """Reads the end."""
        self.turn()
        return self.store.contents[path][max(0, size_bytes - count) : size_bytes]

    def write(self, path: str, content: bytes | Iterable[bytes]) -> None:
        """Writes."""
        whole = b"".join(in_blocks(content))
        self.turn()
        self.store.put(path, whole)


def export(folded: FoldedAttempt) -> bytes:
    """What stands for DCP's ``.metadata``: of one length for all attempts."""
    return b"metadata of " + folded.manifest.identity.prefix.encode()


def attempt(who: AttemptIdentity) -> FoldedAttempt:
    """A whole attempt."""
    return fold([record(who, rank) for rank in range(who.world_size)])


class Publisher:
    """A process that publishes an attempt, one look or write at a time."""

    def __init__(self, store: Store, folded: FoldedAttempt, place: str) -> None:
        self._go = threading.Semaphore(0)
        self._paused = threading.Semaphore(0)
        self._is_killed = False
        self.is_done = False
        self.error: BaseException | None = None
        self._files = MemoryFiles(store, place, self._turn)
        self._folded = folded
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._await()

    def _turn(self) -> None:
        self._paused.release()
        assert self._go.acquire(timeout=_PATIENCE_S)
        if self._is_killed:
            raise Killed

    def _run(self) -> None:
        try:
            publish(self._files, self._folded, export)
        except BaseException as error:  # noqa: BLE001 - the test is told
            self.error = error
        self.is_done = True
        self._paused.release()

    def _await(self) -> None:
        assert self._paused.acquire(timeout=_PATIENCE_S)

    def step(self, count: int = 1) -> int:
        """Lets it take up to ``count`` steps; returns how many it took."""
        taken = 0
        while taken < count and not self.is_done:
            self._go.release()
            self._await()
            taken += 1
        return taken

    def finish(self) -> None:
        """Lets it go on to its end."""
        while self.step():
            pass
        if self.error is not None and not isinstance(self.error, Killed):
            raise self.error

    def kill(self) -> None:
        """Ends it before its next step."""
        self._is_killed = True
        self.step()


def meaning(store: Store) -> tuple[str, bytes]:
    """Returns what a directory means: prefix of the manifest on top, and its ``.metadata``."""
    top = Manifest.from_bytes(store.contents[names.MANIFEST])
    return top.identity.prefix, store.contents[names.DCP_METADATA]


def meant(folded: FoldedAttempt) -> tuple[str, bytes]:
    """Returns what a directory should mean when an attempt is its newest."""
    return folded.manifest.identity.prefix, export(folded)


def play(publishers: Sequence[Publisher], turns: Sequence[int]) -> None:
    """Lets publishers take turns, then finish in order."""
    for turn in turns:
        publishers[turn % len(publishers)].step()
    for one in publishers:
        one.finish()
