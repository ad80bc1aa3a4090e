"""Assembled checkpoint structures and their content-addressed entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, func, select, update

from shardbook.core.columns import Int64Array
from shardbook_server.storage.blobs import DAY_US
from shardbook_server.storage.dialect import insert_ignore
from shardbook_server.storage.lists import pack_ids, slices, unpack_ids
from shardbook_server.storage.tables import checkpoint_structures, structure_tensors


@dataclass(frozen=True)
class NewTensor:
    """An entry to store; see ``tables.structure_tensors``."""

    digest: bytes
    kind: int
    dtype: int
    shape: str
    chunk_count: int
    fixed_bytes: int
    fqn: bytes
    fqn_text: str
    payload: bytes


@dataclass(frozen=True)
class NewStructure:
    """A checkpoint structure to store; ``tensors`` in state-dict order."""

    digest: bytes
    tensor_count: int
    chunk_count: int
    bytes_entry_count: int
    warnings: str
    rank_structure_ids: Int64Array
    head: bytes
    tensors: Sequence[NewTensor]


@dataclass(frozen=True)
class TensorRow:
    """An entry without its payload."""

    id: int
    kind: int
    dtype: int
    shape: str
    chunk_count: int
    fixed_bytes: int
    fqn: bytes


@dataclass(frozen=True)
class NameRow:
    """What finds an entry by its name, and proves that a row is still the same one."""

    id: int
    digest: bytes
    fqn: bytes
    chunk_count: int


def find_structure(connection: Connection, project_id: int, digest: bytes) -> int | None:
    """Returns the id of a checkpoint structure; None when it has not been assembled yet."""
    where = (checkpoint_structures.c.project_id == project_id, checkpoint_structures.c.digest == digest)
    return connection.scalar(select(checkpoint_structures.c.id).where(*where))


def insert_structure(connection: Connection, project_id: int, new: NewStructure, now_us: int) -> int:
    """Stores a checkpoint structure and the entries that are new; returns its id. One that exists stays as it is."""
    connection.execute(
        insert_ignore(connection, checkpoint_structures).values(
            project_id=project_id,
            digest=new.digest,
            tensor_count=new.tensor_count,
            chunk_count=new.chunk_count,
            bytes_entry_count=new.bytes_entry_count,
            last_used_day=now_us // DAY_US,
            warnings=new.warnings,
            rank_structure_ids=pack_ids(new.rank_structure_ids),
            tensor_ids=pack_ids(_insert_tensors(connection, project_id, new.tensors)),
            head=new.head,
        )
    )
    where = (checkpoint_structures.c.project_id == project_id, checkpoint_structures.c.digest == new.digest)
    structure_id: int = connection.execute(select(checkpoint_structures.c.id).where(*where)).scalar_one()
    return structure_id


def _insert_tensors(connection: Connection, project_id: int, news: Sequence[NewTensor]) -> list[int]:
    ids = _tensor_ids(connection, project_id, [new.digest for new in news])
    # In state-dict order: neighbours get neighbouring ids, and their packed list stays short.
    rows = [{"project_id": project_id, **vars(new)} for new in news if new.digest not in ids]
    if rows:
        connection.execute(insert_ignore(connection, structure_tensors), rows)
        ids |= _tensor_ids(connection, project_id, [row["digest"] for row in rows])
    return [ids[new.digest] for new in news]


def _tensor_ids(connection: Connection, project_id: int, digests: Sequence[bytes]) -> dict[bytes, int]:
    ids: dict[bytes, int] = {}
    columns = (structure_tensors.c.digest, structure_tensors.c.id)
    for some in slices(digests):
        where = (structure_tensors.c.project_id == project_id, structure_tensors.c.digest.in_(some))
        ids.update(connection.execute(select(*columns).where(*where)).all())
    return ids


def touch(connection: Connection, structure_id: int, now_us: int) -> None:
    """Remembers that a checkpoint structure is in use, at most once a day."""
    day = now_us // DAY_US
    where = (checkpoint_structures.c.id == structure_id, checkpoint_structures.c.last_used_day < day)
    connection.execute(update(checkpoint_structures).where(*where).values(last_used_day=day))


def read_head(connection: Connection, structure_id: int) -> bytes:
    """Returns the head of a checkpoint structure."""
    statement = select(checkpoint_structures.c.head).where(checkpoint_structures.c.id == structure_id)
    head: bytes = connection.execute(statement).scalar_one()
    return head


def read_tensor_ids(connection: Connection, structure_id: int) -> Int64Array:
    """Returns the entries of a checkpoint structure, in state-dict order."""
    statement = select(checkpoint_structures.c.tensor_ids).where(checkpoint_structures.c.id == structure_id)
    return unpack_ids(connection.execute(statement).scalar_one())


def read_rank_structure_ids(connection: Connection, structure_id: int) -> Int64Array:
    """Returns the blob of every rank of a checkpoint structure."""
    statement = select(checkpoint_structures.c.rank_structure_ids).where(checkpoint_structures.c.id == structure_id)
    return unpack_ids(connection.execute(statement).scalar_one())


def filter_tensors(connection: Connection, ids: Sequence[int], fqn_prefix: bytes) -> list[int]:
    """Returns the entries among ``ids``, in their order, whose fqn starts with ``fqn_prefix``."""
    kept: set[int] = set()
    for some in slices(ids):
        starts = func.substr(structure_tensors.c.fqn, 1, len(fqn_prefix)) == fqn_prefix
        kept.update(connection.scalars(select(structure_tensors.c.id).where(structure_tensors.c.id.in_(some), starts)))
    return [one for one in ids if one in kept]


def read_blocks(connection: Connection, ids: Sequence[int]) -> list[bytes]:
    """Returns the payloads of entries, in the order of ``ids``."""
    found: dict[int, bytes] = {}
    columns = (structure_tensors.c.id, structure_tensors.c.payload)
    for some in slices(ids):
        rows = connection.execute(select(*columns).where(structure_tensors.c.id.in_(some)))
        found.update(rows.all())
    return [found[one] for one in ids]


def read_names(connection: Connection, ids: Sequence[int]) -> list[NameRow]:
    """Returns the names of entries, in the order of ``ids``; those that are gone are left out."""
    columns = [structure_tensors.c[name] for name in NameRow.__dataclass_fields__]
    found: dict[int, NameRow] = {}
    for some in slices(ids):
        rows = connection.execute(select(*columns).where(structure_tensors.c.id.in_(some)))
        found.update({row.id: NameRow(*row) for row in rows})
    return [found[one] for one in ids if one in found]


def read_addressed_blocks(connection: Connection, ids: Sequence[int]) -> list[tuple[bytes, bytes]]:
    """Returns digest and payload of entries, in the order of ``ids``; those that are gone are left out."""
    found: dict[int, tuple[bytes, bytes]] = {}
    columns = (structure_tensors.c.id, structure_tensors.c.digest, structure_tensors.c.payload)
    for some in slices(ids):
        rows = connection.execute(select(*columns).where(structure_tensors.c.id.in_(some)))
        found.update({one: (digest, payload) for one, digest, payload in rows})
    return [found[one] for one in ids if one in found]


def read_tensors(connection: Connection, ids: Sequence[int]) -> list[TensorRow]:
    """Returns entries without their payloads, in the order of ``ids``."""
    columns = [structure_tensors.c[name] for name in TensorRow.__dataclass_fields__]
    found: dict[int, TensorRow] = {}
    for some in slices(ids):
        rows = connection.execute(select(*columns).where(structure_tensors.c.id.in_(some)))
        found.update({row.id: TensorRow(*row) for row in rows})
    return [found[one] for one in ids]
