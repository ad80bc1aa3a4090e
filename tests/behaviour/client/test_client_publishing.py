"""Whoever publishes, and wherever one is killed: a directory comes to mean its newest attempt and its export."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardbook._publishing import publish, settle
from shardbook.core import directory as names
from shardbook.core.exported import Fingerprint
from tests.behaviour.client.directories import identity
from tests.behaviour.client.publishers import (
    Killed,
    MemoryFiles,
    Publisher,
    Store,
    attempt,
    export,
    meaning,
    meant,
    play,
)

OLDER, NEWER = attempt(identity(1, attempt=1, world_size=1)), attempt(identity(2, attempt=2, world_size=1))
#: Sessions that have an order beside one that has none but its clock, which disagrees.
CIRCLE = [
    attempt(identity(1, session=1, incarnation=b"1" * 16, write_time_s=30.0, world_size=1)),
    attempt(identity(2, session=2, incarnation=b"2" * 16, write_time_s=10.0, world_size=1)),
    attempt(identity(3, session=0, incarnation=b"3" * 16, write_time_s=20.0, world_size=1)),
]


def steps_alone() -> int:
    """How many looks and writes one publisher makes."""
    one = Publisher(Store(), NEWER, "alone")
    return one.step(1000)


def test_nothing_is_written_where_nothing_is_wrong() -> None:
    """Looking again is free of effects, so it can be done by whoever comes by."""
    store = Store()
    publish(MemoryFiles(store, "x"), NEWER, export)
    before, now_s = dict(store.contents), store.now_s
    assert () == settle(MemoryFiles(store, "x"), export)
    assert (before, now_s) == (store.contents, store.now_s)


@pytest.mark.parametrize("first", [0, 1], ids=["older first", "newer first"])
def test_two_race_in_every_interleaving_of_three_switches(first: int) -> None:
    """One is stopped after each of its steps, the other after each of its own, then both go on to their ends."""
    count = steps_alone()
    for before, between in itertools.product(range(count + 1), range(1, count + 8)):
        store = Store()
        publishers = [Publisher(store, one, f"process {number}") for number, one in enumerate((OLDER, NEWER))]
        play(publishers if first == 0 else publishers[::-1], [0] * before + [1] * between)
        assert meant(NEWER) == meaning(store), (before, between)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=120), st.permutations(CIRCLE))
def test_three_race_in_any_interleaving(turns: list[int], order: list[object]) -> None:
    """Also where their order has a circle, all agree on one, whoever came first."""
    store, calm = Store(), Store()
    play([Publisher(store, one, f"process {number}") for number, one in enumerate(order)], turns)  # type: ignore[arg-type]
    for one in CIRCLE:
        publish(MemoryFiles(calm, "calm"), one, export)
    assert meaning(calm) == meaning(store)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 1), max_size=60), st.integers(0, 1))
def test_one_of_two_is_killed_and_the_next_one_repairs(turns: list[int], killed: int) -> None:
    """Whoever looks next finds the newest attempt that left its manifest, and finishes for it."""
    store = Store()
    publishers = [Publisher(store, one, f"process {number}") for number, one in enumerate((OLDER, NEWER))]
    for turn in turns:
        publishers[turn].step()
    publishers[killed].kill()
    publishers[1 - killed].finish()
    settle(MemoryFiles(store, "next"), export)
    left = names.manifest_path(NEWER.manifest.identity.prefix) in store.contents
    assert meant(NEWER if left else OLDER) == meaning(store)


def test_killed_after_each_step_and_repaired_by_each_that_may_come_next() -> None:
    """A reader or sync; a sync without export and one with it; the same attempt's own process, again."""
    for step, how in itertools.product(range(steps_alone() + 1), ("settle", "without export", "again")):
        store = Store()
        publish(MemoryFiles(store, "earlier"), OLDER, export)
        one = Publisher(store, NEWER, "killed")
        one.step(step)
        one.kill()
        files = MemoryFiles(store, "next")
        left = names.manifest_path(NEWER.manifest.identity.prefix) in store.contents
        if how == "without export":
            told = settle(files, None)
            is_right = store.contents[names.DCP_METADATA] == export(NEWER if left else OLDER)
            assert is_right == (told == ())
            assert is_right or "run `shardbook sync`" in told[0]
            assert meaning(store)[0] == meant(NEWER if left else OLDER)[0]
        if how == "again":
            publish(files, NEWER, export)
        else:
            settle(files, export)
        assert meant(NEWER if left or how == "again" else OLDER) == meaning(store), (step, how)


class TestForeign:
    """A ``.metadata`` of plain DCP's."""

    def test_a_younger_one_is_left_alone_by_who_repairs(self) -> None:
        """Also where the newest manifest is not on top."""
        store = Store()
        files = MemoryFiles(store, "x")
        publish(files, OLDER, export)
        files.write(names.manifest_path(NEWER.manifest.identity.prefix), NEWER.manifest.to_bytes())
        files.write(names.DCP_METADATA, b"plain DCP's")
        before = dict(store.contents)
        assert () == settle(files, export)
        assert before == store.contents

    def test_an_older_one_gives_way(self) -> None:
        """The save came later, and its coordinator was killed before its export."""
        store = Store()
        files = MemoryFiles(store, "x")
        files.write(names.DCP_METADATA, b"plain DCP's")
        files.write(names.manifest_path(NEWER.manifest.identity.prefix), NEWER.manifest.to_bytes())
        assert () == settle(files, export)
        assert meant(NEWER) == meaning(store)

    def test_a_mark_of_an_earlier_version_is_known(self) -> None:
        """What stood in `.shardbook/exported` is ours."""
        store = Store()
        files = MemoryFiles(store, "x")
        publish(files, NEWER, export)
        content = store.contents[names.DCP_METADATA]
        mark = Fingerprint.of(len(content), content)
        del store.contents[names.mark_path(NEWER.manifest.identity.prefix, mark.mark)]
        files.write(names.EXPORTED, mark.to_bytes())
        files.write(names.DCP_METADATA, content)
        before = dict(store.contents)
        settle(files, export)
        assert before == store.contents


def test_an_attempt_that_wants_no_metadata_gets_none() -> None:
    """``export_metadata=False`` is said in the directory, so that nobody repairs it."""
    store = Store()
    files = MemoryFiles(store, "x")
    files.write(names.unexported_path(NEWER.manifest.identity.prefix), b"")
    publish(files, NEWER, None)
    assert () == settle(files, export)
    assert names.DCP_METADATA not in store.contents


def test_a_damaged_manifest_is_no_reason_to_mean_nothing() -> None:
    """The newest one that can be read is put on top."""
    store = Store()
    files = MemoryFiles(store, "x")
    publish(files, OLDER, export)
    files.write(names.manifest_path(NEWER.manifest.identity.prefix), NEWER.manifest.to_bytes()[:-30])
    settle(files, export)
    assert meant(OLDER) == meaning(store)


def test_an_export_that_fails_is_told_and_tried_again_by_the_next() -> None:
    """Whatever it raises."""
    store = Store()

    def broken(_: object) -> bytes:
        raise LookupError("no such dtype")

    (told,) = publish(MemoryFiles(store, "x"), NEWER, broken)
    assert told.endswith("no such dtype")
    settle(MemoryFiles(store, "x"), export)
    assert meant(NEWER) == meaning(store)


def test_a_kill_is_not_taken_for_an_error_of_the_export() -> None:
    """The harness itself: what is killed writes nothing more."""
    store = Store()
    one = Publisher(store, NEWER, "killed")
    one.kill()
    assert isinstance(one.error, Killed)
    assert {} == store.contents
