"""Queries for chunks against brute force: which chunks a box meets, and where they lie."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardbook.core.assembly import assemble
from shardbook.core.box import Box
from shardbook.core.checkpoint import CheckpointStructure, RankFiles
from shardbook.core.chunk_index import ChunkIndex, narrow
from shardbook.core.columns import Int64Array
from shardbook.core.found import FoundChunks, decode_part, encode_part, merge
from shardbook.core.locate import locate
from shardbook.core.places import decode_places, encode_places, together
from shardbook.core.query import find, place, place_apart, sliced
from shardbook.core.ragged import bounds_of
from shardbook.core.structure import FileName
from shardbook.core.table import EntryKind
from shardbook.core.wanted import Wanted, decode_wanted, encode_wanted
from shardbook.errors import InvalidArgumentError
from tests.unit.strategies_geometry import Chunk, Cut, arrays, cuts, shapes
from tests.unit.test_locate import World, worlds

FILES = RankFiles(((FileName(True, "0.distcp"),),), np.zeros(1, np.int64))


def structure_of(tensors: list[Cut]) -> CheckpointStructure:
    """Tensors with chunks as given, in no file in particular."""
    counts, padded, offsets, sizes = arrays(tensors)
    rows, codes = np.arange(len(offsets)), np.ones(len(tensors), np.uint8)
    zeros = np.zeros_like(rows)
    return CheckpointStructure(
        fqns=tuple(f"w{number}" for number in range(len(tensors))),
        kinds=codes,
        dtypes=codes,
        layouts=codes,
        memory_formats=codes,
        ndims=np.array([len(tensor.shape) for tensor in tensors], np.int64),
        shapes=padded,
        winner_entry=np.zeros(len(tensors), np.int64),
        chunk_counts=counts,
        offsets=offsets,
        sizes=sizes,
        owner=zeros,
        position=rows,
        file=zeros,
        base=rows * 100,
        var_lo=zeros,
        var_hi=zeros,
        length=np.full_like(rows, 100),
        key_paths=None,
        rank_files=FILES,
    )


def overlaps(chunk: Chunk, box: Box) -> bool:
    """Whether they share an element."""
    pairs = zip(*chunk, box.offsets, box.ends, strict=True)
    return all(max(offset, low) < min(offset + size, high) for offset, size, low, high in pairs)


def met(tensors: list[Cut], boxes: list[list[Box]]) -> list[tuple[int, int, int]]:
    """(tensor, box, chunk) by looking at every chunk."""
    numbers = iter(range(sum(map(len, boxes))))
    return [
        (tensor, number, chunk)
        for tensor, some in enumerate(boxes)
        for box in some
        for number in [next(numbers)]
        for chunk, one in enumerate(tensors[tensor].chunks)
        if overlaps(one, box)
    ]


def ask(structure: CheckpointStructure, wanted: Wanted) -> list[tuple[int, int, int]]:
    """(tensor, box, chunk) by the index."""
    index = ChunkIndex.of(structure)
    number = {fqn: at for at, fqn in enumerate(structure.fqns)}
    entry = np.array([number[fqn] for fqn in wanted.fqns], np.int64)
    hits = find(index, wanted, np.arange(len(entry)), entry)
    rows = hits.row - index.firsts[entry[hits.at]]
    return list(zip(hits.at.tolist(), hits.box.tolist(), rows.tolist(), strict=True))


def wanted_of(tensors: list[Cut], boxes: list[list[Box]], *, stated: bool = False) -> Wanted:
    """The question for boxes."""
    wanted = Wanted.boxes_of({f"w{number}": some for number, some in enumerate(boxes)})
    if not stated:
        return wanted
    _, padded, *_ = arrays(tensors)
    width = max(wanted.offsets.shape[1], padded.shape[1])
    wide = [np.pad(m, ((0, 0), (0, width - m.shape[1])), constant_values=f) for m, f in _matrices(wanted, padded)]
    ndims = np.array([len(tensor.shape) for tensor in tensors], np.int64)
    return replace(
        wanted, ndims=ndims, stated=np.ones(len(tensors), np.bool_), shapes=wide[0], offsets=wide[1], sizes=wide[2]
    )


def _matrices(wanted: Wanted, padded: Int64Array) -> list[tuple[Int64Array, int]]:
    return [(padded, 1), (wanted.offsets, 0), (wanted.sizes, 1)]


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    """A box of a tensor, empty ones too."""
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    sizes = tuple(draw(st.integers(0, size - offset)) for size, offset in zip(shape, offsets, strict=True))
    return Box(offsets, sizes)


@st.composite
def questions(draw: st.DrawFn) -> tuple[list[Cut], list[list[Box]]]:
    """Tensors cut in every way, right and wrong, and boxes of them."""
    tensors = draw(st.lists(cuts(), min_size=1, max_size=5))
    return tensors, [draw(st.lists(boxes_in(tensor.shape), max_size=3)) for tensor in tensors]


@given(questions(), st.booleans())
def test_the_index_finds_what_brute_force_finds(question: tuple[list[Cut], list[list[Box]]], stated: bool) -> None:
    """Regular, irregular, overlapping, 0-dim and empty tensors; in the order of tensors, boxes, chunks."""
    tensors, boxes = question
    assert met(tensors, boxes) == ask(structure_of(tensors), wanted_of(tensors, boxes, stated=stated))


@given(st.data())
def test_long_and_short_chunks_beside_each_other(data: st.DataObject) -> None:
    """One dimension, sizes that differ by orders of magnitude: classes of size must lose nothing."""
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 1000, 2**40]), min_size=1, max_size=30))
    ends = np.cumsum(sizes).tolist()
    chunks = tuple(((end - size,), (size,)) for size, end in zip(sizes, ends, strict=True))
    tensor = Cut((ends[-1],), tuple(data.draw(st.permutations(chunks))))
    boxes = [data.draw(st.lists(boxes_in(tensor.shape), max_size=4))]
    assert met([tensor], boxes) == ask(structure_of([tensor]), wanted_of([tensor], boxes))


@given(questions())
def test_what_is_wanted_whole(question: tuple[list[Cut], list[list[Box]]]) -> None:
    """Every chunk, also those without elements."""
    tensors, _ = question
    every = [(at, -1, chunk) for at, tensor in enumerate(tensors) for chunk in range(len(tensor.chunks))]
    structure = structure_of(tensors)
    assert every == ask(structure, Wanted.all_of(structure.fqns))


def grid(rows: int, columns: int, step: int = 1) -> Cut:
    """A 2-D tensor cut in cells, in no order."""
    order = np.random.default_rng(0).permutation(rows * columns)
    places = zip(*(places.tolist() for places in np.divmod(order, columns)), strict=True)
    return Cut((rows * step, columns * step), tuple(((i * step, j * step), (step, step)) for i, j in places))


@pytest.mark.parametrize("uneven", [False, True])
def test_a_large_tensor_is_not_walked_through(uneven: bool) -> None:
    """Of 131,072 chunks in one tensor those are looked at that lie near the box."""
    tensor = grid(256, 512, 4)
    if uneven:  # one cell more, in a tensor one row longer: no grid any more
        tensor = Cut((1025, 2048), (*tensor.chunks, ((1024, 0), (1, 2048))))
    index = ChunkIndex.of(structure_of([tensor]))
    assert uneven != index.cells.tiled.all()
    low, high = np.array([[101, 1001]]), np.array([[103, 1009]])
    entry = np.zeros(1, np.int64)
    box = Box((101, 1001), (2, 8))
    assert met([tensor], [[box]]) == [(0, 0, row) for row in index.meet(entry, low, high)[1].tolist()]
    looked_at = index.slabs.meet(entry, low, high) if uneven else index.cells.meet(entry, low, high)
    assert len(looked_at[1]) <= (2 * 1024 if uneven else 3)


def test_even_structure_takes_little_memory() -> None:
    """Narrow columns: some bytes a chunk instead of the 100 that int64 would take."""
    index = ChunkIndex.of(structure_of([grid(256, 256)] * 2))
    assert index.nbytes < 20 * len(index.columns["position"])


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5) | st.lists(st.integers(0, 300), max_size=5))
def test_narrow_columns_say_the_same(values: list[int]) -> None:
    """Whatever their width."""
    assert values == narrow(np.array(values, np.int64)).astype(np.int64).tolist()


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 60))
def test_pages_hold_every_entry_once(counts: list[int], limit: int) -> None:
    """Consecutive, and none begins once the limit is reached."""
    bounds = bounds_of(counts, limit)
    assert (0, len(counts)) == (bounds[0], bounds[-1])
    assert sorted(set(bounds)) == bounds
    assert all(sum(counts[low : high - 1]) < limit for low, high in itertools.pairwise(bounds))


class TestPlaces:
    """Where what was found lies."""

    @given(worlds(), st.data())
    def test_places_are_those_of_the_whole_checkpoint(self, world: World, data: st.DataObject) -> None:
        """As if everything had been located; extents of owners alone are read; parts, encoded, make the whole."""
        structure = assemble(world.structures, np.arange(len(world.structures)))
        everything = locate(structure, world.registrations)
        fqns = data.draw(st.permutations([*structure.fqns, "absent"]))
        wanted = data.draw(st.sampled_from([Wanted.all_of(fqns), rows_wanted(structure, fqns)]))
        found = answer(structure, world, wanted, data.draw(st.integers(1, 20)))
        assert [fqn in structure.fqns for fqn in fqns] == found.found.tolist()
        for row, (tensor, index) in enumerate(zip(found.tensor.tolist(), found.index.tolist(), strict=True)):
            entry = structure.fqns.index(fqns[tensor])
            at = int(structure.firsts[entry]) + index
            owner, file = int(structure.owner[at]), int(structure.file[at])
            assert f"p/{structure.rank_files.path(owner, file)}" == found.paths[int(found.file[row])]
            assert (everything.start[at], everything.length[at]) == (found.start[row], found.length[row])
            assert structure.offsets[at].tolist() == found.offsets[row].tolist()
            assert everything.checksum[at] == found.checksum[row]
        if wanted.whole.all():
            order = [structure.fqns.index(fqn) for fqn in fqns if fqn != "absent"]
            assert everything.requires_grad[order].tolist() == found.requires_grad[found.found].tolist()
            assert structure.chunk_counts[order].tolist() == found.chunk_counts[found.found].tolist()
            assert structure.chunk_counts[order].sum() == len(found.tensor)


def rows_wanted(structure: CheckpointStructure, fqns: list[str]) -> Wanted:
    """The first two rows of every tensor."""
    ndims = dict(zip(structure.fqns, structure.ndims.tolist(), strict=True))
    shapes = dict(zip(structure.fqns, structure.shapes.tolist(), strict=True))
    boxes = {fqn: [Box((0,), (min(2, shapes[fqn][0]),))] if ndims.get(fqn) else [] for fqn in fqns}
    return Wanted.boxes_of(boxes)


def answer(structure: CheckpointStructure, world: World, wanted: Wanted, limit: int) -> FoundChunks:
    """A whole answer, through the wire's form."""
    wanted = decode_wanted(encode_wanted(wanted))
    number = {fqn: at for at, fqn in enumerate(structure.fqns)}
    known = [at for at, fqn in enumerate(wanted.fqns) if fqn in number]
    entry = np.array([number[wanted.fqns[at]] for at in known], np.int64)
    hits = find(ChunkIndex.of(structure), wanted, np.array(known, np.int64), entry)
    read: list[int] = []

    def registrations(ranks: Int64Array) -> list[tuple[bytes, bytes]]:
        read.extend(ranks.tolist())
        return [world.registrations[rank] for rank in ranks.tolist()]

    some = sliced(hits, limit)
    halves = [half for half in (some[: len(some) // 2], some[len(some) // 2 :]) if half]
    placed = [place(half, structure.rank_files, "p", registrations) for half in halves]
    found = merge(wanted, [decode_part(encode_part(part)) for part in placed])
    apart = [place_apart(half, structure.rank_files, registrations) for half in halves]
    halved = [(decode_part(encode_part(one)), decode_places(encode_places(other))) for one, other in apart]
    again = merge(wanted, [together(one, other, "p") for one, other in halved])
    assert described(found) == described(again)
    owners = structure.owner[hits.row].tolist()
    assert set(owners) == set(read)
    return found


def described(found: FoundChunks) -> list[object]:
    """Every column."""
    columns = [value for name, value in vars(found).items() if name != "wanted"]
    return [column.tolist() if isinstance(column, np.ndarray) else column for column in columns]


class TestQuestion:
    """What cannot be asked."""

    def test_a_box_of_another_rank_or_beyond_its_tensor_is_named(self) -> None:
        """The field says which box of the question."""
        structure = structure_of([grid(2, 2), grid(3, 3)])
        for box, told in ((Box((0,), (1,)), "1 dimensions"), (Box((2, 0), (2, 1)), "leaves")):
            wanted = Wanted.boxes_of({"w0": [Box((0, 0), (1, 1))], "w1": [box]})
            with pytest.raises(InvalidArgumentError, match=told) as caught:
                ask(structure, wanted)
            assert ["wanted.boxes[1]"] == [violation.field for violation in caught.value.violations]

    def test_a_stated_shape_that_differs_is_no_error(self) -> None:
        """The loader tells of it, together with all others: no chunks, and the true shape."""
        structure = structure_of([grid(2, 2)])
        wanted = wanted_of([grid(3, 3)], [[Box((2, 2), (1, 1))]], stated=True)
        assert [] == ask(structure, wanted)

    def test_a_box_beyond_its_stated_shape(self) -> None:
        """Said before anybody is asked."""
        with pytest.raises(InvalidArgumentError, match="leaves a tensor of shape"):
            wanted_of([grid(2, 2)], [[Box((1, 1), (2, 1))]], stated=True)

    def test_an_entry_that_is_no_tensor_has_its_chunk_whatever_is_wanted(self) -> None:
        """As DCP loads it, in place of whatever the state dict holds."""
        structure = structure_of([Cut((), (((), ()),))])
        structure = replace(structure, kinds=np.array([EntryKind.BYTES], np.uint8))
        assert [(0, -1, 0)] == ask(structure, wanted_of([grid(2, 2)], [[]], stated=True))

    @given(st.lists(shapes(max_ndim=3), max_size=4), st.data())
    def test_a_question_is_read_as_it_was_written(self, drawn: list[tuple[int, ...]], data: st.DataObject) -> None:
        """Every column."""
        tensors = [Cut(shape, ()) for shape in drawn]
        boxes = [data.draw(st.lists(boxes_in(tensor.shape), max_size=2)) for tensor in tensors]
        wanted = wanted_of(tensors, boxes, stated=data.draw(st.booleans()))
        read = decode_wanted(encode_wanted(wanted))
        assert wanted.fqns == read.fqns
        for name in ("ndims", "stated", "shapes", "whole", "box_counts", "offsets", "sizes"):
            one, other = getattr(wanted, name), getattr(read, name)
            width = min(one.shape[-1], other.shape[-1]) if one.ndim > 1 else None
            assert one[..., :width].tolist() == other[..., :width].tolist(), name

    @given(st.binary(max_size=80))
    def test_damaged_questions_and_answers_are_refused(self, content: bytes) -> None:
        """With a typed error, whatever the bytes are."""
        for start, decode in ((b"WQ", decode_wanted), (b"FC", decode_part), (b"FP", decode_places)):
            with pytest.raises(InvalidArgumentError):
                decode(b"\0SB" + start + b"\1" + content + b"\xff" * 40)
