"""What a retention policy keeps of the checkpoints of one part: a pure function of what is known of them.

The service judges by it under the run's lock, and ``shardbook prune DIRECTORY`` by what manifests say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from shardbook.core import limits
from shardbook.core.description import check_name
from shardbook.errors import InvalidArgumentError

#: Reasons to keep that no policy can take away.
OPEN: Final = "it is not committed"
ONLY: Final = "it is the only one that would be left"
#: Holders that a reason names.
_MOST_NAMED: Final = 10
#: Reasons why nothing keeps one.
UNWANTED: Final = "no rule keeps it"
SUPERSEDED: Final = "a later session saved the step again"
MISSING: Final = "its data is missing"


@dataclass(frozen=True)
class KeepBest:
    """Keep those with the best values of a metric.

    Attributes:
        metric: Name of the metric.
        count: How many.
        largest: True when the largest value is best, False when the smallest is.
    """

    metric: str
    count: int
    largest: bool = False

    def __post_init__(self) -> None:
        check_name(self.metric, "policy.keep_best.metric")
        _check_number(self.count, "keep_best.count", 1)

    def place(self, one: Candidate) -> float:
        """Returns a number that is smaller the better a checkpoint is."""
        value = one.metrics[self.metric]
        return -value if self.largest else value

    def reason(self, _: Candidate) -> str:
        """Returns why this rule keeps one."""
        return f"one of the {self.count} with the {'largest' if self.largest else 'smallest'} {self.metric}"


@dataclass(frozen=True)
class RetentionPolicy:
    """What to keep: everything that at least one rule keeps. No rule at all is no policy, and deletes nothing.

    Attributes:
        keep_last: The newest by session and step, so many of them; and as many saved offline after the newest.
        keep_every: Those whose step is a multiple of it.
        keep_best: Those with the best values.
        newer_than_s: Those saved within so many seconds.
    """

    keep_last: int = 0
    keep_every: int = 0
    keep_best: tuple[KeepBest, ...] = ()
    newer_than_s: int = 0

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every", "newer_than_s"):
            _check_number(getattr(self, name), name, 0)
        if len(self.keep_best) > limits.MAX_KEEP_BEST:
            raise InvalidArgumentError(
                f"{len(self.keep_best)} metrics to keep the best of, the limit is {limits.MAX_KEEP_BEST}",
                reason="LIMIT_EXCEEDED",
                field="policy.keep_best",
            )

    def __bool__(self) -> bool:
        return bool(self.keep_last or self.keep_every or self.keep_best or self.newer_than_s)

    def to_json(self) -> dict[str, Any]:
        """Returns every attribute under its own name."""
        return {**vars(self), "keep_best": [dict(vars(one)) for one in self.keep_best]}

    @classmethod
    def from_text(cls, text: str) -> RetentionPolicy:
        """Returns the policy that ``json.dumps(policy.to_json())`` stored."""
        stored = json.loads(text)
        return cls(**{**stored, "keep_best": tuple(KeepBest(**one) for one in stored["keep_best"])})

    @property
    def text(self) -> str:
        """As it is stored."""
        return json.dumps(self.to_json(), separators=(",", ":"))


@dataclass(frozen=True)
class Candidate:
    """What is known of one checkpoint of a part.

    Attributes:
        key: The caller's number of it.
        session: Session that wrote it; 0 when it was written offline.
        incarnation: Incarnation that wrote it.
        step: Training step.
        attempt: Attempt within the session.
        time_us: When it was saved, microseconds since the epoch.
        is_committed: False while ranks may still write it, or when nobody knows whether it is whole.
        is_live: It is what ``@step`` means: no later session saved the step again.
        is_whole: None of its data files is known to be lost.
        metrics: Measured values by name.
        aliases: What means it, ``latest`` among them.
        holders: Who holds it now.
    """

    key: int
    session: int
    incarnation: bytes
    step: int
    attempt: int
    time_us: int
    is_committed: bool = True
    is_live: bool = True
    is_whole: bool = True
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    aliases: tuple[str, ...] = ()
    holders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """What becomes of a checkpoint.

    Attributes:
        candidate: The checkpoint.
        keep: False when it is to be deleted.
        reasons: Why, for people; at least one.
    """

    candidate: Candidate
    keep: bool
    reasons: tuple[str, ...]


def judge(policy: RetentionPolicy, candidates: Iterable[Candidate], now_us: int) -> list[Decision]:
    """Decides what to keep of the checkpoints of one part.

    Rules that count (last, every, best) count only what ``@step`` means: a step that was saved again does not take the
    place of another. Neither does a damaged checkpoint take that of a good one, yet it stays where it would be counted:
    who missed a file may have been wrong. What is aliased or held stays, whatever the rules say, and so does one
    checkpoint at least. Without a rule nothing is deleted, nor by the best of a metric that none has.

    Args:
        policy: The rules.
        candidates: All checkpoints of the part that are open or committed, in any order.
        now_us: The time, microseconds since the epoch.

    Returns:
        One decision each, newest session and step first. Whatever is deleted of them, the same is kept again when the
        rest is judged anew at the same time.
    """
    ordered = newest_first(candidates)
    kept: dict[int, list[str]] = {one.key: [] for one in ordered}

    def keep(some: Iterable[Candidate], reason: Callable[[Candidate], str]) -> None:
        for one in some:
            kept[one.key].append(reason(one))

    committed = [one for one in ordered if one.is_committed]
    keep((one for one in ordered if not one.is_committed), lambda _: OPEN)
    keep((one for one in committed if one.aliases), lambda one: f"@{', @'.join(one.aliases)}")
    keep((one for one in committed if one.holders), lambda one: f"held by {_some(one.holders)}")
    _apply(policy, committed, now_us, keep)
    _keep_one(committed, kept, keep)
    return [
        Decision(one, bool(kept[one.key]), tuple(kept[one.key]) or (_why_not(one),))
        if policy or kept[one.key]
        else Decision(one, True, ("no policy",))
        for one in ordered
    ]


def _some(names: Sequence[str]) -> str:
    """Returns names, when they are many some of them, for people."""
    more = len(names) - _MOST_NAMED
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:_MOST_NAMED])} and {more} more"


_Keep = Callable[[Iterable[Candidate], Callable[[Candidate], str]], None]


def _apply(policy: RetentionPolicy, committed: Sequence[Candidate], now_us: int, keep: _Keep) -> None:
    live = [one for one in committed if one.is_live]
    keep(_first(live, policy.keep_last), lambda _: f"one of the last {policy.keep_last}")
    if policy.keep_last and live and live[0].session:
        # Recorded after an outage, they come before every session: by time they may be what was saved last.
        offline = [one for one in live if one.session == 0 and one.time_us > live[0].time_us]
        keep(_first(offline, policy.keep_last), lambda _: f"one of the last {policy.keep_last} saved offline")
    if policy.keep_every:
        every = policy.keep_every
        keep((one for one in live if one.step % every == 0), lambda _: f"every {every} steps")
    for best in policy.keep_best:
        _keep_best(best, live, keep)
    if policy.newer_than_s:
        since_us = now_us - policy.newer_than_s * 1_000_000
        keep((one for one in committed if one.time_us > since_us), lambda _: "new enough")


def _keep_best(best: KeepBest, live: Sequence[Candidate], keep: _Keep) -> None:
    measured = [one for one in live if best.metric in one.metrics]
    if not measured:
        # A slip of the pen, or nobody has evaluated anything yet.
        keep(live, lambda _: f"none has a {best.metric}, by which the best are kept")
    # Stable: of equal values the newest come first.
    measured.sort(key=best.place)
    keep(_first(measured, best.count), best.reason)


def _first(some: Sequence[Candidate], count: int) -> list[Candidate]:
    """Returns the first so many, and those that are the first when damaged ones are left out: both are kept."""
    whole = [one for one in some if one.is_whole]
    chosen = {one.key for one in (*some[:count], *whole[:count])}
    return [one for one in some if one.key in chosen]


def _keep_one(committed: Sequence[Candidate], kept: Mapping[int, Sequence[str]], keep: _Keep) -> None:
    """Keeps the newest of the best kind that there is, unless another one of that kind is kept anyway."""
    for of_kind in (
        [one for one in committed if one.is_live and one.is_whole],
        [one for one in committed if one.is_live],
        committed,
    ):
        if of_kind:
            if not any(kept[one.key] for one in of_kind):
                keep(of_kind[:1], lambda _: ONLY)
            return


def newest_first(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Orders by session and step: an abandoned branch never comes before the one that is being written.

    Offline attempts have no session, and no order but time. Nothing here depends on what else there is: so whatever is
    deleted, the order of the rest stays.
    """

    def place(one: Candidate) -> tuple[Any, ...]:
        saved_us = one.time_us if one.session == 0 else 0
        return (one.session, saved_us, one.step, one.attempt, one.time_us, one.incarnation)

    return sorted(candidates, key=place, reverse=True)


def _why_not(one: Candidate) -> str:
    if not one.is_live:
        return SUPERSEDED
    return UNWANTED if one.is_whole else MISSING


def _check_number(value: int, name: str, least: int) -> None:
    if not least <= value <= limits.MAX_POLICY_NUMBER:
        raise InvalidArgumentError(
            f"{name} is {value}, not within {least} and {limits.MAX_POLICY_NUMBER}", field=f"policy.{name}"
        )


__all__ = ["Candidate", "Decision", "KeepBest", "RetentionPolicy", "judge", "newest_first"]
