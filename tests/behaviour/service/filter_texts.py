"""Filters by chance, each with what it means in plain Python, and rows to try them on."""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, TypeVar

from hypothesis import strategies as st

from benchmarks.catalogue_rows import START_US, Saved

T = TypeVar("T")

STATES = {1: "OPEN", 2: "COMMITTED", 3: "FAILED", 4: "EXPIRED"}
TEXTS = ["", "a", "A", "b", "ab", "a*b", "[a]", "a_b", "a%b", "a\\b", "a?b", "é", "\U0001f600", "x y", '"', "'"]
NUMBERS = [-1.5, 0.0, 0.25, 1.0, 1e300, -1e-300]
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

#: What a filter means.
Judge = Callable[[Saved], bool]
Filters = st.SearchStrategy[tuple[str, Judge]]


def exactly(content: str) -> str:
    """A text as a filter has it; its stars are stars."""
    return '"' + re.sub(r'(["*\\])', r"\\\1", content) + '"'


def text_of(one: Saved, name: str) -> str | None:
    """A text field of a checkpoint; None when it lacks it."""
    place, _, key = name.partition(".")
    return one.labels.get(key) if place == "labels" else getattr(one, name)


def text_comparisons(name: str) -> Filters:
    """Comparisons of a text field, each with what it means."""

    def compared(sign: str, wanted: str) -> tuple[str, Judge]:
        def judge(one: Saved) -> bool:
            value = text_of(one, name)
            return value is not None and OPERATORS[sign](value, wanted)

        return f"{name} {sign} {exactly(wanted)}", judge

    def matched(sign: str, pieces: list[str]) -> tuple[str, Judge]:
        pattern = re.compile(".*".join(map(re.escape, pieces)), re.DOTALL)

        def judge(one: Saved) -> bool:
            value = text_of(one, name)
            return value is not None and (pattern.fullmatch(value) is not None) is (sign == "=")

        return f"{name} {sign} " + '"' + "*".join(exactly(piece)[1:-1] for piece in pieces) + '"', judge

    def contained(wanted: str) -> tuple[str, Judge]:
        def judge(one: Saved) -> bool:
            value = text_of(one, name)
            return value is not None and wanted in value

        return f"{name}:{exactly(wanted)}", judge

    texts = st.sampled_from(TEXTS)
    return st.one_of(
        st.builds(compared, st.sampled_from(sorted(OPERATORS)), texts),
        st.builds(matched, st.sampled_from(["=", "!="]), st.lists(texts, min_size=2, max_size=4)),
        st.builds(contained, texts),
    )


def number_comparisons(name: str, values: list[float], read: Callable[[Saved], float | None]) -> Filters:
    """Comparisons of a number field."""

    def compared(sign: str, wanted: float) -> tuple[str, Judge]:
        def judge(one: Saved) -> bool:
            value = read(one)
            return value is not None and OPERATORS[sign](value, wanted)

        return f"{name}{sign}{wanted!r}", judge

    return st.builds(compared, st.sampled_from(sorted(OPERATORS)), st.sampled_from(values))


def time_comparisons() -> Filters:
    """Comparisons of the time of the save."""

    def compared(sign: str, wanted_us: int, hours: int) -> tuple[str, Judge]:
        time = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=wanted_us)
        shown = time.astimezone(timezone(timedelta(hours=hours))).isoformat()
        return f"create_time {sign} {exactly(shown)}", lambda one: OPERATORS[sign](one.save_time_us, wanted_us)

    times = st.sampled_from([START_US, START_US + 1, START_US + 7, 0])
    return st.builds(compared, st.sampled_from(sorted(OPERATORS)), times, st.integers(-3, 3))


def state_comparisons() -> Filters:
    """Comparisons of the state."""

    def compared(sign: str, state: int) -> tuple[str, Judge]:
        return f"state {sign} {STATES[state]}", lambda one: OPERATORS[sign](one.state, state)

    return st.builds(compared, st.sampled_from(["=", "!="]), st.sampled_from(sorted(STATES)))


def presence() -> Filters:
    """Whether there is a label or metric."""
    return st.sampled_from(
        [
            ("labels.team:*", lambda one: "team" in one.labels),
            ("metrics.loss:*", lambda one: "loss" in one.metrics),
            ("labels.none:*", lambda one: False),
        ]
    )


comparisons = st.one_of(
    *(text_comparisons(name) for name in ("labels.team", "labels.a/b-c.d", "run", "project", "part")),
    number_comparisons("step", [0, 2, 5, 2**62], lambda one: one.step),
    number_comparisons("session", [0, 2, -1], lambda one: one.session),
    number_comparisons("world_size", [8, 2**40, -(2**40)], lambda one: one.world_size),
    number_comparisons("bytes", [5, 2**62], lambda one: one.bytes),
    number_comparisons("metrics.loss", NUMBERS, lambda one: one.metrics.get("loss")),
    number_comparisons("metrics.eval/mmlu", NUMBERS, lambda one: one.metrics.get("eval/mmlu")),
    time_comparisons(),
    state_comparisons(),
    presence(),
)


def joined(parts: list[tuple[str, Judge]], word: str, join: Callable[[Iterable[bool]], bool]) -> tuple[str, Judge]:
    """Several conditions made one, in parentheses."""
    inner = f" {word} ".join(f"({text})" for text, _ in parts)
    return inner, lambda one: join(judge(one) for _, judge in parts)


conditions = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: joined(parts, "AND", all)),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: joined(parts, "OR", any)),
        inner.map(lambda part: (f"NOT ({part[0]})", lambda one: not part[1](one))),
    ),
    max_leaves=6,
)


def some_rows() -> list[Saved]:
    """Rows by chance, the same every time."""
    chance = random.Random(7)

    def some(names: list[str], values: list[T]) -> dict[str, T]:
        return {name: chance.choice(values) for name in names if chance.random() < 0.6}

    return [
        Saved(
            project=chance.choice(["llm", "vision"]),
            run=chance.choice(["8b", "8b-v2", "70B"]),
            part=chance.choice(["default", "optim"]),
            session=chance.randrange(4),
            step=chance.randrange(6),
            state=chance.choice(sorted(STATES)),
            live=False,
            world_size=chance.choice([1, 8, 64]),
            bytes=chance.choice([0, 5, 2**62]),
            create_time_us=START_US + chance.choice([0, 1, 86_400_000_000]),
            write_time_us=chance.choice([None, START_US + 7]),
            labels=some(["team", "a/b-c.d"], TEXTS),
            metrics=some(["loss", "eval/mmlu"], NUMBERS),
        )
        for _ in range(300)
    ]
