"""The verdicts on chunks are those of brute force, at any number of dimensions and any size."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardbook.core import limits, overlap
from shardbook.core.columns import Int64Array
from shardbook.core.geometry import NONE, UndecidedError, Verdict, judge
from shardbook.core.grid import prove_cuts, prove_even
from shardbook.core.overlap import Budget, find_overlap
from shardbook.core.ragged import firsts_of
from shardbook.errors import InvalidArgumentError
from tests.unit.strategies_geometry import Cut, arrays, cuts, paint, shapes, tilings

_INT64_MAX = 2**63 - 1


def _row(size: int, parts: int) -> Cut:
    step = size // parts
    return Cut((size,), tuple(((at * step,), (step,)) for at in range(parts)))


def _judge(*cuts: Cut) -> Verdict:
    return judge(*arrays(cuts))


@settings(max_examples=6 * settings().max_examples)
@given(st.lists(cuts(), max_size=4))
def test_verdicts_are_those_of_painting_every_cell(drawn: list[Cut]) -> None:
    """Bounds chunk by chunk; overlap and volume of every tensor whose chunks are within it; all tensors at once."""
    counts, *rest = arrays(drawn)
    verdict = judge(counts, *rest)
    firsts = firsts_of(counts).tolist()

    for tensor, cut in enumerate(drawn):
        truth = paint(cut)
        assert truth.out_of_bounds == tuple(verdict.out_of_bounds[firsts[tensor] : firsts[tensor + 1]].tolist())
        inside = not any(truth.out_of_bounds)
        assert (inside and truth.overlaps) == bool(verdict.overlap[tensor, 0] != NONE)
        assert (inside and truth.volume_differs) == bool(verdict.incomplete[tensor])
        if inside and not truth.overlaps:
            assert truth.has_hole == bool(verdict.incomplete[tensor])


@given(cuts())
def test_the_pair_named_does_overlap(cut: Cut) -> None:
    """The two rows of an overlap are chunks that share a cell, so that an error names the right ranks."""
    first, second = _judge(cut).overlap[0].tolist()
    if first == NONE:
        return

    assert paint(Cut(cut.shape, (cut.chunks[first], cut.chunks[second]))).overlaps


@given(shapes().flatmap(lambda shape: st.tuples(st.just(shape), tilings(shape))))
def test_every_tiling_is_valid(
    cut: tuple[tuple[int, ...], tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]],
) -> None:
    """Whatever the cuts, chunks that tile a tensor are accepted; 0-dim and empty tensors too."""
    assert _judge(Cut(*cut)).is_valid


@settings(max_examples=4 * settings().max_examples)
@given(st.lists(cuts(), min_size=1, max_size=4))
def test_a_grid_proof_never_claims_what_is_not_so(drawn: list[Cut]) -> None:
    """A proof may fail to see that chunks are disjoint or tile their tensor, but never says so wrongly."""
    for prove in (prove_even, prove_cuts):
        proof = prove(*arrays(drawn))
        for tensor, cut in enumerate(drawn):
            truth = paint(cut)
            if proof.disjoint[tensor]:
                assert not truth.overlaps
                assert not any(truth.out_of_bounds)
            if proof.tiled[tensor]:
                assert not truth.has_hole
                assert not truth.volume_differs


def test_proofs_settle_what_sharding_makes() -> None:
    """torch.chunk's cuts are proved evenly, other cuts that go through by sorting; neither needs a sweep."""
    even = Cut((10, 6), tuple(((i, j), (min(4, 10 - i), 3)) for i in (0, 4, 8) for j in (0, 3)))
    through = Cut((10, 6), tuple(((i, j), (h, 3)) for i, h in ((0, 1), (1, 7), (8, 2)) for j in (0, 3)))

    assert [True, False] == prove_even(*arrays([even, through])).tiled.tolist()
    assert [True, True] == prove_cuts(*arrays([even, through])).tiled.tolist()


@pytest.mark.parametrize("cells", [0, 30, 1 << 22])
@pytest.mark.parametrize("budget", [0, 3, 1 << 23])
@settings(max_examples=4 * settings().max_examples)
@given(data=st.data())
def test_dividing_painting_and_blocks_do_not_change_the_answer(budget: int, cells: int, data: st.DataObject) -> None:
    """The sweep finds the same with hardly any pairs and cells allowed at a time as with all of them."""
    cut = data.draw(cuts(max_ndim=3))
    _, _, offsets, sizes = arrays([cut])
    solid = (sizes > 0).all(axis=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "_PAIRS_PER_SWEEP", budget)
        patch.setattr(overlap, "_PAIRS_PER_BLOCK", max(budget, 1))
        patch.setattr(overlap, "_CELLS_PER_PAINTING", cells)
        pair = find_overlap(offsets[solid], sizes[solid])

    ends = offsets[solid] + sizes[solid]
    met = (offsets[solid][:, None] < ends[None]).all(axis=2)
    truth = np.triu(met & met.T, 1)
    assert bool(truth.any()) == (pair is not None)
    assert pair is None or truth[pair]


def test_empty_chunks_overlap_nothing() -> None:
    """Uneven sharding leaves ranks with empty chunks at the end, or anywhere."""
    cut = Cut((4, 2), (((0, 0), (4, 2)), ((4, 0), (0, 2)), ((4, 0), (0, 2)), ((2, 1), (0, 0))))

    assert _judge(cut).is_valid


def test_an_empty_tensor_needs_no_chunk_and_a_scalar_needs_one() -> None:
    """A tensor without elements is whole as it is; a 0-dim tensor has one cell to cover."""
    verdict = _judge(Cut((0, 4), ()), Cut((), ()), Cut((), (((), ()),)), Cut((), (((), ()), ((), ()))))

    assert [False, True, False, True] == verdict.incomplete.tolist()
    assert [NONE, NONE, NONE, 1] == verdict.overlap[:, 0].tolist()


def test_the_largest_sizes_neither_wrap_nor_warn() -> None:
    """Values next to 2**63 are judged exactly: no sum or product of them wraps around to a right one."""
    half = 2**62
    verdict = _judge(
        Cut((_INT64_MAX,), (((0,), (half,)), ((half,), (half - 1,)))),
        Cut((_INT64_MAX,), (((_INT64_MAX,), (_INT64_MAX,)),)),
        Cut((_INT64_MAX, 0), (((0, 0), (_INT64_MAX, 0)),)),
        Cut((half,), tuple(((0,), (half,)) for _ in range(5))),
        Cut((2**31, 2**31), (((0, 0), (2**31, 2**31)),)),
    )

    assert [False, False, True, *[False] * 7] == verdict.out_of_bounds.tolist()
    assert [NONE, NONE, NONE, 4, NONE] == verdict.overlap[:, 0].tolist()
    assert [False, False, False, True, False] == verdict.incomplete.tolist()


def test_a_tensor_of_2_to_the_63_elements_is_refused() -> None:
    """A product that overflows is a typed error, never a wrong verdict."""
    with pytest.raises(InvalidArgumentError):
        _judge(Cut((2**32, 2**31), (((0, 0), (2**32, 2**31)),)))


def test_negative_values_are_out_of_bounds() -> None:
    """Columns from elsewhere are judged without trusting them."""
    counts, shapes = np.array([2]), np.array([[4]])

    verdict = judge(counts, shapes, np.array([[-1], [0]]), np.array([[1], [-4]]))

    assert [True, True] == verdict.out_of_bounds.tolist()


def test_columns_that_do_not_match_are_refused() -> None:
    """Counts, dimensions and rows must agree before anything is judged."""
    counts, tensor, offsets, sizes = arrays([_row(4, 2)])
    with pytest.raises(InvalidArgumentError):
        judge(counts + 1, tensor, offsets, sizes)
    with pytest.raises(InvalidArgumentError):
        judge(counts, tensor, offsets, sizes[:, :0])


def _seconds(offsets: Int64Array, sizes: Int64Array, shape: tuple[int, int]) -> float:
    taken = []
    for _ in range(5):
        begun = time.perf_counter()
        verdict = judge(np.array([len(offsets)]), np.array([shape]), offsets, sizes)
        taken.append(time.perf_counter() - begun)
        assert verdict.is_valid
    return min(taken)


def _staggered(count: int, across: int) -> tuple[Int64Array, Int64Array, tuple[int, int]]:
    """Slabs along the first dimension, each cut in two at a place of its own: no grid, so they are swept."""
    slab = np.arange(count, dtype=np.int64)
    cut = 1 + slab * 7919 % (across - 1)
    offsets = np.zeros((2 * count, 2), dtype=np.int64)
    sizes = np.ones((2 * count, 2), dtype=np.int64)
    offsets[:, 0] = np.repeat(slab, 2)
    offsets[1::2, 1] = cut
    sizes[::2, 1], sizes[1::2, 1] = cut, across - cut
    return offsets, sizes, (count, across)


def test_a_tensor_cut_along_its_shorter_side_costs_no_more() -> None:
    """DCP sweeps the longest dimension, where such a tensor takes it a square of its chunks: some thousand times."""
    along_longer = _seconds(*_staggered(4096, 1024))
    along_shorter = _seconds(*_staggered(4096, 1 << 20))

    assert along_shorter <= 4 * along_longer


def test_columns_beside_a_stack_of_rows_are_not_compared_pair_by_pair() -> None:
    """No dimension alone tells these 100,000 boxes apart; a plane between the halves does."""
    count = 50_000
    stack = np.arange(count, dtype=np.int64)
    offsets = np.zeros((2 * count, 2), dtype=np.int64)
    sizes = np.full((2 * count, 2), count, dtype=np.int64)
    offsets[:count, 0], sizes[:count, 0] = stack, 1
    offsets[count:, 1], sizes[count:, 1] = count + stack, 1

    begun = time.perf_counter()
    assert find_overlap(offsets, sizes) is None
    assert time.perf_counter() - begun < 5.0

    offsets[count + 3, 1] = count + 2
    assert (count + 2, count + 3) == find_overlap(offsets, sizes)


class _Meter(Budget):
    """Counts what is spent."""

    def __init__(self) -> None:
        super().__init__()
        self.spent = 0

    def spend(self, comparisons: int) -> None:
        self.spent += comparisons
        super().spend(comparisons)


def _rods(across: int) -> tuple[Int64Array, Int64Array]:
    """Rods along all three axes, ``across`` times ``across`` along each: every plane cuts a third of them."""
    length = 4 * across
    one, other = (grid.ravel() for grid in np.meshgrid(*[4 * np.arange(across)] * 2))
    none = np.zeros_like(one)
    along = [(none, one, other), (one + 2, none, other + 1), (one + 1, other + 2, none)]
    offsets = np.concatenate([np.stack(columns, axis=1) for columns in along])
    sizes = np.repeat(np.where(np.eye(3, dtype=np.bool_), length, 1), across * across, axis=0)
    order = np.random.default_rng(0).permutation(len(offsets))
    return offsets[order], sizes[order]


def test_rods_along_every_axis_are_not_compared_pair_by_pair() -> None:
    """No dimension and no plane tells these 21,675 boxes apart: 130 million pairs meet along the best of them."""
    offsets, sizes = _rods(85)
    meter = _Meter()
    assert find_overlap(offsets, sizes, meter) is None
    assert meter.spent < 5_000_000

    offsets[7], sizes[7] = offsets[8], 1
    assert (7, 8) == find_overlap(offsets, sizes)


def test_what_takes_too_long_to_tell_apart_says_which_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons are those of all tensors together; a grid takes none."""
    offsets, sizes = _rods(8)
    meter = _Meter()
    find_overlap(offsets, sizes, meter)
    monkeypatch.setattr(limits, "MAX_BOX_COMPARISONS", meter.spent)
    counts = np.array([1, len(offsets)])
    shapes = np.array([[9, 9, 9], [32, 32, 32]])
    columns = np.concatenate([[[0, 0, 0]], offsets]), np.concatenate([[[9, 9, 9]], sizes])
    assert [True] == np.unique(judge(counts, shapes, *columns).overlap == NONE).tolist()
    # The same boxes are judged once; one that lies elsewhere makes it another question.
    twice = np.concatenate([columns[0], offsets + 1]), np.concatenate([columns[1], sizes])
    with pytest.raises(UndecidedError) as caught:
        judge(np.append(counts, len(offsets)), np.concatenate([shapes, [[40, 40, 40]]]), *twice)
    assert (2, len(offsets)) == (caught.value.tensor, caught.value.chunk_count)
