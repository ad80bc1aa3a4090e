"""Ranks' structures become one checkpoint: what counts, in which order, what is refused and how it is said."""

from __future__ import annotations

from collections import ChainMap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardbook.core import limits
from shardbook.core.assembly import assemble
from shardbook.core.table import KeyPath
from shardbook.errors import InvalidArgumentError, InvalidGeometryError
from tests.unit.ranks import (
    Item,
    assembled,
    chunks_of,
    declared,
    plan_of,
    raw,
    shard,
    structure_of,
    table_of,
    whole,
)
from tests.unit.strategies_geometry import Cut, cuts, paint


def _refusal(*ranks: list[Item], at_once: int = 1 << 20) -> InvalidGeometryError:
    with pytest.raises(InvalidGeometryError) as caught:
        assembled(*ranks, at_once=at_once)
    return caught.value


# ---------------------------------------------------------------- what counts


def test_entries_and_chunks_are_in_rank_and_plan_order() -> None:
    """Keys by first appearance over the ranks' tables; chunks of a tensor by (rank, plan order)."""
    checkpoint = assembled(
        [shard("b", (4,), (2,), (2,)), raw("x"), shard("b", (4,), (1,), (1,))],
        [whole("a", (2, 2)), shard("b", (4,), (0,), (1,))],
    )

    assert ("b", "x", "a") == checkpoint.fqns
    assert [(0, (2,), (2,)), (0, (1,), (1,)), (1, (0,), (1,))] == chunks_of(checkpoint, "b")
    assert [(0, (), ())] == chunks_of(checkpoint, "x")
    assert [3, 1, 1] == checkpoint.chunk_counts.tolist()
    assert [0, 1, 0] == checkpoint.winner_entry.tolist()
    assert [[4, 1], [1, 1], [2, 2]] == checkpoint.shapes.tolist()


def test_equal_chunks_count_once_and_the_lowest_ranks_counts() -> None:
    """Ranks without the service's answer write everything: duplicates, never holes."""
    rank = [shard("w", (4,), (0,), (4,)), raw("x"), whole("t", (3,))]

    checkpoint = assembled(rank[1:], rank, rank)

    assert [(1, (0,), (4,))] == chunks_of(checkpoint, "w")
    assert [(0, (), ())] == chunks_of(checkpoint, "x")
    assert [(0, (0,), (3,))] == chunks_of(checkpoint, "t")
    assert () == checkpoint.warnings


def test_ranks_with_one_structure_are_merged_as_if_each_had_its_own() -> None:
    """A structure that a lower rank has adds nothing but the rank's files, in whatever order structures come."""
    one = structure_of(plan_of([shard("w", (4,), (0,), (2,)), raw("x")]))
    two = structure_of(plan_of([shard("w", (4,), (2,), (2,))]))

    folded = assemble([two, one], np.array([1, 0, 0, 1]))
    unfolded = assemble([one, two, two, one], np.arange(4))

    for field in ("offsets", "sizes", "owner", "position", "file", "base", "length", "chunk_counts", "shapes"):
        assert getattr(unfolded, field).tolist() == getattr(folded, field).tolist()
    assert unfolded.fqns == folded.fqns
    assert [unfolded.rank_files.path(rank, 0) for rank in range(4)] == [
        folded.rank_files.path(rank, 0) for rank in range(4)
    ]


def test_an_empty_chunk_does_not_count_where_another_begins() -> None:
    """DCP's storage_data has one entry for each (fqn, offsets): the chunk with elements must be the one."""
    empty, full = shard("w", (4, 2), (0, 0), (0, 2)), shard("w", (4, 2), (0, 0), (4, 2))
    tail = shard("w", (4, 2), (4, 0), (0, 2))

    checkpoint = assembled([empty, tail], [full], [tail, shard("w", (4, 2), (4, 0), (0, 1))])

    assert [(0, (4, 0), (0, 2)), (1, (0, 0), (4, 2))] == chunks_of(checkpoint, "w")


def test_a_tensor_without_elements_needs_no_chunk() -> None:
    """Such an entry stays declared; so does one that ranks hold empty chunks of."""
    checkpoint = assembled([declared(shard("none", (0, 4), ())), shard("some", (0, 4), (0, 0), (0, 4))])

    assert ("none", "some") == checkpoint.fqns
    assert [0, 1] == checkpoint.chunk_counts.tolist()


def test_ranks_that_wrote_nothing_take_part() -> None:
    """A rank with an empty plan registers; a checkpoint of such ranks alone is empty."""
    checkpoint = assembled([], [whole("t")], [])
    nothing = assembled([], [])

    assert [(1, (), ())] == chunks_of(checkpoint, "t")
    assert (0, 0) == (nothing.entry_count, len(nothing.owner))
    assert [0, 0] == nothing.rank_files.index.tolist()


def test_a_whole_tensor_that_ranks_hold_differently_is_the_lowest_keepers() -> None:
    """As in DCP one rank's counts; that ranks differ is kept as a warning which names them."""
    low = whole("t", (3,), "float16")

    checkpoint = assembled([declared(whole("t", (2,)))], [low], [low], [whole("t", (5,))])

    assert [(1, (0,), (3,))] == chunks_of(checkpoint, "t")
    assert [[3]] == checkpoint.shapes.tolist()
    (warning,) = checkpoint.warnings
    said = "rank 1 has a whole float16 tensor [3], but rank 3 has a whole float32 tensor [5]; the lowest rank's is kept"
    assert f"tensor 't': {said}" == warning


@pytest.mark.parametrize("at_once", [1 << 20, 7])
def test_at_most_fifty_warnings_are_kept_and_the_last_counts_the_rest(at_once: int) -> None:
    """Warnings are bounded like everything else."""
    names = [f"t{at}" for at in range(60)]

    ranks = ([whole(name, (elements,)) for name in names] for elements in (1, 2))
    checkpoint = assembled(*ranks, at_once=at_once)

    assert 50 == len(checkpoint.warnings)
    assert "11 more whole tensors differ between ranks" == checkpoint.warnings[-1]


def test_what_ranks_declare_and_do_not_keep_disagrees_with_nothing() -> None:
    """Only keepers are compared: after deduplication most ranks hold entries of which they wrote nothing."""
    checkpoint = assembled([declared(shard("w", (9, 9), (), (), "int8"))], [shard("w", (4,), (0,), (4,))])

    assert [[4, 1]] == checkpoint.shapes.tolist()
    assert [1] == checkpoint.ndims.tolist()
    assert [(1, (0,), (4,))] == chunks_of(checkpoint, "w")


def test_layouts_may_differ_and_the_lowest_keepers_counts() -> None:
    """Deprecated properties are no reason to lose a save."""
    low = shard("w", (4,), (0,), (2,), "float32", "sparse_coo")

    checkpoint = assembled([low], [shard("w", (4,), (2,), (2,))])

    assert [1] == checkpoint.layouts.tolist()


# ---------------------------------------------------------------- what is refused


def test_shards_that_disagree_are_refused_with_the_ranks() -> None:
    """dtype, shape or kind of one tensor differ among ranks that kept some of it."""
    left, right = shard("w", (4,), (0,), (2,)), shard("w", (4,), (2,), (2,))
    cases = [
        ([left], [shard("w", (4,), (2,), (2,), "float16")], "but rank 1 has shards of a float16 tensor [4]"),
        ([left], [shard("w", (5,), (2,), (3,))], "but rank 1 has shards of a float32 tensor [5]"),
        ([left, right], [whole("w", (4,))], "but rank 1 has a whole float32 tensor [4]"),
        ([whole("w", (4,))], [raw("w")], "but rank 1 has bytes"),
    ]
    for one, two, said in cases:
        error = _refusal(list(one), list(two))
        assert "GEOMETRY_DISAGREEMENT" == error.reason
        assert "w" == error.violations[0].field
        assert said in error.message


def test_out_of_bounds_overlap_and_hole_name_tensor_ranks_and_boxes() -> None:
    """Every fault has its reason, and the message what a person needs to find the cause."""
    full = shard("w", (4, 2), (0, 0), (4, 2))
    cases = [
        ([full], [shard("w", (4, 2), (3, 0), (2, 2))], "GEOMETRY_OUT_OF_BOUNDS", "chunk [3, 0] + [2, 2] leaves"),
        ([full], [shard("w", (4, 2), (2, 0), (1, 2))], "GEOMETRY_OVERLAP", "overlap; they are with ranks 0, 1"),
        ([full], [shard("w", (4, 2), (0, 0), (1, 2))], "GEOMETRY_OVERLAP", "overlap; they are with ranks 0, 1"),
        ([], [shard("w", (4, 2), (0, 0), (3, 2))], "GEOMETRY_HOLE", "cover 6 of 8 elements of the shape [4, 2]"),
    ]
    for one, two, reason, said in cases:
        error = _refusal(list(one), list(two))
        assert (reason, {"tensor": "w", "tensor_count": "1"}) == (error.reason, error.metadata)
        assert said in error.message


@pytest.mark.parametrize("item", [whole("t", (2,)), raw("t"), whole("t"), shard("t", (2,), (0,), (2,))])
def test_an_entry_that_nobody_kept_is_a_hole(item: Item) -> None:
    """Dropped everywhere, or never written: tensors, scalars and bytes entries alike."""
    error = _refusal([whole("other")], [declared(item)], [declared(item)])

    assert "GEOMETRY_HOLE" == error.reason
    assert "tensor 't': no rank kept it; declared by ranks 1, 2" == error.message


@pytest.mark.parametrize("at_once", [1 << 20, 7])
def test_all_tensors_at_fault_are_named_up_to_fifty_with_the_count(at_once: int) -> None:
    """In key order; the message is about the first, the rest are violations; names are made printable."""
    names = ["first\0\ud800", *(f"t{at:04}" for at in range(4999))]

    error = _refusal([shard(name, (4,), (0,), (3,)) for name in names], at_once=at_once)

    assert 50 == len(error.violations)
    assert ("first\\x00\\xed\\xa0\\x80", "t0000") == tuple(violation.field for violation in error.violations[:2])
    assert ("5000", "true") == (error.metadata["tensor_count"], error.metadata["truncated"])
    assert error.message.endswith("4999 more tensors are at fault")


def test_at_most_fifty_ranks_are_named_with_the_count() -> None:
    """A fault of a thousand ranks is told in one line."""
    ranks = [[shard("w", (4096,), (rank,), (1,))] for rank in range(1000)]

    assert "48, 49, ... (1000 ranks)" in _refusal(*ranks).message


def test_chunks_that_take_too_long_to_tell_apart_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typed refusal that names tensor and limit; what a grid proves needs no comparison."""
    monkeypatch.setattr(limits, "MAX_BOX_COMPARISONS", 3)
    fine = [shard("even", (4,), (at,), (1,)) for at in range(4)]
    pinwheel = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    assert assembled(fine).chunk_count == 4
    with pytest.raises(InvalidArgumentError, match="tensor 'odd': its 5 chunks lie so irregularly") as caught:
        assembled(fine + [shard("odd", (3, 3), *box) for box in pinwheel])
    assert ("LIMIT_EXCEEDED", "3") == (caught.value.reason, caught.value.metadata["limit"])
    # The limit is for the checkpoint, and what is cut alike is compared once, in however many parts it is looked at.
    monkeypatch.setattr(limits, "MAX_BOX_COMPARISONS", 10)
    alike = [shard(name, (3, 3), *box) for name in ("weight", "moment") for box in pinwheel]
    assert assembled(alike, at_once=1).chunk_count == 10
    with pytest.raises(InvalidArgumentError):
        assembled([*alike, *(shard("other", (3, 3), *box) for box in pinwheel[::-1])], at_once=1)


def test_a_rank_index_that_names_no_structure_is_refused() -> None:
    """Never an IndexError from inside."""
    structure = structure_of(plan_of([raw("x")]))
    for index in ([], [1], [-1]):
        with pytest.raises(InvalidArgumentError):
            assemble([structure], np.array(index, dtype=np.int64))


# ---------------------------------------------------------------- against brute force


@settings(max_examples=4 * settings().max_examples)
@given(st.data())
def test_what_counts_and_what_is_refused_is_as_brute_force_says(data: st.DataObject) -> None:
    """Duplicates, empties, faults and all, spread over ranks; and however many tensors are worked on at a time."""
    drawn = {f"t{at}": data.draw(cuts(max_ndim=3)) for at in range(data.draw(st.integers(1, 3)))}
    world_size = data.draw(st.integers(1, 4))
    ranks: list[list[Item]] = [[declared(shard(fqn, cut.shape, ())) for fqn, cut in drawn.items()]] * world_size
    ranks = [list(rank) for rank in ranks]
    for fqn, cut in drawn.items():
        for offsets, sizes in cut.chunks:
            for rank in data.draw(st.sets(st.integers(0, world_size - 1), min_size=1)):
                ranks[rank].append(shard(fqn, cut.shape, offsets, sizes))
    expected = {fqn: _counted(fqn, ranks) for fqn in drawn}
    faults = {fqn: _fault(Cut(cut.shape, tuple(c[1:] for c in expected[fqn]))) for fqn, cut in drawn.items()}
    faults = {fqn: fault for fqn, fault in faults.items() if fault}

    try:
        checkpoint = assembled(*ranks, at_once=data.draw(st.sampled_from([1, 4, 1 << 20])))
    except InvalidGeometryError as error:
        assert faults == {v.field: v.description.partition(":")[0] for v in error.violations}
        assert next(iter(faults.values())) == error.reason
    else:
        assert {} == faults
        assert expected == {fqn: chunks_of(checkpoint, fqn) for fqn in checkpoint.fqns}


def _counted(fqn: str, ranks: list[list[Item]]) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """The rule in plain words: one chunk for each (offsets, sizes), and none that is empty beside another."""
    chunks: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
    for rank, items in enumerate(ranks):
        chunks.extend((rank, i.offsets, i.sizes) for i in items if i.fqn == fqn and i.offsets is not None)
    kept: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
    for at, (_, offsets, sizes) in enumerate(chunks):
        beside = [other for other in chunks if other[1] == offsets]
        if 0 in sizes and (any(0 not in other[2] for other in beside) or chunks[at] is not beside[0]):
            continue
        if not any(other[1:] == (offsets, sizes) for other in kept):
            kept.append(chunks[at])
    return kept


def _fault(cut: Cut) -> str | None:
    truth = paint(cut)
    if any(truth.out_of_bounds):
        return "GEOMETRY_OUT_OF_BOUNDS"
    if truth.overlaps:
        return "GEOMETRY_OVERLAP"
    return "GEOMETRY_HOLE" if truth.has_hole else None


# ---------------------------------------------------------------- key paths

_PATHS = st.dictionaries(st.sampled_from("abcdef"), st.lists(st.sampled_from(["x", 1]), max_size=2).map(tuple))


@given(st.lists(st.none() | _PATHS, min_size=1, max_size=5), st.data())
def test_key_paths_are_merged_as_dcp_merges_planner_data(
    mappings: list[dict[str, KeyPath] | None], data: st.DataObject
) -> None:
    """dict(ChainMap(*planner_data)), keys in its order; ranks without any add nothing."""
    index = data.draw(st.lists(st.integers(0, len(mappings) - 1), min_size=1, max_size=6))
    plans = [plan_of([], None if mapping is None else tuple(mapping.items())) for mapping in mappings]

    checkpoint = assemble([structure_of(plan) for plan in plans], np.array(index))

    of_ranks = [mapping for mapping in (mappings[at] for at in index) if mapping is not None]
    expected = list(dict(ChainMap(*of_ranks)).items()) if of_ranks else None
    assert expected == (None if checkpoint.key_paths is None else list(checkpoint.key_paths))


def test_a_shared_table_makes_no_difference() -> None:
    """Decoders share table objects; equal tables that are not shared give the same checkpoint."""
    items = [[shard("w", (4,), (0,), (2,)), raw("x")], [shard("w", (4,), (2,), (2,)), raw("x")]]
    table = table_of(items[0], (("w", ("w",)), ("x", ("x",))))

    shared = assemble([structure_of(plan_of(rank, table=table)) for rank in items], np.arange(2))
    apart = assemble([structure_of(plan_of(rank, table.key_paths)) for rank in items], np.arange(2))

    assert chunks_of(apart, "w") == chunks_of(shared, "w")
    assert apart.key_paths == shared.key_paths
    assert apart.winner_entry.tolist() == shared.winner_entry.tolist()
