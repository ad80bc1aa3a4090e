"""What Shardbook left in a checkpoint directory, attempt by attempt, and which of them is the newest; no torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Final, Protocol, TypeVar

from shardbook._side_by_side import side_by_side
from shardbook._trees import Tree
from shardbook.core import directory as names
from shardbook.core.container import read_index, read_section
from shardbook.core.exported import TAIL_BYTES, Exported, FileFacts, Fingerprint, is_saved_over
from shardbook.core.fold import FoldedAttempt, fold, missing_ranks, unfold
from shardbook.core.manifest import AttemptIdentity, Manifest, RegistrationRecord, StoredManifest
from shardbook.core.ranged import RangedManifest
from shardbook.errors import CorruptManifestError
from shardbook.stores import normalized

M = TypeVar("M", bound=StoredManifest)

_LOG = logging.getLogger(__name__)

#: Enough of a container's beginning to hold its index and identity.
_HEAD_BYTES: Final = 1 << 16


class DirectoryFiles(Protocol):
    """Small files of one checkpoint directory, by paths relative to it; raises OSError where the storage fails."""

    @property
    def place(self) -> str:
        """What two objects have in common when they are about one directory of one process."""
        ...

    def names(self, path: str) -> list[str]:
        """Returns the names in a directory, sorted; none when it is not there or cannot be listed."""
        ...

    def read(self, path: str, limit_bytes: int | None = None) -> bytes | None:
        """Returns a file's content, or its first bytes; None when it is not there."""
        ...

    def facts(self, path: str) -> FileFacts | None:
        """Returns size and age of a file; None when it is not there or the filesystem does not say."""
        ...

    def tail(self, path: str, size_bytes: int, count: int) -> bytes:
        """Returns the last ``count`` bytes of a file of ``size_bytes``."""
        ...

    def write(self, path: str, content: bytes | Iterable[bytes]) -> None:
        """Writes a file durably and as a whole, in place of an older one; makes its directory where it lacks.

        Of content in blocks no more than one is in memory; the last one is asked for before the file is there.
        """
        ...


@dataclass(frozen=True)
class TreeFiles:
    """A directory of a tree, as ``DirectoryFiles``."""

    tree: Tree
    directory: str

    @property
    def place(self) -> str:
        """What two objects have in common when they are about one directory of one process."""
        return normalized(self.directory)

    def names(self, path: str) -> list[str]:
        """Returns the names in a directory."""
        return self.tree.names(self._full(path))

    def read(self, path: str, limit_bytes: int | None = None) -> bytes | None:
        """Returns a file's content, or its first bytes."""
        return self.tree.read(self._full(path), limit_bytes)

    def facts(self, path: str) -> FileFacts | None:
        """Returns size and age of a file."""
        return self.tree.facts(self._full(path))

    def tail(self, path: str, size_bytes: int, count: int) -> bytes:
        """Returns the last bytes of a file."""
        return self.tree.tail(self._full(path), size_bytes, count)

    def write(self, path: str, content: bytes | Iterable[bytes]) -> None:
        """Writes a file."""
        self.tree.write(self._full(path), content)

    def _full(self, path: str) -> str:
        return f"{self.directory}/{path}"


@dataclass(frozen=True)
class FoundAttempt:
    """Files of one attempt.

    Attributes:
        files: The directory that they are in.
        prefix: Of the attempt.
        listed: Names in ``.shardbook/{prefix}``.
        manifest_path: Path of its manifest; None when there is none that can be read.
        identity: Who wrote it; None when nothing that says so is readable.
    """

    files: DirectoryFiles
    prefix: str
    listed: frozenset[str]
    manifest_path: str | None
    identity: AttemptIdentity | None

    @property
    def ranks(self) -> frozenset[int]:
        """Ranks that left a record."""
        return frozenset(rank for rank in map(names.rank_of_record, self.listed) if rank is not None)

    @property
    def missing_ranks(self) -> list[int]:
        """Ranks without a record, when there is no manifest either."""
        if self.manifest_path is not None or self.identity is None:
            return []
        ranks = self.ranks
        return [rank for rank in range(self.identity.world_size) if rank not in ranks]

    @property
    def is_unfolded(self) -> bool:
        """True when it is whole, and nobody has made a manifest of its records."""
        return self.manifest_path is None and self.identity is not None and not self.missing_ranks

    def read(self) -> tuple[Manifest, FoldedAttempt | None]:
        """Returns the manifest as it is stored; else the one that the records make, and what they were folded into.

        Raises:
            CorruptManifestError: What is there is damaged, or not whole.
            InvalidGeometryError: The ranks' chunks do not make whole tensors.
            OSError: The storage failed.
        """
        found = self._read()
        if found is None:
            raise CorruptManifestError(f"attempt {self.prefix} is not whole")
        return found

    def whole(self) -> FoldedAttempt | None:
        """Returns the attempt as columns; None when it is not whole. Raises as ``read`` does."""
        found = self._read()
        return None if found is None else found[1] or unfold(found[0])

    def stored(self) -> StoredManifest | None:
        """Returns the attempt's manifest, or the one that its records make; None when it is not whole.

        Of a manifest that is there its columns are not decoded. Raises as ``read`` does.
        """
        folded = self._folded()
        # A coordinator takes records away only when its manifest is there.
        return self._stored(_open) if folded is None else folded.manifest

    def manifest(self) -> Manifest | None:
        """Returns the manifest as it is stored, else the one that the records make; None when it is not whole.

        Raises as ``read`` does.
        """
        found = self._read()
        return None if found is None else found[0]

    def _read(self) -> tuple[Manifest, FoldedAttempt | None] | None:
        folded = self._folded()
        if folded is not None:
            return folded.manifest, folded
        stored = self._stored(_load)
        return None if stored is None else (stored, None)

    def _folded(self) -> FoldedAttempt | None:
        """Returns what a complete set of records makes; None where there is none, or a manifest."""
        is_listed = self.manifest_path is None and not self.missing_ranks
        records = read_records(self.files, self.prefix, sorted(self.ranks)) if is_listed else []
        if not records or len(records) < len(self.ranks) or missing_ranks(records):
            return None
        folded = fold(records)
        if folded.manifest.identity.prefix != self.prefix:
            raise CorruptManifestError(f"the records in {self.prefix} are of {folded.manifest.identity.prefix}")
        return folded

    def _stored(self, load: Callable[[DirectoryFiles, str], M | None]) -> M | None:
        """Returns the manifest that is there; of two copies the one that is whole, as far as it is read."""
        failure: CorruptManifestError | None = None
        for path in (names.manifest_path(self.prefix), names.MANIFEST):
            if path == names.MANIFEST and path != self.manifest_path and failure is None:
                continue
            try:
                manifest = load(self.files, path)
            except CorruptManifestError as error:
                failure = failure or error
                continue
            if manifest is not None and manifest.identity.prefix == self.prefix:
                return manifest
        if failure is not None:
            raise failure
        return None

    def is_older_than(self, foreign_s: float) -> bool:
        """Returns True when it was written before somebody else's ``.metadata``, seconds since the epoch.

        Somebody may have made its manifest long afterwards, so one older file is enough.
        """
        paths = [names.manifest_path(self.prefix), self.prefix]
        paths += [names.record_path(self.prefix, rank) for rank in sorted(self.ranks)[:1]]
        if not self.listed and self.manifest_path is not None:  # a copy of the newest manifest alone
            paths.append(self.manifest_path)
        return any(is_saved_over(foreign_s, self.files.facts(path)) for path in paths)


def _load(files: DirectoryFiles, path: str) -> Manifest | None:
    content = files.read(path)
    return None if content is None else Manifest.from_bytes(content)


def _open(files: DirectoryFiles, path: str) -> StoredManifest | None:
    """Returns a manifest to be read by range, where the filesystem can."""
    read_range = getattr(files, "read_range", None)
    facts = None if read_range is None else files.facts(path)
    if read_range is None or facts is None:
        return _load(files, path)
    return RangedManifest.open(lambda first, count: read_range(path, first, count), facts.size_bytes)


def list_attempts(files: DirectoryFiles) -> dict[str, frozenset[str]]:
    """Returns what every attempt left in ``.shardbook/{prefix}``, by prefix."""
    prefixes = filter(names.is_prefix, files.names(names.ROOT))
    return {prefix: frozenset(files.names(names.attempt_path(prefix))) for prefix in prefixes}


def find_manifests(files: DirectoryFiles, listed: Mapping[str, frozenset[str]]) -> list[FoundAttempt]:
    """Returns the attempts whose manifest can be read, as far as its beginning tells; none that is being deleted."""
    found = []
    for prefix, there in _kept(listed):
        path = names.manifest_path(prefix)
        identity = _identity_of(files, path, prefix) if names.MANIFEST_NAME in there else None
        if identity is not None:
            found.append(FoundAttempt(files, prefix, there, path, identity))
    top = read_identity(files, names.MANIFEST)
    # A copied directory may hold the newest manifest alone, and some filesystems list nothing.
    is_kept = top is not None and names.DELETED_NAME not in listed.get(top.prefix, ())
    if top is not None and is_kept and top.prefix not in {one.prefix for one in found}:
        found.append(FoundAttempt(files, top.prefix, listed.get(top.prefix, frozenset()), names.MANIFEST, top))
    return found


def find_attempts(files: DirectoryFiles, listed: Mapping[str, frozenset[str]] | None = None) -> list[FoundAttempt]:
    """Returns the attempts of a checkpoint directory, oldest first as far as clocks tell."""
    listed = list_attempts(files) if listed is None else listed
    found = {one.prefix: one for one in find_manifests(files, listed)}
    for prefix, there in _kept(listed):
        if prefix not in found and (there & {names.MANIFEST_NAME} or any(map(_is_record, there))):
            found[prefix] = _without_manifest(files, prefix, there)
    return sorted(found.values(), key=lambda one: (one.identity.write_time_s if one.identity else 0.0, one.prefix))


def find_record_sets(files: DirectoryFiles, listed: Mapping[str, frozenset[str]]) -> list[FoundAttempt]:
    """Returns the attempts that left records, whole or not, and that nobody has made a manifest of."""
    sets = {
        prefix: there
        for prefix, there in _kept(listed)
        if names.MANIFEST_NAME not in there and any(map(_is_record, there))
    }
    return [_without_manifest(files, prefix, there) for prefix, there in sets.items()]


def _kept(listed: Mapping[str, frozenset[str]]) -> list[tuple[str, frozenset[str]]]:
    """Returns the attempts that nobody is deleting."""
    return [(prefix, there) for prefix, there in listed.items() if names.DELETED_NAME not in there]


def _is_record(name: str) -> bool:
    return names.rank_of_record(name) is not None


def _without_manifest(files: DirectoryFiles, prefix: str, there: frozenset[str]) -> FoundAttempt:
    """Returns what is there of an attempt that has no manifest, or a damaged one.

    A damaged manifest beside a complete set of records is made anew from them. Sessions may differ from rank to rank:
    one that was cut off from the service knew session 0 only.
    """
    paths = [f"{names.attempt_path(prefix)}/{name}" for name in sorted(filter(_is_record, there))]
    identities = side_by_side(lambda path: _identity_of(files, path, prefix), paths)
    best = max((one for one in identities if one is not None), key=lambda one: one.session, default=None)
    path = names.manifest_path(prefix)
    if best is None and paths and (stored := _identity_of(files, path, prefix)) is not None:
        # A coordinator took the records away since they were listed.
        return FoundAttempt(files, prefix, there, path, stored)
    return FoundAttempt(files, prefix, there, None if paths else names.manifest_path(prefix), best)


def _identity_of(files: DirectoryFiles, path: str, prefix: str) -> AttemptIdentity | None:
    identity = read_identity(files, path)
    if identity is not None and identity.prefix != prefix:
        _LOG.warning("%s belongs to attempt %s and does not count here", path, identity.prefix)
        return None
    return identity


def read_identity(files: DirectoryFiles, path: str) -> AttemptIdentity | None:
    """Returns whose manifest or record a file is, without reading it whole; None when it is damaged or absent."""
    head = files.read(path, _HEAD_BYTES)
    if head is None:
        return None
    why = ""
    for content in (head, None):
        whole = content if content is not None else files.read(path)
        for kind in ("manifest", "registration record"):
            try:
                section = read_index(whole or b"", kind)["identity"]
                return AttemptIdentity.from_json(read_section(whole or b"", section, "identity"))
            except (CorruptManifestError, KeyError) as error:
                why = str(error)
    _LOG.warning("%s is damaged: %s", path, why)
    return None


def read_records(files: DirectoryFiles, prefix: str, ranks: Iterable[int]) -> list[RegistrationRecord]:
    """Returns the records that are there, by rank.

    Raises:
        CorruptManifestError: One is damaged.
        OSError: The storage failed.
    """
    contents = side_by_side(lambda rank: files.read(names.record_path(prefix, rank)), ranks)
    return [RegistrationRecord.from_bytes(content) for content in contents if content is not None]


def read_exported(files: DirectoryFiles, listed: Mapping[str, frozenset[str]]) -> Exported:
    """Returns whose ``.metadata`` is there: the mark of its fingerprint lies with the attempt that it speaks of.

    Args:
        files: The directory.
        listed: What every attempt left in it, see ``list_attempts``.
    """
    found = _match_exported(files, listed)
    if found.foreign_s is None:
        return found
    # Somebody may have replaced it, mark and all, since the listing: nobody's it is only when that is still so.
    return _match_exported(files, list_attempts(files))


def _match_exported(files: DirectoryFiles, listed: Mapping[str, frozenset[str]]) -> Exported:
    facts = files.facts(names.DCP_METADATA)
    if facts is None:
        is_there = files.read(names.DCP_METADATA, 1) is not None
        return Exported(is_there, is_known=not is_there)
    print_ = Fingerprint.of(facts.size_bytes, files.tail(names.DCP_METADATA, facts.size_bytes, TAIL_BYTES))
    for prefix, there in listed.items():
        if print_.mark in there:
            return Exported(True, prefix)
    top = read_identity(files, names.MANIFEST)
    if top is not None:
        is_marked = not listed and files.read(names.mark_path(top.prefix, print_.mark), 1) is not None
        if is_marked or Fingerprint.from_bytes(files.read(names.EXPORTED)) == print_:
            return Exported(True, top.prefix)
    return Exported(True, foreign_s=facts.mtime_s)


def is_newer(one: AttemptIdentity, other: AttemptIdentity) -> bool:
    """Returns True when ``one`` may take the place of ``other``; an attempt may take its own.

    Numbered sessions of one part have an order, and so have attempts of a session; else the clocks decide.
    """
    if (one.run, one.part) == (other.run, other.part):
        if one.incarnation == other.incarnation:
            return one.attempt >= other.attempt
        if one.session and other.session:
            return one.session > other.session
    return one.write_time_s >= other.write_time_s


def newest_identity(identities: Iterable[AttemptIdentity]) -> AttemptIdentity | None:
    """Returns the newest attempt; None of none. Whoever looks at the same ones finds the same.

    The order of ``is_newer`` may have circles (numbered and offline sessions, and clocks that disagree), so they are
    compared in an order that does not depend on who looks.
    """
    ordered = sorted(identities, key=lambda one: (one.write_time_s, one.prefix, one.session))
    return reduce(lambda best, one: one if is_newer(one, best) else best, ordered) if ordered else None


def newest_of(attempts: Iterable[FoundAttempt]) -> FoundAttempt | None:
    """Returns the attempt that a directory means; None of none. See ``newest_identity``."""
    known = {one.identity: one for one in attempts if one.identity is not None}
    return None if (newest := newest_identity(known)) is None else known[newest]


def newest_first(attempts: Iterable[FoundAttempt]) -> list[FoundAttempt]:
    """Returns attempts in the order in which they would take each other's place; those of unknown writers last."""
    rest, ordered = list(attempts), []
    while (best := newest_of(rest)) is not None:
        ordered.append(best)
        rest.remove(best)
    return ordered + rest
