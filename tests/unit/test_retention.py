"""What a retention policy keeps: examples, and rules that hold whatever the checkpoints are."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardbook.core import retention
from shardbook.core.retention import Candidate, Decision, KeepBest, RetentionPolicy, judge
from shardbook.errors import InvalidArgumentError

NOW_US = 10_000_000_000


def one(key: int, step: int, session: int = 1, **more: object) -> Candidate:
    """A live committed checkpoint."""
    facts = {"incarnation": bytes([session] * 16), "attempt": 1, "time_us": key * 1_000_000, **more}
    return Candidate(key=key, session=session, step=step, **facts)  # type: ignore[arg-type]


def kept(policy: RetentionPolicy, candidates: list[Candidate]) -> list[int]:
    """Keys that are kept."""
    return sorted(decision.candidate.key for decision in judge(policy, candidates, NOW_US) if decision.keep)


def test_rules_keep_the_union() -> None:
    """What one of them keeps is kept."""
    every = [one(step, step, metrics={"loss": float(abs(step - 5))}) for step in range(1, 21)]
    assert [19, 20] == kept(RetentionPolicy(keep_last=2), every)
    assert [7, 14] == kept(RetentionPolicy(keep_every=7), every)
    assert [5, 6] == kept(RetentionPolicy(keep_best=(KeepBest("loss", 2),)), every)
    assert [20] == kept(RetentionPolicy(keep_best=(KeepBest("loss", 1, largest=True),)), every)
    policy = RetentionPolicy(keep_last=2, keep_every=7, keep_best=(KeepBest("loss", 1), KeepBest("loss", 1, True)))
    assert [5, 7, 14, 19, 20] == kept(policy, every)
    aged = [dataclasses.replace(one(step, step), time_us=NOW_US - step * 1_000_000) for step in (1, 2, 3)]
    assert [1, 2] == kept(RetentionPolicy(newer_than_s=3), aged)


def test_of_equal_values_the_newest_are_best() -> None:
    """As an alias that follows the metric has it."""
    every = [one(step, step, metrics={"loss": 1.0}) for step in (1, 2, 3)]
    assert [3] == kept(RetentionPolicy(keep_best=(KeepBest("loss", 1),)), every)


def test_an_abandoned_branch_never_hides_the_live_one() -> None:
    """The last by session and step: session 2 went back to step 10, session 1 had been at 100."""
    every = [*(one(step, step) for step in (80, 90, 100)), *(one(200 + step, step, 2) for step in (11, 12))]
    assert [211, 212] == kept(RetentionPolicy(keep_last=2), every)
    assert [100, 211, 212] == kept(RetentionPolicy(keep_last=3), every)


def test_offline_branches_come_in_the_order_of_their_last_save() -> None:
    """They have no session number."""
    old = [one(step, step, 0, incarnation=b"z" * 16) for step in (80, 90)]
    new = [one(200 + step, step, 0, incarnation=b"a" * 16) for step in (11, 12)]
    assert [211, 212] == kept(RetentionPolicy(keep_last=2), [*new, *old])


def test_what_was_saved_offline_after_the_newest_is_kept_too() -> None:
    """It has no session, and comes before all that have one; yet it may be what was saved last."""
    numbered = [one(step, step) for step in (10, 20, 30)]
    before = [one(step, step, 0) for step in (5, 25)]
    after = [one(step, step, 0) for step in (40, 50, 60)]
    assert [20, 30, 50, 60] == kept(RetentionPolicy(keep_last=2), [*numbered, *before, *after])
    assert [20, 30] == kept(RetentionPolicy(keep_last=2), [*numbered, *before])
    assert [30] == kept(RetentionPolicy(keep_every=30), [*numbered, *after[:2]])


def test_an_interrupted_deletion_of_offline_branches_does_not_change_their_order() -> None:
    """An incarnation went back: what was its last save is deleted, and its branch is no older for that."""
    every = [one(1, 9, 0, time_us=50), one(2, 5, 0, time_us=100), one(3, 3, 0, incarnation=b"b" * 16, time_us=70)]
    (stays,) = kept(RetentionPolicy(keep_last=1), every)
    for gone in (1, 2, 3):
        if gone != stays:
            assert [stays] == kept(RetentionPolicy(keep_last=1), [one for one in every if one.key != gone])


def test_neither_superseded_nor_damaged_ones_take_the_place_of_good_ones() -> None:
    """The last that can be loaded by their step are kept; a damaged one too where it would be counted."""
    damaged = [one(key, key, is_whole=False) for key in (1, 5)]
    every = [*damaged, one(2, 2), one(3, 3), one(4, 3, 2, is_live=False)]
    decisions = judge(RetentionPolicy(keep_last=1), every, NOW_US)
    assert {4: (False, retention.SUPERSEDED), 2: (False, retention.UNWANTED), 1: (False, retention.MISSING)} == {
        made.candidate.key: (made.keep, made.reasons[0]) for made in decisions if not made.keep
    }
    assert [3, 5] == kept(RetentionPolicy(keep_last=1), every)


def test_the_best_of_a_metric_that_none_has_deletes_nothing() -> None:
    """A slip of the pen, or nothing has been evaluated yet."""
    every = [one(1, 1, metrics={"loss": 1.0}), one(2, 2), one(3, 3)]
    assert [1, 2, 3] == kept(RetentionPolicy(keep_best=(KeepBest("los", 1),)), every)
    assert [1] == kept(RetentionPolicy(keep_best=(KeepBest("loss", 1),)), every)


def test_open_aliased_held_and_last_ones_stay() -> None:
    """Whatever the policy says."""
    every = [one(1, 1), one(2, 2, is_committed=False, is_live=False), one(3, 3, aliases=("best",)), one(4, 4)]
    every.append(one(5, 5, holders=("eval",)))
    policy = RetentionPolicy(keep_every=1000)
    assert [2, 3, 5] == kept(policy, every)
    assert [4] == kept(policy, [every[0], every[3]])
    reasons = {made.candidate.key: made.reasons for made in judge(policy, [*every[1:3], every[4]], NOW_US)}
    assert {2: (retention.OPEN,), 3: ("@best",), 5: ("held by eval",)} == reasons


def test_no_rule_deletes_nothing() -> None:
    """An empty policy is none."""
    assert [1, 2, 3] == kept(RetentionPolicy(), [one(1, 1), one(2, 2), one(3, 3)])


@pytest.mark.parametrize(
    ("field", "value"),
    [("keep_last", -1), ("keep_every", 2**60), ("newer_than_s", -5)],
)
def test_numbers_have_limits(field: str, value: int) -> None:
    """The error names the field."""
    with pytest.raises(InvalidArgumentError) as refused:
        RetentionPolicy(**{field: value})  # type: ignore[arg-type]
    assert f"policy.{field}" == refused.value.violations[0].field


POLICIES = st.builds(
    RetentionPolicy,
    keep_last=st.integers(0, 4),
    keep_every=st.integers(0, 4),
    keep_best=st.lists(st.builds(KeepBest, st.sampled_from("ab"), st.integers(1, 3), st.booleans()), max_size=2).map(
        tuple
    ),
    newer_than_s=st.integers(0, 12),
)


@st.composite
def parts(draw: st.DrawFn) -> list[Candidate]:
    """Checkpoints of one part: of several sessions, with one live one a step at most."""
    count = draw(st.integers(0, 12))
    made: list[Candidate] = []
    live: set[int] = set()
    for key in range(count):
        session, step = draw(st.integers(0, 3)), draw(st.integers(0, 12))
        is_committed = draw(st.integers(0, 5)) > 0
        is_live = is_committed and step not in live
        live |= {step} if is_live else set()
        made.append(
            Candidate(
                key=key,
                session=session,
                incarnation=bytes([session or draw(st.integers(4, 6))] * 16),
                step=step,
                attempt=1 + key,
                time_us=NOW_US - draw(st.integers(0, 14)) * 1_000_000,
                is_committed=is_committed,
                is_live=is_live,
                is_whole=draw(st.integers(0, 4)) > 0,
                metrics=draw(st.dictionaries(st.sampled_from("ab"), st.integers(-2, 2).map(float))),
                aliases=draw(st.sampled_from([(), (), (), ("x",)])),
                holders=draw(st.sampled_from([(), (), (), ("h",)])),
            )
        )
    return made


def keeps(decisions: list[Decision]) -> set[int]:
    """Keys that are kept."""
    return {made.candidate.key for made in decisions if made.keep}


@given(POLICIES, parts(), st.randoms())
def test_what_is_decided_does_not_depend_on_the_order(
    policy: RetentionPolicy, found: list[Candidate], r: object
) -> None:
    """One decision each, with a reason, the same in whatever order they come."""
    decisions = judge(policy, found, NOW_US)
    assert sorted(one.key for one in found) == sorted(made.candidate.key for made in decisions)
    assert all(made.reasons for made in decisions)
    shuffled = list(found)
    r.shuffle(shuffled)  # type: ignore[attr-defined]
    assert decisions == judge(policy, shuffled, NOW_US)


@given(POLICIES, POLICIES, parts())
def test_more_rules_keep_more(first: RetentionPolicy, second: RetentionPolicy, found: list[Candidate]) -> None:
    """A policy of two keeps what either keeps by a rule."""
    both = RetentionPolicy(
        max(first.keep_last, second.keep_last),
        first.keep_every,
        (*first.keep_best, *second.keep_best),
        max(first.newer_than_s, second.newer_than_s),
    )
    by_rule = {
        made.candidate.key
        for made in judge(first, found, NOW_US)
        if made.keep and made.reasons != (retention.ONLY,) and first
    }
    assert by_rule <= keeps(judge(both, found, NOW_US))


@given(POLICIES, parts())
def test_judged_again_the_same_is_kept(policy: RetentionPolicy, found: list[Candidate]) -> None:
    """Whatever was deleted in between: a deletion in batches, or one that was interrupted, deletes nothing more."""
    kept_first = keeps(judge(policy, found, NOW_US))
    gone = [one.key for one in found if one.key not in kept_first]
    for left_out in (set(gone), set(gone[::2])):
        rest = [one for one in found if one.key not in left_out]
        assert kept_first == keeps(judge(policy, rest, NOW_US)) - set(gone)
        assert not keeps(judge(policy, rest, NOW_US)) & set(gone)


@given(POLICIES, parts())
def test_what_must_stay_stays(policy: RetentionPolicy, found: list[Candidate]) -> None:
    """Open, aliased and held ones; and of what is live and whole, else live, else committed, at least one."""
    stays = keeps(judge(policy, found, NOW_US))
    assert {one.key for one in found if not one.is_committed or one.aliases or one.holders} <= stays
    kinds = (
        [one.key for one in found if one.is_committed and one.is_live and one.is_whole],
        [one.key for one in found if one.is_committed and one.is_live],
        [one.key for one in found if one.is_committed],
    )
    best = next((kind for kind in kinds if kind), [])
    assert not best or stays & set(best)


@given(parts(), st.integers(1, 4))
def test_the_last_are_those_of_the_newest_session(found: list[Candidate], count: int) -> None:
    """So many live whole ones, none of which has a newer (session, step) that is left out."""
    numbered = [one for one in found if one.session]
    stays = keeps(judge(RetentionPolicy(keep_last=count), numbered, NOW_US))
    counted = sorted(
        ((one.session, one.step, one.key) for one in numbered if one.is_committed and one.is_live and one.is_whole),
        reverse=True,
    )
    assert {key for _, _, key in counted[:count]} <= stays


@given(POLICIES)
def test_policies_survive_being_stored(policy: RetentionPolicy) -> None:
    """As text and back."""
    assert policy == RetentionPolicy.from_text(policy.text)
