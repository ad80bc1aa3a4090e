"""Makes the newest attempt what a checkpoint directory means: its manifest on top, and its export as ``.metadata``.

Several may publish into one directory at the same time (two attempts' coordinators, a sync, a load, a later save),
and any of them may be killed between two files. Nothing but whole files and their names is shared, so everyone looks
again after what it wrote, and repairs until it finds nothing to write: whoever writes last has looked last. What a
killed one left undone, the next one finds. Decision 0015.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final
from weakref import WeakValueDictionary

from shardbook._attempts import (
    DirectoryFiles,
    FoundAttempt,
    find_manifests,
    find_record_sets,
    list_attempts,
    newest_of,
    read_exported,
    read_identity,
)
from shardbook._trees import in_blocks
from shardbook.core import directory as names
from shardbook.core.exported import Exported, Fingerprint, noted
from shardbook.core.fold import FoldedAttempt, unfold
from shardbook.core.manifest import Manifest
from shardbook.errors import CorruptManifestError, InvalidGeometryError
from shardbook.stores import encodable

_LOG = logging.getLogger(__name__)

#: Makes the content of DCP's own ``.metadata`` of a folded attempt, as a whole or in blocks.
Export = Callable[[FoldedAttempt], bytes | Iterable[bytes]]

#: Looks after which a publisher leaves it to the others: each of them writes less than once a look.
_MOST_LOOKS: Final = 16
#: What reading a file says that somebody replaces at this moment, on network filesystems too.
_CHANGED: Final = frozenset((errno.ENOENT, errno.ESTALE))


class _Lock:
    """A lock that can be referred to weakly."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


_locks: WeakValueDictionary[str, _Lock] = WeakValueDictionary()
_locks_lock: Final = threading.Lock()


@contextmanager
def _alone_in_process(place: str) -> Iterator[None]:
    """Holds a directory's lock: threads of one process need not repair what they did to each other."""
    with _locks_lock:
        held = _locks.setdefault(place, _Lock())
    with held.lock:
        yield


def publish(files: DirectoryFiles, folded: FoldedAttempt, export: Export | None) -> tuple[str, ...]:
    """Leaves an attempt's manifest and makes the newest attempt what the directory means; see ``settle``.

    The records stay: a coordinator that is alive may be counting them.

    Args:
        files: The directory.
        folded: The attempt, which has just been saved: a ``.metadata`` of somebody else's does not stand in its way.
        export: Makes ``.metadata``; None leaves that file alone.

    Returns:
        What could not be written, for people; the checkpoint is whole without it.

    Raises:
        OSError: A manifest could not be written.
    """
    files.write(names.manifest_path(folded.manifest.identity.prefix), folded.manifest.to_bytes())
    return settle(files, export, own=folded)


def export_dcp_metadata(directory: str, folded: FoldedAttempt) -> Iterator[bytes]:
    """Returns the content of DCP's own ``.metadata``, in blocks, as a save into ``directory`` would have written it."""
    return folded.dcp_metadata(folded.header(directory))


def settle(files: DirectoryFiles, export: Export | None, own: FoldedAttempt | None = None) -> tuple[str, ...]:
    """Makes the newest attempt that has a manifest what the directory means. Writes nothing where nothing is wrong.

    A ``.metadata`` that plain DCP wrote later than that attempt is left alone, and so is the directory then.

    Args:
        files: The directory.
        export: Makes ``.metadata``; None leaves that file alone.
        own: An attempt that the caller has just saved and left the manifest of; None when it only repairs.

    Returns:
        What could not be written, for people.

    Raises:
        OSError: The storage failed.
    """
    with _alone_in_process(files.place):
        return _Settling(files, export, own).run()


def fold_sets(
    files: DirectoryFiles, listed: Mapping[str, frozenset[str]], is_mine: Callable[[FoundAttempt], bool]
) -> tuple[int, int]:
    """Leaves the manifests of attempts that are whole and that nobody has folded; their records stay.

    Args:
        files: The directory.
        listed: What every attempt left in it, see ``list_attempts``.
        is_mine: Says of an attempt whether it is to be folded.

    Returns:
        How many were folded, and how many are not whole yet.

    Raises:
        OSError: The storage failed.
    """
    folded_count = waiting_count = 0
    for one in filter(is_mine, find_record_sets(files, listed)):
        if not one.is_unfolded:
            waiting_count += 1
            continue
        try:
            manifest, _ = one.read()
        except (CorruptManifestError, InvalidGeometryError) as error:
            _LOG.warning("the records of attempt %s make no checkpoint: %s", one.prefix, error)
            continue
        files.write(names.manifest_path(one.prefix), manifest.to_bytes())
        folded_count += 1
    return folded_count, waiting_count


class _Settling:
    """One publisher at work on a directory."""

    def __init__(self, files: DirectoryFiles, export: Export | None, own: FoldedAttempt | None) -> None:
        self._files = files
        self._export = export
        self._own = own
        self._damaged: set[str] = set()
        self._written: str | None = None
        self._problems: list[str] = []

    def run(self) -> tuple[str, ...]:
        """Looks and writes until there is nothing to write."""
        for _ in range(_MOST_LOOKS):
            try:
                if not self._step():
                    break
            except OSError as error:
                if error.errno not in _CHANGED:
                    raise
        else:
            self._note("others kept writing into the directory; `shardbook sync` looks after it")
        return tuple(self._problems)

    def _step(self) -> bool:
        """Looks once; returns True when something was written, or another look is needed."""
        listed = list_attempts(self._files)
        newest = newest_of(one for one in find_manifests(self._files, listed) if one.prefix not in self._damaged)
        if newest is None or newest.identity is None:
            return False
        exported = read_exported(self._files, listed)
        is_own = self._is_own(newest)
        if exported.foreign_s is not None and not is_own and newest.is_older_than(exported.foreign_s):
            return False
        if self._own is not None and not is_own:
            self._note(f"{names.MANIFEST} belongs to a newer attempt, {newest.prefix}, and was left alone")
        top = read_identity(self._files, names.MANIFEST)
        try:
            if top is None or top.prefix != newest.prefix:
                self._files.write(names.MANIFEST, self._manifest(newest).to_bytes())
                return True
            return self._put_metadata(newest, exported)
        except CorruptManifestError as error:
            _LOG.warning("the manifest of attempt %s is damaged and passed over: %s", newest.prefix, error)
            self._damaged.add(newest.prefix)
            return True

    def _put_metadata(self, newest: FoundAttempt, exported: Exported) -> bool:
        if exported.prefix == newest.prefix or names.UNEXPORTED_NAME in newest.listed:
            return False
        if not exported.is_known and (self._own is None or self._written == newest.prefix):
            return False  # nobody can say whose it is
        if exported.is_there and exported.prefix is None and exported.foreign_s is None and self._own is None:
            return False  # somebody else's, and nobody can say when they wrote it
        if self._export is None:
            self._note(
                f"{names.DCP_METADATA} is not that of {newest.prefix}, the newest attempt, and plain DCP needs it: "
                "run `shardbook sync`"
            )
            return False

        def leave_mark(mark: Fingerprint) -> None:
            self._files.write(names.mark_path(newest.prefix, mark.mark), mark.to_bytes())

        try:
            content = in_blocks(self._export(self._folded(newest)))
            self._files.write(names.DCP_METADATA, noted(content, leave_mark))
        except CorruptManifestError:
            raise
        except Exception as error:  # noqa: BLE001 - its loss costs plain DCP the checkpoint, not Shardbook
            _LOG.warning("%s was not written: plain DCP cannot load this checkpoint", names.DCP_METADATA, exc_info=True)
            self._note(encodable(f"{names.DCP_METADATA} was not written: {error}"))
            return False
        self._written = newest.prefix
        return True

    def _is_own(self, one: FoundAttempt) -> bool:
        return self._own is not None and self._own.manifest.identity.prefix == one.prefix

    def _manifest(self, one: FoundAttempt) -> Manifest:
        return self._own.manifest if self._own is not None and self._is_own(one) else one.read()[0]

    def _folded(self, one: FoundAttempt) -> FoldedAttempt:
        return self._own if self._own is not None and self._is_own(one) else unfold(one.read()[0])

    def _note(self, problem: str) -> None:
        if problem not in self._problems:
            self._problems.append(problem)
