"""One rank's state dict changes: what is written is what DCP would write, and only that rank's structure travels."""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select
from torch.distributed.checkpoint.planner import WriteItem

from shardbook import Client, dcp
from shardbook.core.blocks import block_fqn
from shardbook.core.structure import BlobKind
from shardbook.dcp import SaveState
from shardbook_server.app import running_server
from shardbook_server.settings import Settings
from shardbook_server.storage.tables import structure_tensors
from tests.databases import Databases, opened
from tests.torch.threads import Pieces, Ranks, RankSaved, by_dcp

#: What travels has nothing to do with the kind of database.
pytestmark = pytest.mark.soak_with("postgres")

RANKS = 4
_DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)
Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Tensor:
    """A tensor of a rank's state dict. Its values follow from name and shape.

    Attributes:
        shape: Of the whole tensor.
        dtype: Of the whole tensor.
        rows: First row and end of each piece that the rank holds; None for a tensor that is not sharded.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Rows | None = None

    def whole(self, fqn: str) -> torch.Tensor:
        """Returns the whole tensor."""
        generator = torch.Generator().manual_seed(zlib.crc32(repr((fqn, self.shape)).encode()))
        return torch.randint(0, 200, self.shape, generator=generator).to(self.dtype)

    def held(self, fqn: str) -> torch.Tensor:
        """Returns what the rank holds."""
        return self.whole(fqn) if self.rows is None else Pieces.of(self.whole(fqn), self.rows)


#: A rank's state dict: tensors, and numbers for what is pickled.
Spec = dict[str, Tensor | int]


def state_of(spec: Spec) -> dict[str, Any]:
    """The state dict."""
    return {fqn: one.held(fqn) if isinstance(one, Tensor) else one for fqn, one in spec.items()}


# ---------------------------------------------------------------- worlds


def _shapes_of(ndim: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(1, 6)] * ndim)


_shapes = st.integers(1, 3).flatmap(_shapes_of)
_tensors = st.builds(Tensor, _shapes, st.sampled_from(_DTYPES))


def cut(shape: tuple[int, ...], at: int) -> Rows:
    """One or two pieces of all rows."""
    return ((0, at), (at, shape[0])) if 0 < at < shape[0] else ((0, shape[0]),)


@st.composite
def worlds(draw: st.DrawFn, *, shared: bool) -> list[Spec]:
    """State dicts of all ranks that make whole tensors: replicated and sharded ones, own ones, and objects.

    Args:
        draw: Of hypothesis.
        shared: Whether anything is held by more than one rank.
    """
    world: list[Spec] = [{} for _ in range(RANKS)]
    for number in range(draw(st.integers(1, 3))):
        shape = (draw(st.integers(RANKS, 12)), *draw(_shapes)[:2])
        bounds = sorted({0, shape[0], *draw(st.lists(st.integers(1, shape[0] - 1), max_size=4))})
        pieces: dict[int, list[tuple[int, int]]] = {}
        for box in itertools.pairwise(bounds):
            holders = draw(st.lists(st.integers(0, RANKS - 1), min_size=1, max_size=3 if shared else 1, unique=True))
            for rank in holders:
                pieces.setdefault(rank, []).append(box)
        dtype = draw(st.sampled_from(_DTYPES))
        for rank, rows in pieces.items():
            world[rank][f"sharded{number}"] = Tensor(shape, dtype, tuple(rows))
    for number in range(draw(st.integers(1, 4)) if shared else 0):
        one = draw(st.one_of(_tensors, st.integers(0, 9)))
        for rank in draw(st.lists(st.integers(0, RANKS - 1), min_size=2, max_size=RANKS, unique=True)):
            world[rank][f"replicated{number}"] = one
    for rank, spec in enumerate(world):
        for number in range(draw(st.integers(0, 2))):
            spec[f"own{rank}.{number}"] = draw(st.one_of(_tensors, st.integers(0, 9)))
    return world


@dataclass
class Changing:
    """A rank whose state dict is about to change, and the others.

    Attributes:
        rank: Which.
        spec: Its new state dict.
        others: Those of the others.
        draw: Of hypothesis.
    """

    rank: int
    spec: Spec
    others: list[Spec]
    draw: st.DrawFn

    def is_own(self, fqn: str) -> bool:
        """Whether no other rank has anything of it."""
        return all(fqn not in other for other in self.others)

    def is_copied(self, fqn: str, box: tuple[int, int]) -> bool:
        """Whether another rank has the piece too."""
        return any(box in (one.rows or ()) for one in self._theirs(fqn))

    def _theirs(self, fqn: str) -> list[Tensor]:
        found = [other.get(fqn) for other in self.others]
        return [one for one in found if isinstance(one, Tensor)]

    def chosen(self, fits: Callable[[str, Tensor | int], bool], of: Spec | None = None) -> str | None:
        """One of the entries that fit, if there are any."""
        found = [fqn for fqn, one in (self.spec if of is None else of).items() if fits(fqn, one)]
        return self.draw(st.sampled_from(found)) if found else None


def add(to: Changing) -> None:
    """An entry of its own: a tensor, one in pieces, or an object."""
    one: Tensor | int = to.draw(st.one_of(_tensors, st.integers(0, 9)))
    if isinstance(one, Tensor) and to.draw(st.booleans()):
        one = replace(one, rows=cut(one.shape, to.draw(st.integers(0, one.shape[0]))))
    to.spec[f"added{to.rank}.{to.draw(st.integers(0, 2))}"] = one


def remove(to: Changing) -> None:
    """An entry that nobody else needs this rank for."""
    fqn = to.chosen(lambda fqn, one: to.is_own(fqn) or not (isinstance(one, Tensor) and one.rows))
    if fqn is not None:
        del to.spec[fqn]


def reshape(to: Changing) -> None:
    """Another shape: of what it has alone, or of its copy of what others have in the old one.

    A copy keeps its number of dimensions: DCP's own planner fails on replicas that differ in it.
    """
    fqn = to.chosen(lambda fqn, one: isinstance(one, Tensor) and (to.is_own(fqn) or one.rows is None))
    if fqn is not None:
        one = to.spec[fqn]
        assert isinstance(one, Tensor)
        shape = to.draw(_shapes if to.is_own(fqn) else _shapes_of(len(one.shape)))
        to.spec[fqn] = Tensor(shape, one.dtype, None if one.rows is None else cut(shape, shape[0] // 2))


def retype(to: Changing) -> None:
    """Another dtype, likewise."""
    fqn = to.chosen(lambda fqn, one: isinstance(one, Tensor) and (to.is_own(fqn) or one.rows is None))
    if fqn is not None:
        one = to.spec[fqn]
        assert isinstance(one, Tensor)
        to.spec[fqn] = replace(one, dtype=to.draw(st.sampled_from(_DTYPES)))


def recut(to: Changing) -> None:
    """A piece that only this rank holds becomes two."""

    def cuts(fqn: str, one: Tensor | int) -> list[tuple[int, int]]:
        rows = one.rows if isinstance(one, Tensor) else None
        return [box for box in rows or () if box[1] - box[0] > 1 and not to.is_copied(fqn, box)]

    fqn = to.chosen(lambda fqn, one: bool(cuts(fqn, one)))
    if fqn is not None:
        one = to.spec[fqn]
        assert isinstance(one, Tensor)
        begin, end = box = to.draw(st.sampled_from(cuts(fqn, one)))
        at = to.draw(st.integers(begin + 1, end - 1))
        rest = [other for other in one.rows or () if other != box]
        to.spec[fqn] = replace(one, rows=tuple(sorted([*rest, (begin, at), (at, end)])))


def copy(to: Changing) -> None:
    """What another rank has: a replica, or a piece."""
    other = to.draw(st.sampled_from(to.others))
    fqn = to.chosen(lambda fqn, _: not fqn.startswith("added"), other)
    if fqn is None:
        return
    theirs, ours = other[fqn], to.spec.get(fqn)
    if isinstance(theirs, Tensor) and theirs.rows:
        held = ours.rows or () if isinstance(ours, Tensor) else ()
        box = to.draw(st.sampled_from(theirs.rows))
        to.spec[fqn] = replace(theirs, rows=tuple(sorted({*held, box})))
    elif ours is None:
        to.spec[fqn] = theirs


def give_up(to: Changing) -> None:
    """A piece that another rank has too."""

    def spare(fqn: str, one: Tensor | int) -> list[tuple[int, int]]:
        return [box for box in (one.rows if isinstance(one, Tensor) else None) or () if to.is_copied(fqn, box)]

    fqn = to.chosen(lambda fqn, one: bool(spare(fqn, one)))
    if fqn is not None:
        one = to.spec[fqn]
        assert isinstance(one, Tensor)
        box = to.draw(st.sampled_from(spare(fqn, one)))
        rows = tuple(other for other in one.rows or () if other != box)
        if rows:
            to.spec[fqn] = replace(one, rows=rows)
        else:
            del to.spec[fqn]


#: What leaves alone what other ranks hold.
ALONE = (add, remove, reshape, retype, recut)


@st.composite
def changes(draw: st.DrawFn, *, shared: bool) -> tuple[list[Spec], list[Spec], int]:
    """A world, the same after one rank has changed, and which."""
    before = draw(worlds(shared=shared))
    rank = draw(st.integers(0, RANKS - 1))
    to = Changing(rank, dict(before[rank]), [spec for at, spec in enumerate(before) if at != rank], draw)
    ways = (*ALONE, copy, give_up) if shared else ALONE
    for change in draw(st.lists(st.sampled_from(ways), min_size=1, max_size=3)):
        change(to)
    after = [to.spec if at == rank else spec for at, spec in enumerate(before)]
    return before, after, rank


# ---------------------------------------------------------------- the test


@dataclass(frozen=True)
class Place:
    """A server, its database, and where checkpoints go."""

    server: str
    database_url: str
    folder: Path

    def tensor_count(self) -> int:
        """Tensors that are stored."""
        with opened(self.database_url) as database, database.read() as connection:
            return connection.execute(select(func.count()).select_from(structure_tensors)).scalar_one()


@pytest.fixture(scope="module")
def place(module_databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One for all examples; each has a project of its own, which knows no structure yet."""
    url = module_databases.new()
    settings = Settings(listen="127.0.0.1:0", http_listen="", database_url=url)
    with running_server(settings) as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDBOOK_SERVER", running.address)
        yield Place(running.address, url, tmp_path_factory.mktemp("changed"))


_numbers = itertools.count(1)
Key = tuple[str, tuple[int, ...] | None]


def key_of(item: WriteItem) -> Key:
    """By what DCP knows an item again."""
    return item.index.fqn, None if item.index.offset is None else tuple(item.index.offset)


def box_of(item: WriteItem) -> tuple[Key, tuple[int, ...] | None]:
    """With its sizes."""
    return key_of(item), None if item.tensor_data is None else tuple(item.tensor_data.chunk.sizes)


def assert_written_as_by_dcp(saved: Sequence[RankSaved], world: Sequence[Spec]) -> None:
    """Every item that DCP would have written, once, and no other; where ranks agree on its sizes, with those."""
    ours = [item for one in saved for item in one.items]
    theirs = by_dcp([state_of(spec) for spec in world])
    assert Counter(map(key_of, theirs)) == Counter(map(key_of, ours))
    shapes: dict[str, set[Any]] = {}
    for spec in world:
        for fqn, one in spec.items():
            shapes.setdefault(fqn, set()).add(one.shape if isinstance(one, Tensor) else None)
    agreed = {fqn for fqn, found in shapes.items() if len(found) == 1}
    assert {box_of(item) for item in theirs if item.index.fqn in agreed} == {
        box_of(item) for item in ours if item.index.fqn in agreed
    }


def assert_loads(target: str | Path, saved: Sequence[RankSaved], world: Sequence[Spec]) -> None:
    """Bit for bit what was written, by the rank that wrote it where ranks do not agree."""
    written = {item.index.fqn: rank for rank, one in enumerate(saved) for item in one.items}
    right: dict[str, Any] = {}
    for fqn, rank in written.items():
        one = world[rank][fqn]
        right[fqn] = one.whole(fqn) if isinstance(one, Tensor) else one
    blank: dict[str, Any] = {
        fqn: torch.full_like(one, 255) if torch.is_tensor(one) else None for fqn, one in right.items()
    }
    dcp.load(blank, target)
    for fqn, one in right.items():
        if torch.is_tensor(one):
            assert one.dtype == blank[fqn].dtype
            assert torch.equal(one.contiguous().view(torch.uint8), blank[fqn].view(torch.uint8)), fqn
        else:
            assert one == blank[fqn]


def check(place: Place, before: list[Spec], after: list[Spec], rank: int) -> set[int]:
    """Saves both, and checks all that holds of every change; returns the ranks that write other items than before."""
    number = next(_numbers)
    run = f"changed-{number}/run"
    ranks = Ranks(place.server, run, RANKS)
    try:
        first = ranks.save(place.folder / f"{number}-1", 1, [state_of(spec) for spec in before])
        count = place.tensor_count()
        second = ranks.save(place.folder / f"{number}-2", 2, [state_of(spec) for spec in after])
    finally:
        ranks.close()
    assert {SaveState.COMMITTED} == {one.result.state for one in (*first, *second)}
    for world, saved, step in ((before, first, 1), (after, second, 2)):
        assert_written_as_by_dcp(saved, world)
        assert_loads(f"{run}@{step}", saved, world)
    assert_loads(place.folder / f"{number}-2", second, after)
    client = Client(place.server)
    blocks = [set(client.get_metadata(f"{run}@{step}").blocks) for step in (1, 2)]
    assert len(blocks[1] - blocks[0]) == place.tensor_count() - count
    touched = {at for at in range(RANKS) if list(map(box_of, first[at].items)) != list(map(box_of, second[at].items))}
    # Nothing is asked of a rank that plans and writes what it did, and no plan of any rank but the one that changed.
    asked = {at: {ref.kind for ref in one.asked} for at, one in enumerate(second) if one.asked}
    assert set(asked) <= touched | {rank}
    assert all(kinds == {int(BlobKind.STRUCTURE)} for at, kinds in asked.items() if at != rank)
    # What is stored anew are tensors that those ranks write, and no other.
    theirs = {item.index.fqn for at in touched | {rank} for item in second[at].items}
    assert theirs >= {block_fqn(block) for block in blocks[1] - blocks[0]}
    if state_of_planning(before[rank]) == state_of_planning(after[rank]):
        assert ({}, set()) == (asked, touched)
    return touched


def state_of_planning(spec: Spec) -> list[tuple[str, object]]:
    """What of a state dict counts for a plan: the value of an object does not."""
    return [(fqn, one if isinstance(one, Tensor) else None) for fqn, one in spec.items()]


@given(changes(shared=False))
@settings(max_examples=10)
def test_only_the_changed_ranks_structure_travels(place: Place, changed: tuple[list[Spec], list[Spec], int]) -> None:
    """Rule: where ranks share nothing, the server asks the changed one alone, and stores its tensors alone."""
    before, after, rank = changed
    assert check(place, before, after, rank) <= {rank}


@given(changes(shared=True))
@settings(max_examples=20)
def test_of_what_ranks_share_only_those_travel_whose_share_changed(
    place: Place, changed: tuple[list[Spec], list[Spec], int]
) -> None:
    """Rule: a rank that writes something for the changed one, or no longer does, is asked too, and nobody else."""
    check(place, *changed)
