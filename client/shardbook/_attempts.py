"""What Shardbook left in a checkpoint directory, attempt by attempt. Reads, folds, and writes manifests; no torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from shardbook._trees import Tree
from shardbook.core import directory as files
from shardbook.core.container import read_index, read_section
from shardbook.core.exported import TAIL_BYTES, Fingerprint, foreign_since, is_saved_over
from shardbook.core.fold import FoldedAttempt, fold
from shardbook.core.manifest import AttemptIdentity, Manifest, RegistrationRecord
from shardbook.errors import CorruptManifestError

_LOG = logging.getLogger(__name__)

#: Makes the content of DCP's own ``.metadata`` from the directory and what its records were folded into.
Exporter = Callable[[str, FoldedAttempt], bytes]
#: Enough of a container's beginning to hold its index and identity.
_HEAD_BYTES: Final = 1 << 16


@dataclass(frozen=True)
class FoundAttempt:
    """Files of one attempt.

    Attributes:
        tree: The tree that they are in.
        directory: Path or URL of the checkpoint directory.
        prefix: Of the attempt.
        manifest_path: Path of its manifest; None when there is none.
        identity: Who wrote it; None when nothing that says so is readable.
        ranks: Ranks that left a record.
    """

    tree: Tree
    directory: str
    prefix: str
    manifest_path: str | None
    identity: AttemptIdentity | None
    ranks: frozenset[int]

    @property
    def missing_ranks(self) -> list[int]:
        """Ranks without a record, when there is no manifest either."""
        if self.manifest_path is not None or self.identity is None:
            return []
        return [rank for rank in range(self.identity.world_size) if rank not in self.ranks]

    def read(self) -> tuple[Manifest, FoldedAttempt | None]:
        """Returns the manifest as it is stored; else the one that the records make, and what they were folded into.

        Raises:
            CorruptManifestError: What is there is damaged.
            InvalidGeometryError: The ranks' chunks do not make whole tensors.
        """
        records = self._records() if self.manifest_path is None else []
        if len(records) < len(self.ranks) or self.manifest_path is not None:
            # A coordinator takes records away only when its manifest is there.
            content = self.tree.read(self.manifest_path or self._path(files.manifest_path(self.prefix)))
            if content is not None:
                return Manifest.from_bytes(content), None
        folded = fold(records)
        return folded.manifest, folded

    def publish(self, folded: FoldedAttempt, export: Exporter | None) -> None:
        """Leaves what records were folded into; the records stay, a live coordinator may be counting them.

        Args:
            folded: What they were folded into.
            export: Makes the content of DCP's own ``.metadata``; None leaves that file alone.

        Raises:
            OSError: The directory cannot be written.
        """
        manifest = folded.manifest
        content = manifest.to_bytes()
        self.tree.write(self._path(files.manifest_path(self.prefix)), content)
        newest = read_identity(self.tree, self._path(files.MANIFEST))
        if (newest is None or is_newer(manifest.identity, newest)) and not self._is_saved_over():
            self.tree.write(self._path(files.MANIFEST), content)
            if export is not None:
                exported = export(self.directory, folded)
                own = Fingerprint.of(len(exported), exported)
                self.tree.write(self._path(files.EXPORTED), own.to_bytes())
                self.tree.write(self._path(files.DCP_METADATA), exported)

    def _is_saved_over(self) -> bool:
        """True when plain DCP has saved into the directory since the ranks left their records."""
        path = self._path(files.DCP_METADATA)
        facts = self.tree.facts(path)
        size_bytes = 0 if facts is None else facts.size_bytes
        exported = self.tree.read(self._path(files.EXPORTED))
        foreign_s = foreign_since(facts, lambda: self.tree.tail(path, size_bytes, TAIL_BYTES), exported)
        records = [self._path(files.record_path(self.prefix, rank)) for rank in sorted(self.ranks)[:1]]
        return any(is_saved_over(foreign_s, self.tree.facts(record)) for record in records)

    def _path(self, name: str) -> str:
        return f"{self.directory}/{name}"

    def _records(self) -> list[RegistrationRecord]:
        records = []
        for rank in sorted(self.ranks):
            content = self.tree.read(self._path(files.record_path(self.prefix, rank)))
            if content is not None:
                records.append(RegistrationRecord.from_bytes(content))
        return records


def find_attempts(tree: Tree, directory: str) -> Iterator[FoundAttempt]:
    """Yields the attempts of a checkpoint directory, oldest first as far as clocks tell."""
    found = [_look(tree, directory, name) for name in tree.names(f"{directory}/{files.ROOT}") if files.is_prefix(name)]
    attempts = [attempt for attempt in found if attempt is not None]
    top = read_identity(tree, f"{directory}/{files.MANIFEST}")
    # A copied directory may hold the newest manifest alone.
    if top is not None and top.prefix not in {attempt.prefix for attempt in attempts}:
        path = f"{directory}/{files.MANIFEST}"
        attempts.append(FoundAttempt(tree, directory, top.prefix, path, top, frozenset()))
    yield from sorted(attempts, key=lambda one: (one.identity.write_time_s if one.identity else 0.0, one.prefix))


def _look(tree: Tree, directory: str, prefix: str) -> FoundAttempt | None:
    """Returns what is there of one attempt; None when it left nothing."""
    names = tree.names(f"{directory}/{files.attempt_path(prefix)}")
    ranks = frozenset(rank for rank in map(files.rank_of_record, names) if rank is not None)
    path = f"{directory}/{files.manifest_path(prefix)}"
    identity = read_identity(tree, path) if "manifest" in names else None
    if identity is not None:
        return FoundAttempt(tree, directory, prefix, path, identity, ranks)
    if not ranks:
        return FoundAttempt(tree, directory, prefix, path, None, ranks) if "manifest" in names else None
    # A damaged manifest beside a complete set of records is made anew from them. Sessions may differ from rank to
    # rank: one that was cut off from the service knew session 0 only.
    identities = [
        identity
        for rank in sorted(ranks)
        if (identity := read_identity(tree, f"{directory}/{files.record_path(prefix, rank)}")) is not None
    ]
    best = max(identities, key=lambda one: one.session, default=None)
    return FoundAttempt(tree, directory, prefix, None, best, ranks)


def read_identity(tree: Tree, path: str) -> AttemptIdentity | None:
    """Returns whose manifest or record a file is; None when it is damaged or absent."""
    head = tree.read(path, _HEAD_BYTES)
    if head is None:
        return None
    for content in (head, None):
        whole = content if content is not None else tree.read(path)
        for kind in ("manifest", "registration record"):
            try:
                section = read_index(whole or b"", kind)["identity"]
                return AttemptIdentity.from_json(read_section(whole or b"", section, "identity"))
            except (CorruptManifestError, KeyError):
                continue
    _LOG.warning("%s is damaged", path)
    return None


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
