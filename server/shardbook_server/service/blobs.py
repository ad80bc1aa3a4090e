"""Content-addressed blobs: checked as they come in, stored with the write that names them, decoded for use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, ParamSpec, TypeVar

from shardbook.core.columns import inflated_bytes, unframe
from shardbook.core.digest import digest_of
from shardbook.core.extents import StructureInfo, structure_info
from shardbook.core.structure import (
    BlobKind,
    RankPlan,
    RankStructure,
    decode_plan,
    decode_structure,
    reference_of,
)
from shardbook.core.table import TensorTable, decode_table
from shardbook.errors import InvalidArgumentError, ShardbookError, UnavailableError
from shardbook_server.service.checks import check_fqns
from shardbook_server.service.lru import BoundedCache
from shardbook_server.service.types import BlobRef, BlobUpload
from shardbook_server.service.verdicts import about
from shardbook_server.storage import blobs as blob_rows
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage.blobs import BlobRow, NewBlob
from shardbook_server.storage.database import Connection, Database

P = ParamSpec("P")
T = TypeVar("T")
Decoded = TensorTable | RankPlan | RankStructure

#: Blobs whose row ids are kept in memory: the digests of every rank of many runs.
_ID_CACHE_COUNT: Final = 1 << 18
#: Most bytes that the uploads of a call may inflate to and still be checked together with those of others.
_SMALL_BYTES: Final = 1 << 20
_NO_INFO: Final = StructureInfo(0, 0, 0, 0)


@dataclass(frozen=True)
class CheckedBlob:
    """An upload that was verified; made by ``BlobService.check`` only.

    Attributes:
        ref: Kind and digest, computed anew.
        reference: What it refers to; None for a table.
        payload: As sent.
        info: Counts of a structure.
        decoded: What it holds; None when it is known to be stored already.
    """

    ref: BlobRef
    reference: BlobRef | None
    payload: bytes
    info: StructureInfo
    decoded: Decoded | None


@dataclass(frozen=True)
class CheckedBlobs:
    """Uploads of one call.

    Attributes:
        blobs: Those that may be stored.
        lacking: What they refer to and is neither stored nor among them.
        held: The uploads that refer to what is lacking: they could not be checked, so they have to come again with it.
    """

    blobs: tuple[CheckedBlob, ...] = ()
    lacking: tuple[BlobRef, ...] = ()
    held: tuple[BlobRef, ...] = ()


@dataclass(frozen=True)
class CheckAsk:
    """Uploads of one call to a project."""

    project: str
    uploads: tuple[BlobUpload, ...]

    @property
    def is_small(self) -> bool:
        """True when they inflate to so little, by their own word, that others can wait for them."""
        return sum(inflated_bytes(upload.payload) for upload in self.uploads) <= _SMALL_BYTES


@dataclass(frozen=True)
class _Opened:
    """An upload that was named, and not decoded yet.

    Attributes:
        at: Its place in the call.
        payload: As sent.
        ref: Kind and digest, computed anew.
        reference: What it refers to; None for a table.
    """

    at: int
    payload: bytes
    ref: BlobRef
    reference: BlobRef | None


#: For calls without uploads.
NO_BLOBS: Final = CheckedBlobs()


class BlobService:
    """Checks, stores and decodes blobs. Thread-safe.

    Two caches: what was verified (decoded, stored or not), and what is known to be stored (``remember``). Both are
    apart by project: a digest learned elsewhere opens nothing.
    """

    def __init__(self, database: Database, *, cache_bytes: int) -> None:
        """Starts with empty caches; decoded blobs take up to ``cache_bytes``."""
        self._database = database
        self._decoded: BoundedCache[tuple[str, BlobRef], Decoded] = BoundedCache(cache_bytes)
        self._known: BoundedCache[tuple[str, BlobRef], BlobRow] = BoundedCache(_ID_CACHE_COUNT)
        self._known_by = database.backend.connection_count

    @property
    def _rows(self) -> BoundedCache[tuple[str, BlobRef], BlobRow]:
        """What is known to be stored.

        Forgotten with every new connection: it may be to a standby that was promoted and lacks the last commits, and
        hands out their keys again for something else.
        """
        connections = self._database.backend.connection_count
        if connections != self._known_by:
            self._known_by = connections
            self._known.clear()
        return self._known

    def check(self, project: str, uploads: Sequence[BlobUpload]) -> CheckedBlobs:
        """Decodes uploads, proves that they are canonical, computes their digests. CPU work, and short reads.

        Done outside the writers' batches. A call without uploads needs no check: ``NO_BLOBS``.

        Raises:
            InvalidArgumentError: A payload is damaged, not canonical or beyond a limit; the field is
                ``blobs[i].payload``.
        """
        verdict = self.check_batch([CheckAsk(project, tuple(uploads))])[0]
        if isinstance(verdict, ShardbookError):
            raise verdict
        return verdict

    def check_batch(self, asks: Sequence[CheckAsk]) -> list[CheckedBlobs | ShardbookError]:
        """Checks the uploads of several calls; one verdict a call, in order. For uploads that are soon checked."""
        with self.doubted():
            return self._check_batch(asks)

    def _check_batch(self, asks: Sequence[CheckAsk]) -> list[CheckedBlobs | ShardbookError]:
        opened = [_settled(_opened, ask.uploads) for ask in asks]
        self._look_up(
            (ask.project, one) for ask, some in zip(asks, opened, strict=True) if isinstance(some, list) for one in some
        )
        return [
            some if isinstance(some, ShardbookError) else _settled(self._check_opened, ask.project, some)
            for ask, some in zip(asks, opened, strict=True)
        ]

    def _look_up(self, opened: Iterable[tuple[str, _Opened]]) -> None:
        """Learns which uploads, and which blobs that they refer to, are stored: one read for all calls."""
        unsure: dict[str, dict[BlobRef, None]] = {}
        for project, one in opened:
            for ref in (one.ref, one.reference):
                if ref is not None and self._rows.get((project, ref)) is None:
                    unsure.setdefault(project, {})[ref] = None
        if not unsure:
            return
        with self._database.read() as connection:
            for project, refs in unsure.items():
                project_id = run_rows.find_project(connection, project)
                if project_id is not None:
                    # Inside a read transaction: whatever it finds has been committed.
                    self.remember(project, self.find(connection, project, project_id, refs).values())

    def _check_opened(self, project: str, opened: Sequence[_Opened]) -> CheckedBlobs:
        checked: dict[BlobRef, CheckedBlob] = {}
        lacking: dict[BlobRef, None] = {}
        held: dict[BlobRef, None] = {}
        for one in sorted(opened, key=lambda one: one.ref.kind):
            below = one.reference
            if below is not None and below not in checked and self._rows.get((project, below)) is None:
                held[one.ref] = None
                if below not in held:
                    lacking[below] = None
            elif one.ref not in checked:
                with _naming(one.at):
                    checked[one.ref] = self._check(project, one, checked)
        return CheckedBlobs(tuple(checked.values()), tuple(lacking), tuple(held))

    def _check(self, project: str, one: _Opened, beside: Mapping[BlobRef, CheckedBlob]) -> CheckedBlob:
        # The same content verified before need not be decoded again: the digest proves that it is the same.
        row = self._rows.get((project, one.ref))
        if row is not None:
            info = StructureInfo(row.entry_count, row.item_count, row.variable_count, row.fixed_bytes)
            return CheckedBlob(one.ref, one.reference, one.payload, info, None)
        decoded = self._decoded.get((project, one.ref))
        if decoded is None:
            held = {other.ref: other.decoded for other in beside.values() if other.decoded is not None}
            decoded = self._decode(project, one.ref.kind, one.payload, held)
            self._decoded.put((project, one.ref), decoded, _weight(decoded))
        return CheckedBlob(one.ref, one.reference, one.payload, _info(decoded), decoded)

    def _decode(self, project: str, kind: BlobKind, payload: bytes, beside: Mapping[BlobRef, Decoded]) -> Decoded:
        def table(digest: bytes) -> TensorTable:
            held = beside.get(BlobRef(BlobKind.TABLE, digest))
            return held if isinstance(held, TensorTable) else self.tables(project, [digest])[0]

        def plan(digest: bytes) -> RankPlan:
            held = beside.get(BlobRef(BlobKind.PLAN, digest))
            return held if isinstance(held, RankPlan) else self.plans(project, [digest])[0]

        if kind is BlobKind.TABLE:
            decoded = decode_table(payload)[0]
            check_fqns(decoded)
            return decoded
        if kind is BlobKind.PLAN:
            return decode_plan(payload, table)[0]
        return decode_structure(payload, plan)[0]

    def find(
        self, connection: Connection, project: str, project_id: int, refs: Iterable[BlobRef]
    ) -> dict[BlobRef, BlobRow]:
        """Returns the rows of blobs that are stored; what they refer to is then stored as well."""
        found: dict[BlobRef, BlobRow] = {}
        absent: dict[BlobRef, None] = {}
        for ref in refs:
            row = self._rows.get((project, ref))
            if row is None:
                absent[ref] = None
            else:
                found[ref] = row
        if absent:
            rows = blob_rows.find_blobs(connection, project_id, [(ref.kind, ref.digest) for ref in absent])
            found |= {BlobRef(kind, digest): row for (kind, digest), row in rows.items()}
        return found

    def store(
        self, connection: Connection, project: str, project_id: int, checked: Iterable[CheckedBlob], now_us: int
    ) -> None:
        """Stores uploads that are not there yet, within the caller's transaction."""
        news = {blob.ref: blob for blob in checked if self._rows.get((project, blob.ref)) is None}
        blob_rows.insert_blobs(
            connection,
            project_id,
            [
                NewBlob(
                    blob.ref.kind,
                    blob.ref.digest,
                    None if blob.reference is None else blob.reference.digest,
                    blob.payload,
                    blob.info.entry_count,
                    blob.info.item_count,
                    blob.info.variable_count,
                    blob.info.fixed_bytes,
                )
                for blob in news.values()
            ],
            now_us,
        )

    @contextmanager
    def doubted(self) -> Iterator[None]:
        """Around a write that names blobs by key: forgets which are stored when the database knows better.

        A failover may lose the last commits. The write that found out is made again, and then asks the database.
        """
        try:
            yield
        except UnavailableError as error:
            if error.reason == "DATABASE_CONFLICT":
                self._rows.clear()
            raise

    def remember(self, project: str, rows: Iterable[BlobRow]) -> None:
        """Keeps in memory which blobs are stored; only after the transaction that read or stored them."""
        for row in rows:
            self._rows.put((project, BlobRef(row.kind, row.digest)), row)

    def tables(self, project: str, digests: Sequence[bytes]) -> list[TensorTable]:
        """Returns stored tables, decoded."""
        found = self._load(project, BlobKind.TABLE, digests)
        return [table for digest in digests if isinstance(table := found[digest], TensorTable)]

    def plans(self, project: str, digests: Sequence[bytes]) -> list[RankPlan]:
        """Returns stored plans, decoded."""
        found = self._load(project, BlobKind.PLAN, digests)
        return [plan for digest in digests if isinstance(plan := found[digest], RankPlan)]

    def structures(self, project: str, digests: Sequence[bytes]) -> list[RankStructure]:
        """Returns stored structures, decoded."""
        found = self._load(project, BlobKind.STRUCTURE, digests)
        return [structure for digest in digests if isinstance(structure := found[digest], RankStructure)]

    def _load(self, project: str, kind: BlobKind, digests: Sequence[bytes]) -> dict[bytes, Decoded]:
        loaded: dict[bytes, Decoded] = {}
        absent = []
        for digest in dict.fromkeys(digests):
            held = self._decoded.get((project, BlobRef(kind, digest)))
            if held is None:
                absent.append(digest)
            else:
                loaded[digest] = held
        if not absent:
            return loaded
        payloads: dict[bytes, bytes] = {}
        with self._database.read() as connection:
            project_id = run_rows.find_project(connection, project)
            if project_id is not None:
                payloads = blob_rows.read_payloads(connection, project_id, kind, absent)
        for digest in absent:
            if digest not in payloads:
                raise UnavailableError(
                    f"the {kind.name.lower()} {digest.hex()[:12]} is not stored any more; try again",
                    reason="DATABASE_CONFLICT",
                    retry_delay_s=0.5,
                )
        beside = self._load_references(project, kind, payloads.values())
        for digest, payload in payloads.items():
            decoded = self._decode(project, kind, payload, beside)
            self._decoded.put((project, BlobRef(kind, digest)), decoded, _weight(decoded))
            loaded[digest] = decoded
        return loaded

    def _load_references(self, project: str, kind: BlobKind, payloads: Iterable[bytes]) -> dict[BlobRef, Decoded]:
        """Loads what blobs of one kind refer to in one go, rather than one by one while they are decoded."""
        if kind is BlobKind.TABLE:
            return {}
        below = BlobKind(kind - 1)
        references = {
            reference[1] for payload in payloads if (reference := reference_of(kind, unframe(payload))) is not None
        }
        found = self._load(project, below, sorted(references))
        return {BlobRef(below, digest): decoded for digest, decoded in found.items()}


def _opened(uploads: Sequence[BlobUpload]) -> list[_Opened]:
    opened = []
    for at, upload in enumerate(uploads):
        with _naming(at):
            content = unframe(upload.payload)
            below = reference_of(upload.kind, content)
            reference = None if below is None else BlobRef(*below)
            opened.append(_Opened(at, upload.payload, BlobRef(upload.kind, digest_of(content)), reference))
    return opened


@contextmanager
def _naming(at: int) -> Iterator[None]:
    """Names the upload that an error is about: codecs do not know which one they read."""
    try:
        yield
    except InvalidArgumentError as error:
        raise about(error, f"blobs[{at}].payload") from error


def _settled(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | InvalidArgumentError:
    """Returns what a call returns, or its refusal: the other calls of a batch go on."""
    try:
        return call(*args, **kwargs)
    except InvalidArgumentError as error:
        return error


def unknown_refs(wanted: BlobRef, checked: CheckedBlobs) -> tuple[BlobRef, ...]:
    """Returns what to ask a sender for when ``wanted`` is not stored: that, and what its uploads lacked."""
    return tuple(sorted({wanted, *checked.lacking, *checked.held}))


def _info(decoded: Decoded) -> StructureInfo:
    """What is told of a blob beside its payload: of a plan, so much as says what a decision about it takes."""
    if isinstance(decoded, RankStructure):
        return structure_info(decoded)
    return StructureInfo(0, decoded.item_count, 0, 0) if isinstance(decoded, RankPlan) else _NO_INFO


def _weight(decoded: Decoded) -> int:
    """Bytes that a decoded blob takes, about, without what it refers to."""
    if isinstance(decoded, TensorTable):
        paths = 0 if decoded.key_paths is None else sum(len(path) + 2 for _, path in decoded.key_paths)
        return decoded.shapes.nbytes + sum(map(len, decoded.fqns)) + 100 * decoded.entry_count + 64 * paths
    if isinstance(decoded, RankPlan):
        return decoded.entry.nbytes + decoded.offsets.nbytes + decoded.sizes.nbytes + 500
    columns = decoded.kept.nbytes + decoded.order.nbytes + decoded.lengths.nbytes + decoded.file_items.nbytes
    return columns + 200 * len(decoded.files) + 500
