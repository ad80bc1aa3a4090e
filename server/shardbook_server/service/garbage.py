"""Drops what nobody refers to and nobody used for a while, beside servers that go on.

Found in one read transaction a project, then dropped in short write transactions that look again: what got a reference
or was used in between stays. Who sent something that is gone is asked for it again (``structure_unknown``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import numpy as np

from shardbook.core.columns import BoolArray, Int64Array
from shardbook.core.names import RunName
from shardbook.core.structure import BlobKind
from shardbook.errors import UnavailableError
from shardbook_server.service import closing
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import claims as claim_rows
from shardbook_server.storage import garbage as rows
from shardbook_server.storage import retention as retention_rows
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage.blobs import DAY_US
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.lists import unpack_ids

T = TypeVar("T")

#: Days without use, unless told otherwise.
OLDER_THAN_DAYS: Final = 7
#: Kinds of things that are dropped, for people, in the order of a report.
DELETED, ATTEMPTS = "deleted checkpoints", "abandoned attempts"
STRUCTURES, TENSORS, DECISIONS = "checkpoint structures", "tensors", "save plans"
_BLOBS: Final = {
    BlobKind.STRUCTURE: "rank structures",
    BlobKind.PLAN: "rank plans",
    BlobKind.TABLE: "rank tables",
}
KINDS: Final = (DELETED, ATTEMPTS, STRUCTURES, TENSORS, *_BLOBS.values(), DECISIONS)
#: How long one transaction may hold up the others, about, seconds; and how many rows it drops, first and at most.
_HELD_S: Final = 0.1
_FIRST_COUNT, _MOST = 32, 500
#: A batch that lost its connection, or got in somebody's way, is made again so often, after so long.
_AGAIN_COUNT, _AGAIN_PAUSE_S = 5, 0.5


@dataclass(frozen=True)
class Collected:
    """What was dropped of a kind, or would be.

    Attributes:
        kind: One of ``KINDS``.
        count: How many.
        size_bytes: Bytes of their payloads; a database gives room back to itself first.
    """

    kind: str
    count: int
    size_bytes: int


@dataclass(frozen=True)
class _Ending:
    """What becomes of checkpoints when they are due.

    Attributes:
        kind: One of ``KINDS``.
        find: Returns (checkpoint, part) of those due at a time, behind a checkpoint, so many.
        size: Returns the bytes that go with one.
        end: Ends one, under the lock of its run; False where something keeps it.
    """

    kind: str
    find: Callable[[Connection, int, int, int], Sequence[tuple[int, int]]]
    size: Callable[[Connection, int], int]
    end: Callable[[Connection, int, int], bool]


def _purge(connection: Connection, checkpoint_id: int, now_us: int) -> bool:
    if claim_rows.find_held(connection, [checkpoint_id], now_us):
        return False
    row = checkpoint_rows.find_by_id(connection, checkpoint_id)
    retention_rows.purge(connection, checkpoint_id, row.flags)
    return True


def _give_up(connection: Connection, checkpoint_id: int, _: int) -> bool:
    checkpoint_rows.expire_record(connection, checkpoint_id)
    closing.empty_staging(connection, [checkpoint_id])
    return True


#: A deleted checkpoint may have been brought back since it was found, or its files may be going; writers of an
#: abandoned attempt may have come back.
_PURGED: Final = _Ending(DELETED, retention_rows.find_purgeable, retention_rows.kept_bytes, _purge)
_GIVEN_UP: Final = _Ending(ATTEMPTS, rows.find_abandoned, rows.staged_bytes, _give_up)


class _Marks:
    """Keys that are in use."""

    def __init__(self) -> None:
        self._seen: BoolArray = np.zeros(1024, np.bool_)

    def add(self, keys: Int64Array) -> None:
        """Marks keys."""
        top = int(keys.max(initial=0))
        if top >= len(self._seen):
            self._seen = np.concatenate([self._seen, np.zeros(max(top + 1, len(self._seen)), np.bool_)])
        self._seen[keys] = True

    def lacks(self, keys: Int64Array) -> BoolArray:
        """Returns True for the keys that are not marked."""
        return ~self._seen[np.minimum(keys, len(self._seen) - 1)] | (keys >= len(self._seen))


@dataclass(eq=False)
class _Found:
    """What a project could do without, as of one moment.

    Attributes:
        project_id: Key of the project.
        structures: Checkpoint structures, as (N, 2) keys and bytes; so are the others.
        tensors: See above.
        blobs: See above, by kind.
        ranks_used: Blobs that packed lists refer to.
        tensors_used: Tensors that they refer to.
        scanned_id: The last structure whose lists are among them.
    """

    project_id: int
    structures: Int64Array
    tensors: Int64Array
    blobs: dict[BlobKind, Int64Array]
    ranks_used: _Marks
    tensors_used: _Marks
    scanned_id: int

    def use(self, rank_structure_ids: bytes, tensor_ids: bytes) -> None:
        """Marks what a structure refers to."""
        self.ranks_used.add(unpack_ids(rank_structure_ids))
        self.tensors_used.add(unpack_ids(tensor_ids))

    def catch_up(self, connection: Connection) -> None:
        """Marks what structures refer to that came since; under the project's lock no more can come."""
        for structure_id, rank_ids, tensor_ids in rows.read_lists_behind(connection, self.project_id, self.scanned_id):
            self.use(rank_ids, tensor_ids)
            self.scanned_id = structure_id


class GarbageService:
    """Finds and drops. One at a time is enough; two do not harm each other."""

    def __init__(self, database: Database) -> None:
        """Keeps no state of its own."""
        self._database = database
        self._totals: dict[str, list[int]] = {}

    def collect(self, *, older_than_days: int = OLDER_THAN_DAYS, dry_run: bool = False) -> list[Collected]:
        """Drops what nobody refers to and nobody used for so many whole days; returns what, by kind.

        Of a deleted checkpoint that cannot be brought back any more nothing but its row is kept. An attempt that
        expired so long ago, and whose writers never came back, is given up with what it staged.

        Args:
            older_than_days: 0 or more.
            dry_run: Only say what would be dropped. What only abandoned attempts hold is not among it.

        Raises:
            ShardbookError: The database failed; what was dropped until then is.
        """
        self._totals = {kind: [0, 0] for kind in KINDS}
        with self._database.read() as connection:
            now_us = self._database.now_us(connection)
            project_ids = rows.read_projects(connection)
        # A day is as exact as the last use is known.
        last_day = now_us // DAY_US - (older_than_days + 1 if older_than_days else 0)
        self._end(_PURGED, now_us, dry_run=dry_run)
        self._end(_GIVEN_UP, now_us - older_than_days * DAY_US, dry_run=dry_run)
        for project_id in project_ids:
            found = self._find(project_id, last_day)
            if dry_run:
                self._report(found, last_day)
            else:
                self._drop(found, last_day)
        return [Collected(kind, *self._totals[kind]) for kind in KINDS]

    def _end(self, what: _Ending, due_us: int, *, dry_run: bool) -> None:
        """Ends every checkpoint that is due for it."""
        after_id = 0
        while True:
            with self._database.read() as connection:
                page = what.find(connection, due_us, after_id, _MOST)
                names = {part_id: run_rows.part_by_id(connection, part_id).name for _, part_id in page}
                sizes = {checkpoint_id: what.size(connection, checkpoint_id) for checkpoint_id, _ in page}
            for after_id, part_id in page:
                end = partial(self._end_one, what, after_id, names[part_id].run, due_us)
                if dry_run or self._again(end):
                    self._count(what.kind, 1, sizes[after_id])
            if len(page) < _MOST:
                return

    def _end_one(self, what: _Ending, checkpoint_id: int, run: RunName, due_us: int) -> bool:
        with self._database.write([run]) as connection:
            still = what.find(connection, due_us, checkpoint_id - 1, 1)
            if [one for one, _ in still] != [checkpoint_id]:
                return False
            return what.end(connection, checkpoint_id, due_us)

    def _find(self, project_id: int, last_day: int, *, all_lists_count: bool = False) -> _Found:
        """Finds what a project could do without; ``all_lists_count`` when unused structures have been dropped."""
        nothing = np.zeros((0, 2), np.int64)
        found = _Found(project_id, nothing, nothing, {}, _Marks(), _Marks(), 0)
        with self._database.read() as connection:
            structures = []
            for one in rows.walk_lists(connection, project_id, last_day):
                found.scanned_id = max(found.scanned_id, one.id)
                if one.is_garbage and not all_lists_count:
                    structures.append((one.id, one.size_bytes))
                else:
                    found.use(one.rank_structure_ids, one.tensor_ids)
            found.structures = _pairs(structures)
            pages = [_pairs(page) for page in rows.walk_tensors(connection, project_id)]
            found.tensors = np.concatenate([page[found.tensors_used.lacks(page[:, 0])] for page in pages])
            self._find_blobs(connection, found, last_day)
        return found

    def _find_blobs(self, connection: Connection, found: _Found, last_day: int) -> None:
        """Finds unused blobs, from those that refer to others down to those that are only referred to."""
        kept = _Marks()
        kept.add(np.fromiter(rows.read_staged_blobs(connection), np.int64))
        garbage: dict[BlobKind, list[tuple[int, int]]] = {kind: [] for kind in _BLOBS}
        for page in rows.walk_blobs(connection, found.project_id):
            keys = np.array([blob.id for blob in page], np.int64)
            unmarked = kept.lacks(keys) & found.ranks_used.lacks(keys)
            referred = []
            for blob, is_unmarked in zip(page, unmarked.tolist(), strict=True):
                if is_unmarked and blob.last_used_day <= last_day:
                    garbage[BlobKind(blob.kind)].append((blob.id, blob.size_bytes))
                elif blob.reference_id is not None:
                    referred.append(blob.reference_id)
            kept.add(np.array(referred, np.int64))
        found.blobs = {kind: _pairs(some) for kind, some in garbage.items()}

    def _report(self, found: _Found, last_day: int) -> None:
        some = {STRUCTURES: found.structures, TENSORS: found.tensors}
        some |= {name: found.blobs[kind] for kind, name in _BLOBS.items()}
        for name, pairs in some.items():
            self._count(name, len(pairs), int(pairs[:, 1].sum()))
        with self._database.read() as connection:
            self._count(DECISIONS, *rows.count_decisions(connection, found.project_id, last_day))

    def _drop(self, found: _Found, last_day: int) -> None:
        lock = f"structures/{found.project_id}"
        if len(found.structures):

            def drop_structures(connection: Connection, keys: Sequence[int]) -> list[int]:
                return rows.drop_structures(connection, keys, last_day)

            self._drop_pairs(STRUCTURES, found.structures, lock, drop_structures)
            # Some may have been wanted after all: what they refer to then stays as well.
            found = self._find(found.project_id, last_day, all_lists_count=True)

        def drop_tensors(connection: Connection, keys: Sequence[int]) -> list[int]:
            found.catch_up(connection)
            return rows.drop_tensors(connection, _still(found.tensors_used, keys))

        def drop_blobs(connection: Connection, keys: Sequence[int]) -> list[int]:
            found.catch_up(connection)
            return rows.drop_blobs(connection, _still(found.ranks_used, keys), last_day)

        self._drop_pairs(TENSORS, found.tensors, lock, drop_tensors)
        for kind, name in _BLOBS.items():
            self._drop_pairs(name, found.blobs[kind], lock, drop_blobs)
        self._drop_decisions(found.project_id, last_day)

    def _drop_pairs(
        self, name: str, pairs: Int64Array, lock: str, drop: Callable[[Connection, Sequence[int]], list[int]]
    ) -> None:
        """Drops rows given as keys and bytes, batch by batch."""
        gone: list[int] = []
        for keys in _batches(pairs[:, 0]):

            def write(some: Sequence[int] = keys) -> list[int]:
                with self._database.write(lock=lock) as connection:
                    return drop(connection, some)

            gone.extend(self._again(write))
        self._count(name, len(gone), int(pairs[np.isin(pairs[:, 0], gone), 1].sum()))

    def _drop_decisions(self, project_id: int, last_day: int) -> None:
        def write() -> tuple[int, int]:
            with self._database.write(lock=f"decisions/{project_id}") as connection:
                return rows.drop_decisions(connection, project_id, last_day, _FIRST_COUNT)

        while True:
            count, size_bytes = self._again(write)
            self._count(DECISIONS, count, size_bytes)
            if count < _FIRST_COUNT:
                return

    def _count(self, kind: str, count: int, size_bytes: int) -> None:
        self._totals[kind][0] += count
        self._totals[kind][1] += size_bytes

    @staticmethod
    def _again(write: Callable[[], T]) -> T:
        """Makes a write again that met a busy or absent database: it drops what is still there."""
        for _ in range(_AGAIN_COUNT):
            try:
                return write()
            except UnavailableError:
                time.sleep(_AGAIN_PAUSE_S)
        return write()


def _batches(keys: Int64Array) -> Iterator[list[int]]:
    """Yields keys in batches that take about _HELD_S each, and lets the others have their turn in between."""
    at, count = 0, _FIRST_COUNT
    while at < len(keys):
        began_s = time.monotonic()
        yield keys[at : at + count].tolist()
        took_s = time.monotonic() - began_s
        at += count
        count = min(_MOST, 2 * count) if took_s < _HELD_S / 2 else max(1, count // 2) if took_s > _HELD_S else count
        if at < len(keys):
            time.sleep(min(took_s, _HELD_S))


def _pairs(some: Sequence[tuple[int, int]]) -> Int64Array:
    return np.array(some, np.int64).reshape(-1, 2)


def _still(used: _Marks, keys: Sequence[int]) -> list[int]:
    """Returns the keys that are still not in use."""
    some = np.array(keys, np.int64)
    still: list[int] = some[used.lacks(some)].tolist()
    return still
