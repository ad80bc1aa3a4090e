"""What a checkpoint needs of its files: the columns say what a plain walk over the extents says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardbook.core.extents import Extents, encode_extents
from shardbook.core.footprint import NO_RANK, NOT_THERE, Footprint, rank_of_file
from shardbook.core.limits import INT64_MAX
from shardbook.core.locate import locate
from shardbook.errors import CorruptManifestError
from tests.unit.ranks import assembled, shard
from tests.unit.test_locate import World, stored, worlds


@dataclass(frozen=True)
class Extent:
    """One extent, by plain numbers."""

    file: int
    start: int
    length: int

    @property
    def end(self) -> int:
        """First byte behind it."""
        return self.start + self.length

    def overlaps(self, other: Extent) -> bool:
        """True when both claim a byte."""
        return self.file == other.file and max(self.start, other.start) < min(self.end, other.end)


def footprint(extents: list[Extent]) -> Footprint:
    """The footprint of extents; each is an entry of its own."""
    file_count = 1 + max((one.file for one in extents), default=-1)
    numbers = np.array([(one.file, one.start, one.length) for one in extents], dtype=np.int64).reshape(-1, 3)
    return Footprint.of(
        [f"f{number}" for number in range(file_count)],
        list(range(file_count)),
        numbers[:, 0],
        numbers[:, 1],
        numbers[:, 2],
        np.arange(len(extents), dtype=np.int64),
        tuple(f"e{number}" for number in range(len(extents))),
    )


def extents(most: int = 12) -> st.SearchStrategy[list[Extent]]:
    """Extents in few bytes of few files, so that they meet; numbers of the largest kind too."""
    small = st.integers(0, 12)
    far = st.integers(INT64_MAX // 2, INT64_MAX - 20)
    one = st.builds(Extent, st.integers(0, 2), st.one_of(small, small, far), small)
    return st.lists(one, max_size=most)


@given(extents(), st.lists(st.integers(-1, 20), min_size=3, max_size=3))
def test_lost_is_what_a_walk_finds_lost(found: list[Extent], sizes: list[int]) -> None:
    """Which extents, how many by file, from which byte, and how many bytes; -1 is a file that is not there."""
    whole = footprint(found)
    by_path = dict(zip(("f0", "f1", "f2"), sizes, strict=True))
    lost = whole.lost(np.array([by_path[path] for path in whole.paths], dtype=np.int64))
    size_of = {one: by_path[f"f{one.file}"] for one in found}
    assert [one.end > size_of[one] for one in found] == lost.rows.tolist()
    for at, path in enumerate(whole.paths):
        gone = [one for one in found if f"f{one.file}" == path and one.end > size_of[one]]
        begins = [max(one.start, by_path[path]) for one in gone]
        assert (len(gone), min(begins, default=0), sum(one.end for one in gone) - sum(begins)) == (
            int(lost.counts[at]),
            int(lost.first[at]),
            int(lost.lost_bytes[at]),
        )
        own = [one for one in found if f"f{one.file}" == path]
        assert max(one.end for one in own) == int(whole.needed[at])
        assert sorted(row for row, one in enumerate(found) if one in own) == sorted(whole.rows_of(at).tolist())


@given(extents())
def test_overlaps_are_what_comparing_all_pairs_finds(found: list[Extent]) -> None:
    """Each extent that claims a byte of one that begins no later is named once, with one that it really meets."""
    whole = footprint(found)
    later, earlier = whole.overlaps()
    assert len(set(later.tolist())) == len(later)
    for row, other in zip(later.tolist(), earlier.tolist(), strict=True):
        assert found[row].overlaps(found[other])
        assert row != other
        assert found[other].start <= found[row].start
    # Of each set of extents with equal beginnings all but one are named, and of the others those that meet any before.
    expected = 0
    for number in range(3):
        own = sorted((one for one in found if one.file == number and one.length), key=lambda one: one.start)
        expected += sum(any(one.overlaps(other) for other in own[:at]) for at, one in enumerate(own))
    assert expected == len(later)


@given(worlds())
def test_footprint_of_a_checkpoint_is_that_of_its_files(world: World) -> None:
    """Several files a rank, variable lengths, explicit extents with gaps: what a walk of the files needs."""
    whole = Footprint.of_columns(*stored(world), "abc-a1")
    ends: dict[str, int] = {}
    for path, start, length in world.places.values():
        ends[f"abc-a1/{path}"] = max(ends.get(f"abc-a1/{path}", 0), start + length)
    assert ends == dict(zip(whole.paths, whole.needed.tolist(), strict=True))
    assert [rank_of_file(path) for path in whole.paths] == whole.ranks.tolist()
    assert len(world.places) == whole.extent_count
    assert sum(length for _, _, length in world.places.values()) == whole.size_bytes
    assert ([], []) == tuple(rows.tolist() for rows in whole.overlaps())
    some = whole.of_ranks([0, 2])
    assert [path for path in whole.paths if rank_of_file(path) in (0, 2)] == list(some.paths)
    assert {path: end for path, end in ends.items() if rank_of_file(path) in (0, 2)} == dict(
        zip(some.paths, some.needed.tolist(), strict=True)
    )
    entries = [
        (whole.fqns[entry], start) for entry, start in zip(some.entry.tolist(), some.start.tolist(), strict=True)
    ]
    assert all(fqn in some.fqns for fqn, _ in entries)


def test_files_that_are_named_twice_are_one() -> None:
    """Slices of an import name the same file again; a file without an extent is none."""
    number, start = np.array([0, 2, 2, 1]), np.array([0, 10, 20, 5])
    whole = Footprint.of(
        ["a", "b", "a", "unused"], [3, None, 3, 4], number, start, np.full(4, 10), np.arange(4), ("w", "x", "y", "z")
    )
    assert (("a", "b"), [3, NO_RANK], [0, 0, 0, 1], [30, 15]) == (
        whole.paths,
        whole.ranks.tolist(),
        whole.file.tolist(),
        whole.needed.tolist(),
    )


def test_nothing_needs_nothing() -> None:
    """A checkpoint without extents, of ranks that wrote nothing."""
    none = np.zeros(0, dtype=np.int64)
    whole = Footprint.of([], [], none, none, none, none, ())
    assert (0, 0, 0) == (whole.file_count, whole.extent_count, whole.size_bytes)
    assert not whole.lost(none).rows.any()
    assert 0 == len(whole.overlaps()[0])


@pytest.mark.parametrize(("start", "length"), [(-1, 5), (3, -1), (INT64_MAX, 1)])
def test_impossible_extents_are_damage(start: int, length: int) -> None:
    """Sums of damaged columns never wrap around to something that fits."""
    one = np.zeros(1, dtype=np.int64)
    with pytest.raises(CorruptManifestError):
        Footprint.of(["a"], [0], one, np.array([start]), np.array([length]), one, ("w",))


def test_a_file_that_its_rank_did_not_write_is_damage() -> None:
    """An index beyond a rank's own files would name the next rank's."""
    structure = assembled([shard("w", (4,), (0,), (2,))], [shard("w", (4,), (2,), (2,))])
    located = locate(structure, [(encode_extents(Extents()), b"")] * 2)
    object.__setattr__(structure, "file", structure.file + 1)
    with pytest.raises(CorruptManifestError):
        Footprint.of_columns(structure, located, "")


@pytest.mark.parametrize(
    ("path", "rank"),
    [
        ("__0_0.distcp", 0),
        ("a/b/__17_3.distcp", 17),
        ("__5_", None),
        ("model-00001-of-00002.safetensors", None),
        ("x__3_0.distcp", None),
        (f"__{1 << 20}_0.distcp", None),
        ("__3_0/other", None),
    ],
)
def test_rank_by_name(path: str, rank: int | None) -> None:
    """Only the form of DCP's writers says a rank, and none beyond the largest world."""
    assert rank == rank_of_file(path)


def test_a_size_that_stands_for_nothing_is_below_every_size() -> None:
    """So that a file that is not there lacks its empty extents too."""
    lost = footprint([Extent(0, 0, 0)]).lost(np.array([NOT_THERE]))
    assert ([1], [0]) == (lost.counts.tolist(), lost.lost_bytes.tolist())
