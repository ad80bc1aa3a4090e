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
        keep_last: The newest by session and step, so many of them.
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

    Rules that count (last, every, best) count only what ``@step`` means and whose data is not known to be lost: neither
    a step that was saved again nor a damaged checkpoint takes the place of a good one. What is aliased or held stays,
    whatever the rules say, and so does one checkpoint at least. Without a rule nothing is deleted.

    Args:
        policy: The rules.
        candidates: All checkpoints of the part that are open or committed, in any order.
        now_us: The time, microseconds since the epoch.

    Returns:
        One decision each, newest session and step first. Whatever is deleted of them, the same is kept again when the
        rest is judged anew at the same time.
    """
    ordered = _newest_first(candidates)
    kept: dict[int, list[str]] = {one.key: [] for one in ordered}

    def keep(some: Iterable[Candidate], reason: Callable[[Candidate], str]) -> None:
        for one in some:
            kept[one.key].append(reason(one))

    committed = [one for one in ordered if one.is_committed]
    keep((one for one in ordered if not one.is_committed), lambda _: OPEN)
    keep((one for one in committed if one.aliases), lambda one: f"@{', @'.join(one.aliases)}")
    keep((one for one in committed if one.holders), lambda one: f"held by {', '.join(one.holders)}")
    counted = [one for one in committed if one.is_live and one.is_whole]
    _apply(policy, committed, counted, now_us, keep)
    _keep_one(committed, kept, keep)
    return [
        Decision(one, bool(kept[one.key]), tuple(kept[one.key]) or (_why_not(one),))
        if policy or kept[one.key]
        else Decision(one, True, ("no policy",))
        for one in ordered
    ]


_Keep = Callable[[Iterable[Candidate], Callable[[Candidate], str]], None]


def _apply(
    policy: RetentionPolicy, committed: Sequence[Candidate], counted: Sequence[Candidate], now_us: int, keep: _Keep
) -> None:
    keep(counted[: policy.keep_last], lambda _: f"one of the last {policy.keep_last}")
    if policy.keep_every:
        every = policy.keep_every
        keep((one for one in counted if one.step % every == 0), lambda _: f"every {every} steps")
    for best in policy.keep_best:
        measured = [one for one in counted if best.metric in one.metrics]
        # Stable: of equal values the newest come first.
        measured.sort(key=best.place)
        keep(measured[: best.count], best.reason)
    if policy.newer_than_s:
        since_us = now_us - policy.newer_than_s * 1_000_000
        keep((one for one in committed if one.time_us > since_us), lambda _: "new enough")


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


def _newest_first(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Orders by session and step: an abandoned branch never comes before the one that is being written.

    Offline attempts have no session; of their incarnations the one that saved last is the newest.
    """
    found = list(candidates)
    ends: dict[bytes, int] = {}
    for one in found:
        if one.session == 0:
            ends[one.incarnation] = max(ends.get(one.incarnation, 0), one.time_us)

    def place(one: Candidate) -> tuple[Any, ...]:
        branch = (ends[one.incarnation], one.incarnation) if one.session == 0 else (0, b"")
        return (one.session, *branch, one.step, one.attempt, one.time_us, one.incarnation)

    return sorted(found, key=place, reverse=True)


def _why_not(one: Candidate) -> str:
    if not one.is_live:
        return SUPERSEDED
    return UNWANTED if one.is_whole else MISSING


def _check_number(value: int, name: str, least: int) -> None:
    if not least <= value <= limits.MAX_POLICY_NUMBER:
        raise InvalidArgumentError(
            f"{name} is {value}, not within {least} and {limits.MAX_POLICY_NUMBER}", field=f"policy.{name}"
        )


__all__ = ["Candidate", "Decision", "KeepBest", "RetentionPolicy", "judge"]
