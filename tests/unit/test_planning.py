"""Every item that several ranks hold is written exactly once, by a rank that is decided the same everywhere."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint._dedup_save_plans import dedup_save_plans

from shardbook.core import election, limits, planned, planning, ragged
from shardbook.core.columns import BoolArray
from shardbook.core.planning import decide
from shardbook.core.structure import RankPlan
from shardbook.core.table import EntryKind
from shardbook.errors import InvalidArgumentError
from tests.unit.dcp_plans import save_plan
from tests.unit.ranks import Item, plan_of, raw, shard, structure_of, table_of, whole

_POOL = [
    *(shard("w", (8, 2), (at, 0), (2, 2)) for at in (0, 2, 4, 6)),
    *(shard("v", (6,), (at,), (3,), "float16") for at in (0, 3)),
    shard("e", (0, 3), (0, 0), (0, 3)),
    shard("s", (), ()),
    whole("t", (5, 5)),
    whole("step"),
    raw("x"),
    raw(""),
]


@st.composite
def _ranks(draw: st.DrawFn) -> list[list[Item]]:
    """Ranks whose plans are drawn from a pool; some share a plan."""
    plans = draw(st.lists(st.lists(st.sampled_from(_POOL), unique=True), min_size=1, max_size=4))
    return draw(st.lists(st.sampled_from(plans), min_size=1, max_size=7))


def _written(ranks: Sequence[Sequence[Item]], drops: Sequence[BoolArray]) -> list[list[Item]]:
    return [
        [item for item, drop in zip(items, dropped.tolist(), strict=True) if not drop]
        for items, dropped in zip(ranks, drops, strict=True)
    ]


def _decide(ranks: Sequence[Sequence[Item]], *, save_to_lowest_rank: bool = False) -> list[list[Item]]:
    plans = [plan_of(items) for items in ranks]
    return _written(ranks, decide(plans, np.arange(len(ranks)), save_to_lowest_rank=save_to_lowest_rank))


def _bytes(plan: RankPlan, drops: BoolArray) -> int:
    return int(structure_of(plan, np.flatnonzero(~drops).tolist()).lengths.sum())


# ---------------------------------------------------------------- exactly once


@given(_ranks(), st.booleans())
def test_every_item_is_written_exactly_once_by_one_of_its_holders(ranks: list[list[Item]], lowest: bool) -> None:
    """Nothing is lost, nothing is written twice, and nobody writes what it does not hold."""
    written = _decide(ranks, save_to_lowest_rank=lowest)

    count = Counter(item for items in written for item in items)
    assert {item: 1 for items in ranks for item in items} == dict(count)


@given(_ranks())
def test_what_is_written_is_what_dcp_writes(ranks: list[list[Item]]) -> None:
    """The same items as after DCP's dedup_save_plans; and the same writers where those are the lowest ranks."""
    written = _decide(ranks)
    theirs = dedup_save_plans([save_plan(items) for items in ranks])
    assert Counter(item.index for plan in theirs for item in plan.items) == Counter(
        item.index for items in written for item in save_plan(items).items
    )

    lowest = _decide(ranks, save_to_lowest_rank=True)
    theirs = dedup_save_plans([save_plan(items) for items in ranks], save_to_lowest_rank=True)
    assert [plan.items for plan in theirs] == [save_plan(items).items for items in lowest]


def test_whole_tensors_and_bytes_are_the_same_item_whatever_their_content() -> None:
    """As in DCP a plain tensor is saved once by its name; that ranks differ is warned of at assembly."""
    ranks = [[whole("t", (3,)), raw("x")], [whole("t", (4, 4), "float16"), raw("x")], [whole("t", ())]]

    written = [item.fqn for items in _decide(ranks) for item in items]

    assert ["t", "x"] == sorted(written)


def test_boxes_of_other_sizes_or_dimensions_are_other_items() -> None:
    """DCP takes shards that begin at the same place for the same, and may keep the empty one; we keep both."""
    ranks = [
        [shard("w", (4, 1), (0, 0), (0, 1)), shard("v", (4,), (0,), (4,))],
        [shard("w", (4, 1), (0, 0), (4, 1)), shard("v", (4, 1), (0, 0), (4, 1))],
    ]

    assert ranks == _decide(ranks)


def test_kinds_are_not_mixed() -> None:
    """An entry that is a tensor here and bytes there is written by both, so that assembly can name the ranks."""
    ranks = [[raw("x")], [whole("x")], [shard("x", (), ())]]

    assert ranks == _decide(ranks)


def test_an_item_named_twice_by_one_plan_is_kept_once() -> None:
    """Also when no other rank holds it."""
    item = shard("w", (4,), (0,), (4,))
    drops = decide([plan_of([item, raw("x"), item])], np.array([0]))

    assert [[False, False, True]] == [drop.tolist() for drop in drops]


def test_ranks_without_items_drop_nothing() -> None:
    """An empty plan is decided about like any other."""
    assert [[], [False]] == [drop.tolist() for drop in decide([plan_of([]), plan_of([raw("x")])], np.array([0, 1]))]
    assert [[]] == [drop.tolist() for drop in decide([plan_of([])], np.array([0]))]


def test_items_whose_hashes_collide_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes spread items; they never decide that two items are the same."""
    monkeypatch.setattr(planned.Boxes, "hashes", lambda boxes: np.full(len(boxes.row), 7, dtype=np.uint64))
    ranks = [_POOL, _POOL[::-1], _POOL[::2]]

    written = _decide(ranks)

    assert dict.fromkeys(_POOL, 1) == dict(Counter(item for items in written for item in items))


def test_a_rank_index_that_names_no_plan_is_refused() -> None:
    """Never an IndexError from inside."""
    for index in ([], [2], [-1]):
        with pytest.raises(InvalidArgumentError):
            decide([plan_of([raw("x")])], np.array(index, dtype=np.int64))


# ---------------------------------------------------------------- decided the same everywhere


@given(_ranks())
def test_a_decision_depends_on_the_ordered_plans_alone(ranks: list[list[Item]]) -> None:
    """Not on the order of the distinct plans, on which objects are shared, nor on plans being listed twice."""
    apart = decide([plan_of(items) for items in ranks], np.arange(len(ranks)))
    distinct = list(dict.fromkeys(map(tuple, ranks)))[::-1]
    table = table_of(_POOL)
    folded = decide(
        [plan_of(items, table=table) for items in distinct],
        np.array([distinct.index(tuple(items)) for items in ranks]),
    )

    assert [drop.tolist() for drop in apart] == [drop.tolist() for drop in folded]


def test_decisions_of_this_version_never_change() -> None:
    """Replicas of different releases and machines decide the same: a change of this digest needs a new version."""
    ranks = [_POOL] * 5 + [_POOL[:7]] * 3 + [[whole(f"layers.{at}", (at + 1, 17)) for at in range(200)]] * 7

    drops = decide([plan_of(items) for items in ranks], np.arange(len(ranks)))

    digest = hashlib.sha256(b"".join(np.packbits(drop).tobytes() for drop in drops)).hexdigest()
    expected = "0ea9c4c5db089da5141b4e60d07b13aabfb2466b08f3ebdc06deb41bc36378dd"
    assert (2, expected) == (planning.ALGORITHM_VERSION, digest)


@given(_ranks(), _ranks())
def test_ranks_without_a_common_name_are_decided_about_apart(first: list[list[Item]], second: list[list[Item]]) -> None:
    """Pipeline stages cost the memory of one of them, and what one does changes nothing for the others."""
    stage = [[replace(item, fqn=f"stage1.{item.fqn}") for item in items] for items in second]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "ITEMS_AT_ONCE", 1)
        together = _decide([*first, *stage])
        assert _decide(first) == together[: len(first)]
    count = Counter(item for items in together for item in items)
    assert {item: 1 for items in [*first, *stage] for item in items} == dict(count)


@given(st.lists(st.lists(st.sampled_from(_POOL)), min_size=1, max_size=4), st.data(), st.booleans())
def test_however_many_entries_are_looked_at_at_a_time(
    drawn: list[list[Item]], data: st.DataObject, save_to_lowest_rank: bool
) -> None:
    """Memory is for a part of the items of all ranks, and the decision is that about all of them at once."""
    plans = [plan_of(items) for items in drawn]
    index = np.array(data.draw(st.lists(st.integers(0, len(plans) - 1), min_size=1, max_size=7)))
    whole = decide(plans, index, save_to_lowest_rank=save_to_lowest_rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "ITEMS_AT_ONCE", 1)
        patch.setattr(ragged, "_PART_COUNT", 1_000)
        in_parts = decide(plans, index, save_to_lowest_rank=save_to_lowest_rank)
    assert [drop.tolist() for drop in whole] == [drop.tolist() for drop in in_parts]


def test_a_score_has_room_for_every_rank() -> None:
    """A larger world needs wider scores, which elect other ranks: a new version of the algorithm."""
    assert int(election._RANK_MASK) >= limits.MAX_WORLD_SIZE - 1


def test_other_tensors_do_not_change_who_writes_an_item() -> None:
    """Not even when they have more dimensions, which pads every other tensor further."""
    items = [shard("w", (64,), (at,), (1,)) for at in range(64)]
    deep = shard("d", (1, 1, 1, 1, 2), (0, 0, 0, 0, 0), (1, 1, 1, 1, 2))

    before, after = _decide([items] * 4), _decide([items, [*items, deep], items, items])

    assert before == [[item for item in rank if item is not deep] for rank in after]


# ---------------------------------------------------------------- spread by bytes


def _model(layers: int) -> list[tuple[int, int]]:
    layer = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    return [(32000, 4096), *[*layer, (1, 4096), (1, 4096)] * layers, (1, 4096), (32000, 4096)]


def _replicated(shards: int, replicas: int) -> list[list[Item]]:
    """A model of 24 layers sharded over ``shards`` ranks, ``replicas`` times; plainly replicated for 1 shard."""
    ranks = []
    for part in range(shards):
        items = []
        for at, (rows, columns) in enumerate(_model(24)):
            step = -(-rows // shards)
            low = min(part * step, rows)
            items.append(shard(f"w{at}", (rows, columns), (low, 0), (min(step, rows - low), columns)))
        ranks.append(items)
    return ranks * replicas


@pytest.mark.parametrize(("shards", "replicas"), [(1, 4), (1, 16), (1, 64), (8, 4), (4, 16)])
def test_the_busiest_rank_writes_hardly_more_than_with_dcp(shards: int, replicas: int) -> None:
    """DCP's greedy choice sees every item before; scores that see none come within a tenth of it."""
    ranks = _replicated(shards, replicas)
    plans = [plan_of(items) for items in ranks]
    drops = decide(plans, np.arange(len(ranks)))
    ours = max(_bytes(plan, drop) for plan, drop in zip(plans, drops, strict=True))
    theirs = dedup_save_plans([save_plan(items) for items in ranks])

    def size(at: int) -> int:
        kept = {item.index for item in theirs[at].items}
        all_items = save_plan(ranks[at]).items
        return _bytes(plans[at], np.array([item.index not in kept for item in all_items]))

    assert ours <= 1.1 * max(size(at) for at in range(len(ranks)))


def test_a_rank_that_changes_moves_little_of_what_others_write() -> None:
    """With DCP's greedy choice one extra item on one rank reshuffles all ranks, and every stored structure."""
    ranks = _replicated(1, 32)
    extra = [whole(f"extra{at}", (512, 512)) for at in range(3)]
    before = _decide(ranks)
    after = _decide([*ranks[:5], [*extra, *ranks[5]], *ranks[6:]])

    changed = [at for at in range(32) if [i for i in after[at] if i.kind is EntryKind.SHARD] != before[at]]
    assert len(changed) <= 3


def test_one_huge_tensor_leaves_the_rest_to_the_others() -> None:
    """A tensor larger than any fair share goes to one rank, and little else with it."""
    items = [whole("embedding", (100_000, 100)), *(whole(f"t{at}", (1000, 100)) for at in range(70))]
    plan = plan_of(items)

    drops = decide([plan], np.zeros(8, dtype=np.int64))

    loads = sorted(_bytes(plan, drop) for drop in drops)
    assert loads[-1] <= 100_000 * 100 * 4 + 1000
    assert loads[-2] <= 1.5 * loads[0] + 1000 * 100 * 4 * 20
