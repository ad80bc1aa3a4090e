"""Content-addressed blobs of ranks: tables, plans, structures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, select, tuple_, update

from shardbook.core.structure import BlobKind
from shardbook.errors import UnavailableError
from shardbook_server.storage.dialect import insert_ignore, lock_rows
from shardbook_server.storage.lists import slices
from shardbook_server.storage.tables import rank_structures

DAY_US = 86_400_000_000


@dataclass(frozen=True)
class BlobRow:
    """A blob without its payload.

    Attributes:
        id: Key.
        kind: What it holds.
        digest: 32 bytes.
        reference_id: Key of the blob it refers to; None for a table.
        entry_count: As in ``StructureInfo``; 0 unless it is a structure. The last three likewise.
        item_count: Items of a plan or structure; 0 for plans that an early release stored.
        variable_count: See above.
        fixed_bytes: See above.
        last_used_day: Day since the epoch on which it was last known to be in use.
    """

    id: int
    kind: BlobKind
    digest: bytes
    reference_id: int | None
    entry_count: int
    item_count: int
    variable_count: int
    fixed_bytes: int
    last_used_day: int


@dataclass(frozen=True)
class NewBlob:
    """A blob to store."""

    kind: BlobKind
    digest: bytes
    reference: bytes | None
    payload: bytes
    entry_count: int = 0
    item_count: int = 0
    variable_count: int = 0
    fixed_bytes: int = 0


def find_blobs(
    connection: Connection, project_id: int, refs: Sequence[tuple[BlobKind, bytes]]
) -> dict[tuple[BlobKind, bytes], BlobRow]:
    """Returns the blobs of a project that exist among ``refs``."""
    found: dict[tuple[BlobKind, bytes], BlobRow] = {}
    for some in slices(refs):
        wanted = [(int(kind), digest) for kind, digest in some]
        where = tuple_(rank_structures.c.kind, rank_structures.c.digest).in_(wanted)
        rows = connection.execute(select(*_COLUMNS).where(rank_structures.c.project_id == project_id, where))
        for blob_id, kind, digest, *rest in rows:
            found[BlobKind(kind), digest] = BlobRow(blob_id, BlobKind(kind), digest, *rest)
    return found


def insert_blobs(connection: Connection, project_id: int, news: Iterable[NewBlob], now_us: int) -> None:
    """Stores blobs of a project; those that exist stay as they are. What they refer to must exist or be among them."""
    by_kind: dict[BlobKind, dict[bytes, NewBlob]] = {kind: {} for kind in BlobKind}
    for new in news:
        by_kind[new.kind][new.digest] = new
    for kind in sorted(by_kind):
        some = [by_kind[kind][digest] for digest in sorted(by_kind[kind])]
        below = BlobKind(kind - 1) if kind > BlobKind.TABLE else kind
        references = [(below, new.reference) for new in some if new.reference is not None]
        ids = find_blobs(connection, project_id, list(dict.fromkeys(references)))
        if len(ids) < len(set(references)):
            # Whoever checked the uploads took them for stored: the database has lost commits since.
            raise UnavailableError(
                "the database does not hold what it held before; try again",
                reason="DATABASE_CONFLICT",
                retry_delay_s=0.5,
            )
        rows = [
            {
                "project_id": project_id,
                "kind": int(kind),
                "digest": new.digest,
                "reference_id": None if new.reference is None else ids[below, new.reference].id,
                "entry_count": new.entry_count,
                "item_count": new.item_count,
                "variable_count": new.variable_count,
                "fixed_bytes": new.fixed_bytes,
                "last_used_day": now_us // DAY_US,
                "payload": new.payload,
            }
            for new in some
        ]
        if rows:
            connection.execute(insert_ignore(connection, rank_structures), rows)


def find_by_ids(connection: Connection, ids: Sequence[int]) -> dict[int, BlobRow]:
    """Returns blobs by id."""
    found: dict[int, BlobRow] = {}
    for some in slices(ids):
        for blob_id, kind, *rest in connection.execute(select(*_COLUMNS).where(rank_structures.c.id.in_(some))):
            found[blob_id] = BlobRow(blob_id, BlobKind(kind), *rest)
    return found


def read_payloads(
    connection: Connection, project_id: int, kind: BlobKind, digests: Sequence[bytes]
) -> dict[bytes, bytes]:
    """Returns the payloads of blobs of one kind that exist among ``digests``."""
    found: dict[bytes, bytes] = {}
    columns = (rank_structures.c.digest, rank_structures.c.payload)
    for some in slices(digests):
        where = (rank_structures.c.project_id == project_id, rank_structures.c.kind == int(kind))
        statement = select(*columns).where(*where, rank_structures.c.digest.in_(some))
        found.update(connection.execute(statement).all())
    return found


def touch(connection: Connection, ids: Sequence[int], now_us: int) -> None:
    """Remembers that blobs are in use, at most once a day."""
    day = now_us // DAY_US
    stale: list[int] = []
    for some in slices(sorted(ids)):
        where = (rank_structures.c.id.in_(some), rank_structures.c.last_used_day < day)
        stale.extend(connection.scalars(select(rank_structures.c.id).where(*where)))
    # A row that another transaction holds is being touched by it.
    for some in slices(lock_rows(connection, rank_structures.c.id, stale, skip_locked=True)):
        connection.execute(update(rank_structures).where(rank_structures.c.id.in_(some)).values(last_used_day=day))


_COLUMNS = (
    rank_structures.c.id,
    rank_structures.c.kind,
    rank_structures.c.digest,
    rank_structures.c.reference_id,
    rank_structures.c.entry_count,
    rank_structures.c.item_count,
    rank_structures.c.variable_count,
    rank_structures.c.fixed_bytes,
    rank_structures.c.last_used_day,
)
