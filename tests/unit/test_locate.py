"""From ranks' structures and extents to the place of every chunk: blocks, segments and locate against a plain walk."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardbook.core.assembly import assemble
from shardbook.core.blocks import block_fqn, decode_blocks, encode_blocks
from shardbook.core.checkpoint import CheckpointStructure
from shardbook.core.extents import Extents, decode_segment, encode_extents, encode_segment, encode_volatile
from shardbook.core.head import decode_head, encode_head
from shardbook.core.locate import Located, locate
from shardbook.core.structure import FileName, RankPlan, RankStructure
from shardbook.core.table import EntryKind, TensorTable
from shardbook.errors import InvalidArgumentError

Place = tuple[str, int, int]


@dataclass(frozen=True)
class World:
    """Ranks that together hold whole tensors: place, by a plain walk of the files, and checksum of each (fqn, row)."""

    structures: list[RankStructure]
    registrations: list[tuple[bytes, bytes]]
    places: dict[tuple[str, int], Place]
    checksums: dict[tuple[str, int], int]
    requires_grad: dict[str, bool]


def table_of(shard_rows: list[int], entry_count: int, bytes_entries: list[str]) -> TensorTable:
    """A table of 1-d tensors that every rank shards, then bytes entries."""
    names = (*(f"w{i}" for i in range(entry_count)), *bytes_entries)
    count = len(names)
    is_bytes = np.arange(count) >= entry_count
    kinds = np.where(is_bytes, EntryKind.BYTES, EntryKind.SHARD).astype(np.uint8)
    codes = np.where(is_bytes, 0, 1).astype(np.uint8)
    shapes = np.where(is_bytes, 1, sum(shard_rows)).reshape(-1, 1).astype(np.int64)
    zeros = np.zeros(count, dtype=np.uint8)
    paths = tuple((name, ("x", 3, name)) for name in names)
    return TensorTable(names, kinds, codes, zeros, zeros, (~is_bytes).astype(np.int64), shapes, paths)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """One to four ranks with some rows of every tensor, some bytes entries, several files in any order."""
    rows = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    entry_count = draw(st.integers(1, 3))
    structures: list[RankStructure] = []
    registrations: list[tuple[bytes, bytes]] = []
    places: dict[tuple[str, int], Place] = {}
    checksums: dict[tuple[str, int], int] = {}
    grads: dict[str, bool] = {}
    first = 0
    for rank, own in enumerate(rows):
        bytes_entries = [f"b{rank}.{i}" for i in range(draw(st.integers(0, 3)))]
        table = table_of(rows, entry_count, bytes_entries)
        count = table.entry_count
        offsets = np.where(table.ndims > 0, first, 0).reshape(-1, 1)
        sizes = np.where(table.ndims > 0, own, 1).reshape(-1, 1)
        plan = RankPlan(table, np.arange(count), offsets, sizes)
        structure = draw(filed(plan))
        explicit = draw(st.booleans())
        length = structure.lengths.copy()
        length[structure.variable] = draw(
            st.lists(st.integers(0, 99), min_size=len(bytes_entries), max_size=len(bytes_entries))
        )
        extents, walked = lay_out(structure, length, explicit, rank)
        sums = np.array(draw(st.lists(st.integers(-1, 2**32 - 1), min_size=count, max_size=count)), dtype=np.int64)
        if (sums >= 0).any():
            extents = replace(extents, checksums=sums[structure.order])
        flags = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=np.bool_)
        registrations.append((encode_extents(extents), encode_volatile(flags, flags)))
        for item, place in enumerate(walked):
            fqn = table.fqns[plan.entry[item]]
            places[fqn, int(plan.offsets[item, 0])] = place
            checksums[fqn, int(plan.offsets[item, 0])] = int(sums[item])
            grads.setdefault(fqn, bool(flags[item]))
        structures.append(structure)
        first += own
    return World(structures, registrations, places, checksums, grads)


@st.composite
def filed(draw: st.DrawFn, plan: RankPlan) -> RankStructure:
    """A structure that keeps everything, in one to three files."""
    count = plan.item_count
    order = np.array(draw(st.permutations(range(count))), dtype=np.int64)
    cut = draw(st.integers(1, count))
    file_items = np.array([cut, count - cut] if cut < count else [count], dtype=np.int64)
    files = tuple(FileName(True, f"{number}.distcp") for number in range(len(file_items)))
    lengths = np.where(plan.variable, 0, plan.sizes[:, 0] * 4 + 100)
    return RankStructure(plan, np.arange(count), files, file_items, order, lengths)


def lay_out(structure: RankStructure, length: np.ndarray, explicit: bool, rank: int) -> tuple[Extents, list[Place]]:
    """Walks the files item by item; explicit extents leave a gap of 7 bytes before each item."""
    walked: list[Place] = [("", 0, 0)] * structure.item_count
    starts = []
    position = 0
    for file, items in zip(structure.files, structure.file_items.tolist(), strict=True):
        at = 0
        for item in structure.order[position : position + items].tolist():
            at += 7 if explicit else 0
            walked[item] = (file.path(rank), at, int(length[item]))
            starts.append(at)
            at += int(length[item])
        position += items
    in_file_order = length[structure.order]
    if explicit:
        return Extents(lengths=in_file_order, starts=np.array(starts, dtype=np.int64)), walked
    return Extents(variable_lengths=in_file_order[structure.variable[structure.order]]), walked


def stored(world: World) -> tuple[CheckpointStructure, Located]:
    """What a reader gets back from everything that is stored."""
    assembled = assemble(world.structures, np.arange(len(world.structures)))
    head = decode_head(encode_head(assembled))
    payloads = [block.payload for block in encode_blocks(assembled)]
    assert [block_fqn(payload) for payload in payloads] == list(assembled.fqns)
    assert assembled.key_paths == head.key_paths
    decoded = decode_blocks(payloads, head.rank_files)
    for name in ("offsets", "sizes", "owner", "position", "file", "base", "var_lo", "var_hi", "length", "winner_entry"):
        assert np.array_equal(getattr(assembled, name), getattr(decoded, name)), name
    return decoded, locate(decoded, decode_segment(encode_segment(world.registrations)))


@given(worlds())
def test_every_chunk_is_found_where_a_walk_of_the_files_finds_it(world: World) -> None:
    """Running offsets over fixed and variable items, several files a rank, explicit extents."""
    structure, located = stored(world)
    found = {}
    for row, fqn in enumerate(structure.fqns):
        for chunk in range(int(structure.firsts[row]), int(structure.firsts[row + 1])):
            path = structure.rank_files.path(int(structure.owner[chunk]), int(structure.file[chunk]))
            place = (path, int(located.start[chunk]), int(located.length[chunk]))
            found[fqn, int(structure.offsets[chunk, 0])] = place
    assert world.places == found


@given(worlds())
def test_every_chunk_has_the_checksum_of_its_owners_item(world: World) -> None:
    """Ranks with, without and with some checksums, in one checkpoint; -1 where there is none."""
    structure, located = stored(world)
    fqns = np.repeat(np.array(structure.fqns, dtype=object), structure.chunk_counts)
    keys = zip(fqns.tolist(), structure.offsets[:, 0].tolist(), strict=True)
    assert world.checksums == dict(zip(keys, located.checksum.tolist(), strict=True))


@given(worlds())
def test_volatile_properties_are_those_of_the_first_chunks_owner(world: World) -> None:
    """The lowest rank that stores a chunk of the tensor counts, as in DCP."""
    structure, located = stored(world)
    assert world.requires_grad == dict(zip(structure.fqns, located.requires_grad.tolist(), strict=True))
    assert np.array_equal(located.requires_grad, located.pin_memory)


@given(worlds())
def test_extents_of_another_checkpoint_are_refused(world: World) -> None:
    """Missing ranks and missing lengths are typed errors, never an index out of range."""
    structure, _ = stored(world)
    with pytest.raises(InvalidArgumentError):
        locate(structure, world.registrations[:-1])
    if (structure.kinds == EntryKind.BYTES).any():
        with pytest.raises(InvalidArgumentError) as caught:
            locate(structure, [(encode_extents(Extents()), b"")] * len(world.registrations))
        assert caught.value.reason == "EXTENTS_MISMATCH"


def test_blocks_of_equal_content_have_equal_digests() -> None:
    """A tensor that did not change is stored once, whatever happens to the others."""
    table = table_of([2], 2, [])
    plan = RankPlan(table, np.arange(2), np.zeros((2, 1), np.int64), np.full((2, 1), 2))
    one = RankStructure(plan, np.arange(2), (FileName(True, "0"),), np.array([2]), np.arange(2), np.array([108, 108]))
    other = RankStructure(plan, np.arange(2), (FileName(True, "0"),), np.array([2]), np.arange(2), np.array([108, 109]))
    first = encode_blocks(assemble([one], np.zeros(1, np.int64)))
    second = encode_blocks(assemble([other], np.zeros(1, np.int64)))
    assert first[0] == second[0]
    assert first[1] != second[1]
