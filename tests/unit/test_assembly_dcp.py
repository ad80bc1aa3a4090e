"""What is refused and what is stored is what DCP's own planner refuses and stores, but for differences named here.

The peer is ``dedup_save_plans``, then ``create_default_global_save_plan``, then ``_validate_global_plan``, as
``DefaultSavePlanner`` calls them. The verdicts rightly differ in this:

- DCP does not ask whether the chunks of a *single* plan cover their tensors.
- DCP does not validate 0-dim tensors at all.
- DCP deduplicates by (fqn, offsets): of two shards that begin at the same place and are not equal it keeps one, either
  of them. It may so drop the one with elements and keep an empty one, and refuse the rest as a hole; or drop a box that
  overlaps another without noticing.
- DCP takes an empty chunk that lies inside another for an overlap.
- DCP takes dtype and shape of a tensor from whichever rank comes first, however the others' shards disagree.
- DCP stops with a bare AssertionError where an entry is whole on one rank and a shard or bytes on another.
- DCP knows no entry that nobody wrote.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint._dedup_save_plans import dedup_save_plans
from torch.distributed.checkpoint.default_planner import _validate_global_plan, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from shardbook.core.assembly import assemble
from shardbook.core.checkpoint import CheckpointStructure
from shardbook.core.planning import decide
from shardbook.errors import InvalidGeometryError
from tests.unit.dcp_plans import save_plan
from tests.unit.ranks import Item, assembled, chunks_of, declared, plan_of, raw, shard, structure_of, whole
from tests.unit.strategies_geometry import Cut, cuts


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """DCP logs a warning for every fault it finds."""
    logging.getLogger("torch.distributed.checkpoint.default_planner").setLevel(logging.ERROR)


def _of_dcp(ranks: Sequence[Sequence[Item]]) -> tuple[Metadata, list[str]]:
    """Returns DCP's metadata and what it finds wrong with them."""
    plans, metadata = create_default_global_save_plan(dedup_save_plans([save_plan(items) for items in ranks]))
    return metadata, _validate_global_plan(plans, metadata)


def _of_ours(ranks: Sequence[Sequence[Item]]) -> CheckpointStructure:
    """Returns the checkpoint of ranks that were told what to drop."""
    plans = [plan_of(items) for items in ranks]
    drops = decide(plans, np.arange(len(ranks)))
    kept = [structure_of(plan, np.flatnonzero(~drop).tolist()) for plan, drop in zip(plans, drops, strict=True)]
    return assemble(kept, np.arange(len(ranks)))


def _verdicts(ranks: Sequence[Sequence[Item]]) -> tuple[bool, str | None]:
    """Returns whether DCP accepts, and the reason for which assembly refuses."""
    try:
        _of_ours(ranks)
    except InvalidGeometryError as error:
        return not _of_dcp(ranks)[1], error.reason
    return not _of_dcp(ranks)[1], None


def _is_comparable(cut: Cut) -> bool:
    """False for the differences above: no dimension, empty chunks, other chunks at the same place, no chunk."""
    places = [offsets for offsets, _ in set(cut.chunks)]
    has_empty = any(0 in sizes for _, sizes in cut.chunks)
    return bool(cut.shape) and bool(cut.chunks) and not has_empty and len(places) == len(set(places))


@settings(max_examples=4 * settings().max_examples)
@given(st.data())
def test_verdicts_and_chunks_are_those_of_dcp(data: st.DataObject) -> None:
    """Tensors cut rightly and wrongly, spread over two ranks and more, replicated here and there."""
    # More than are needed: those on which the verdicts rightly differ are left out, not the whole example.
    comparable = [cut for cut in data.draw(st.lists(cuts(), min_size=4, max_size=6)) if _is_comparable(cut)]
    assume(comparable)
    drawn = {f"t{at}": cut for at, cut in enumerate(comparable[: data.draw(st.integers(1, 3))])}
    ranks: list[list[Item]] = [[] for _ in range(data.draw(st.integers(2, 4)))]
    for fqn, cut in drawn.items():
        for offsets, sizes in dict.fromkeys(cut.chunks):
            for rank in data.draw(st.sets(st.integers(0, len(ranks) - 1), min_size=1)):
                ranks[rank].append(shard(fqn, cut.shape, offsets, sizes))
    for rank in range(len(ranks)):
        ranks[rank] += data.draw(st.sampled_from([[], [raw("x")], [whole("plain", (3,)), raw("x")]]))

    metadata, found = _of_dcp(ranks)
    try:
        checkpoint = _of_ours(ranks)
    except InvalidGeometryError as error:
        assert {text.split()[0] for text in found} == {f"key:{violation.field}" for violation in error.violations}
        return

    assert [] == found
    assert set(metadata.state_dict_metadata) == set(checkpoint.fqns)
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            theirs = {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks}
            assert theirs == {chunk[1:] for chunk in chunks_of(checkpoint, fqn)}
        else:
            assert isinstance(entry, BytesStorageMetadata)


def test_a_single_plan_is_checked_for_holes_too() -> None:
    """One process that saves half a tensor has lost the other half."""
    assert (True, "GEOMETRY_HOLE") == _verdicts([[shard("w", (4,), (0,), (2,))]])


def test_an_empty_chunk_does_not_stand_for_the_one_with_elements() -> None:
    """DCP kept the empty one here, and then missed the elements that it had dropped."""
    ranks = [[shard("w", (4,), (0,), (0,))], [shard("w", (4,), (0,), (4,))]]

    assert (False, None) == _verdicts(ranks)
    assert [(1, (0,), (4,))] == chunks_of(_of_ours(ranks), "w")


def test_unlike_boxes_at_the_same_place_overlap() -> None:
    """DCP dropped the smaller one without a word: what it held is then whatever the other rank thinks it is."""
    ranks = [[shard("w", (4,), (0,), (4,))], [shard("w", (4,), (0,), (2,))]]

    assert (True, "GEOMETRY_OVERLAP") == _verdicts(ranks)


def test_an_empty_chunk_inside_another_overlaps_nothing() -> None:
    """It has no cells; DCP's interval test does not see that."""
    ranks = [[shard("w", (4,), (0,), (4,))], [shard("w", (4,), (2,), (0,))]]

    assert (False, None) == _verdicts(ranks)


def test_shards_of_unlike_tensors_are_no_tensor() -> None:
    """DCP stores rank 0's dtype, and the load of rank 1's bytes goes wrong."""
    ranks = [[shard("w", (4,), (0,), (2,), "float32")], [shard("w", (4,), (2,), (2,), "float16")]]

    assert (True, "GEOMETRY_DISAGREEMENT") == _verdicts(ranks)


@pytest.mark.parametrize("other", [raw("x"), shard("x", (2,), (1,), (1,))])
def test_mixed_kinds_are_a_typed_error(other: Item) -> None:
    """DCP's is an AssertionError that names neither entry nor ranks, or nothing when a whole tensor comes first."""
    ranks = [[other], [whole("x", (2,))]]
    with pytest.raises(AssertionError):
        _of_dcp(ranks)

    with pytest.raises(InvalidGeometryError) as caught:
        _of_ours(ranks)
    assert "GEOMETRY_DISAGREEMENT" == caught.value.reason


def test_an_entry_that_nobody_wrote_is_missed() -> None:
    """Which happens when ranks drop what each believes another writes: DCP has no record that it was ever there."""
    with pytest.raises(InvalidGeometryError):
        assembled([whole("y"), declared(whole("x"))])
