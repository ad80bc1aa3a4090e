"""Where assembled chunks lie: files, positions and starts, with lengths that are known only after the write."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardbook.core.assembly import assemble
from shardbook.core.structure import FileName, RankStructure
from tests.unit.ranks import Item, plan_of, raw, whole


@st.composite
def _structures(draw: st.DrawFn, rank: int) -> RankStructure:
    """A rank's own tensors and bytes entries, in any order in any number of files."""
    count = draw(st.integers(0, 7))
    items: list[Item] = [
        raw(f"{rank}.{at}") if draw(st.booleans()) else whole(f"{rank}.{at}", (2,)) for at in range(count)
    ]
    plan = plan_of(items)
    kept = list(range(count))
    ends = sorted({count, *draw(st.lists(st.integers(1, max(count, 1)), max_size=3))} - {0}) if count else []
    ends = [end for end in ends if end <= count]
    lengths = [0 if plan.variable[at] else draw(st.integers(1, 50)) for at in kept]
    return RankStructure(
        plan,
        np.array(kept, dtype=np.int64),
        tuple(FileName(True, f"{at}.distcp") for at in range(len(ends))),
        np.diff([0, *ends]).astype(np.int64),
        np.array(draw(st.permutations(kept)), dtype=np.int64),
        np.array(lengths, dtype=np.int64),
    )


@given(st.data())
def test_starts_follow_from_the_lengths_of_what_lies_before_in_the_file(data: st.DataObject) -> None:
    """The base and the variable lengths between var_lo and var_hi add up to the start of every chunk."""
    structures = [data.draw(_structures(rank)) for rank in range(data.draw(st.integers(1, 3)))]
    variable = [
        data.draw(st.lists(st.integers(1, 99), min_size=(n := int(s.variable.sum())), max_size=n)) for s in structures
    ]
    expected = {}
    for rank, structure in enumerate(structures):
        lengths, position = iter(variable[rank]), 0
        for file, count in enumerate(structure.file_items.tolist()):
            start = 0
            for _ in range(count):
                item = int(structure.order[position])
                fixed = int(structure.lengths[item])
                fqn = structure.plan.table.fqns[int(structure.plan.entry[item])]
                expected[fqn] = rank, position, file, start, fixed
                start += next(lengths) if structure.variable[item] else fixed
                position += 1

    checkpoint = assemble(structures, np.arange(len(structures)), at_once=data.draw(st.sampled_from([1, 1 << 20])))

    actual = {}
    for at, fqn in enumerate(checkpoint.fqns):
        owner = int(checkpoint.owner[at])
        before = variable[owner][int(checkpoint.var_lo[at]) : int(checkpoint.var_hi[at])]
        actual[fqn] = (
            owner,
            int(checkpoint.position[at]),
            int(checkpoint.file[at]),
            int(checkpoint.base[at]) + sum(before),
            int(checkpoint.length[at]),
        )
    assert expected == actual


def test_files_are_named_by_rank_and_equal_lists_are_stored_once() -> None:
    """The rank's number is in no structure: a thousand ranks share one list of names."""
    one, two = (plan_of([whole(f"t{rank}", (2,))]) for rank in range(2))
    name = (FileName(True, "0.distcp"),)

    checkpoint = assemble(
        [
            RankStructure(plan, np.array([0]), name, np.array([1]), np.array([0]), np.array([108]))
            for plan in (one, two)
        ],
        np.array([0, 1]),
    )

    assert (name,) == checkpoint.rank_files.distinct
    assert ["__0_0.distcp", "__1_0.distcp"] == [checkpoint.rank_files.path(rank, 0) for rank in range(2)]
