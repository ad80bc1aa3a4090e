"""What a checkpoint costs in the database: structure once, then next to nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import psycopg
import pytest

from shardbook.core.extents import Extents, encode_extents
from shardbook.core.structure import RankStructure
from shardbook.core.table import TensorTable
from shardbook_server.service.services import Services, build_services
from shardbook_server.storage.database import Database
from shardbook_server.storage.urls import is_postgres
from tests.behaviour.service.saves import Job, Model, RankBlobs, blobs_of, fine

RANKS, TENSORS, SAVES = 256, 1000, 10


@dataclass(frozen=True)
class Plain(Model):
    """A thousand matrices cut into as many row blocks as there are ranks, and one bytes entry a rank writes."""

    def table(self) -> TensorTable:
        """Built once: every rank has the same."""
        return _TABLES.setdefault(self, super().table())

    def structure(self, rank: int, drop: bytes = b"") -> RankStructure:
        """Replicated entries are written by rank 0."""
        dropped = np.zeros(self.sharded + 2, bool)
        dropped[self.sharded :] = rank > 0
        return super().structure(rank, drop or np.packbits(dropped).tobytes())


_TABLES: dict[Model, TensorTable] = {}


@pytest.fixture
def ranks() -> list[RankBlobs]:
    """256 ranks of 1,000 tensors: 256,000 chunks."""
    model = Plain(RANKS, sharded=TENSORS)
    return [blobs_of(model, rank) for rank in range(RANKS)]


def pages_bytes(database: Database) -> int:
    """Bytes of the pages in use, those of indexes included.

    On Postgres after a clean-up such as its own, and without its maps of free space, 32 KiB for a table of any size.
    """
    if is_postgres(database.url):
        with psycopg.connect(database.url, autocommit=True) as connection:
            connection.execute("VACUUM")
            found = connection.execute(
                "SELECT sum(pg_relation_size(oid)) FROM pg_class WHERE relkind IN ('r', 'i', 't') "
                "AND relnamespace IN ('public'::regnamespace, 'pg_toast'::regnamespace)"
            ).fetchone()
            assert found is not None
            return int(found[0])
    with database.read() as connection:
        counts: list[int] = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in ("page_count", "freelist_count")
        ]
        size: int = connection.exec_driver_sql("PRAGMA page_size").scalar_one()
    used: int = counts[0] - counts[1]
    return used * size


def test_structure_is_stored_once_and_saves_cost_little(
    services: Services, database: Database, ranks: list[RankBlobs]
) -> None:
    """At most 3 bytes a chunk once, then at most 100 bytes a rank and save, counted in pages over ten saves.

    Lengths of the bytes entry differ from save to save and from rank to rank.
    """
    job = Job(services, Plain(RANKS, sharded=TENSORS))
    job.start()
    empty = pages_bytes(database)
    job.register(0, ranks)
    assert RANKS * TENSORS == job.commit(0).chunk_count - 1
    cold = pages_bytes(database)
    assert (cold - empty) / (RANKS * TENSORS) <= 3.0
    for step in range(1, SAVES + 1):
        extents = encode_extents(Extents(np.array([900 + step])))
        moved = [replace(ranks[0], extents=extents), *ranks[1:]]
        fine(services.registrations.register_batch([job.entry(step, blobs) for blobs in moved]))
        assert RANKS * TENSORS == job.commit(step).chunk_count - 1
    assert (pages_bytes(database) - cold) / (SAVES * RANKS) <= 100.0
    with database.read() as connection:
        for table, count in (("checkpoint_structures", 1), ("registrations", 0), ("extent_segments", SAVES + 1)):
            assert count == connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar()


def test_a_known_structure_is_committed_without_decoding_it(
    services: Services, database: Database, ranks: list[RankBlobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steady state reads no geometry, also after a restart."""
    job = Job(services, Plain(RANKS, sharded=TENSORS))
    job.start()
    job.register(0, ranks)
    job.commit(0)
    restarted = replace(job, services=build_services(database))

    def refuse(*_: object) -> None:
        raise AssertionError("a blob was decoded")

    for name in ("decode_table", "decode_plan", "decode_structure"):
        monkeypatch.setattr(f"shardbook_server.service.blobs.{name}", refuse)
    fine(restarted.services.registrations.register_batch([job.entry(1, blobs) for blobs in ranks]))
    assert restarted.commit(1).live
