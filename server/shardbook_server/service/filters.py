"""What people write to say which checkpoints they mean, and in which order: AIP-160 and AIP-132, parsed.

``state = COMMITTED AND (step >= 1000 OR labels.stage = "eval") AND NOT metrics.val_loss > 2.5``: comparisons, AND, OR,
NOT and parentheses. As AIP-160 has it OR binds more tightly than AND. ``*`` in a text stands for anything, ``:`` asks
whether a text contains another one, ``labels.stage:*`` whether there is such a label. docs/filters.md is for people.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

from lark import Lark, Token, Transformer, UnexpectedInput, UnexpectedToken, v_args
from lark.exceptions import VisitError

from shardbook.core import limits
from shardbook.core.description import check_name
from shardbook.errors import InvalidArgumentError
from shardbook_server.service.views import CheckpointState
from shardbook_server.storage.filters import (
    COLUMNS,
    LABELS,
    METRICS,
    PLACES,
    AllOf,
    AnyOf,
    Compare,
    Condition,
    Field,
    Match,
    Not,
    Present,
)
from shardbook_server.storage.listing_statements import OrderBy

_GRAMMAR: Final = r"""
?start: conjunction
?conjunction: disjunction ("AND" disjunction)*
?disjunction: negation ("OR" negation)*
?negation: "NOT" negation -> inverted
    | "(" conjunction ")" -> nested
    | comparison
comparison: WORD OPERATOR (WORD | TEXT)

AND.3: /AND(?![\w.*\/+@-])/
OR.3: /OR(?![\w.*\/+@-])/
NOT.3: /NOT(?![\w.*\/+@-])/
OPERATOR: "<=" | ">=" | "!=" | "=" | "<" | ">" | ":"
WORD: /[\w.*\/+@-]+/
TEXT: /"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'/
%ignore /[ \t\r\n]+/
"""
_ESCAPE: Final = re.compile(r"\\(.)", re.DOTALL)
#: Texts whose meaning is kept: whoever turns pages asks the same again.
_KEPT: Final = 256
#: Stars in one text; each more may cost as much again as all before it.
_MAX_STARS: Final = 4
_INT32_MAX: Final = 2**31 - 1
_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,19}")
_NUMBER: Final = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_TEXTS: Final = frozenset({*PLACES, LABELS})
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_ORDER: Final = re.compile(r"\s*([\w./-]+)(?:\s+(asc|desc))?\s*")


@lru_cache(maxsize=_KEPT)
def parse_filter(text: str) -> Condition | None:
    """Returns the condition that a filter says; None for the empty one.

    Raises:
        InvalidArgumentError: It says none, or is beyond a limit. The field is ``filter``; ``metadata`` has the
            ``position`` of the character, from 1, where that is known.
    """
    if not text.strip():
        return None
    if len(text) > limits.MAX_FILTER_CHARS:
        raise InvalidArgumentError(
            f"a filter of {len(text)} characters, the limit is {limits.MAX_FILTER_CHARS}",
            reason="LIMIT_EXCEEDED",
            field="filter",
        )
    for at, char in enumerate(text):
        if not char.isprintable() and char not in "\t\r\n":
            raise _refused("a character that does not print", at)
    try:
        built: _Built = _parser().parse(text)  # type: ignore[assignment]  # of the transformer, not a tree
    except UnexpectedInput as error:
        raise _unexpected(error, text) from error
    except VisitError as error:
        if isinstance(error.orig_exc, InvalidArgumentError):
            raise error.orig_exc from error
        raise
    return built.condition


@lru_cache(maxsize=_KEPT)
def parse_order(text: str) -> tuple[OrderBy, ...]:
    """Returns the fields of an order, none for the empty one.

    Raises:
        InvalidArgumentError: It names a field that cannot be ordered by; the field of the error is ``order_by``.
    """
    if not text.strip():
        return ()
    fields: list[OrderBy] = []
    for one in text[: limits.MAX_FILTER_CHARS + 1].split(","):
        match = _ORDER.fullmatch(one)
        if match is None:
            raise InvalidArgumentError(
                f"{one.strip()[:80]!a} is no field, with asc or desc behind it", field="order_by"
            )
        try:
            field = _field(match[1], 0, ("part",))
        except InvalidArgumentError as error:
            what = error.message.partition(": ")[2]
            raise InvalidArgumentError(what, reason=error.reason, field="order_by") from error
        if field.name in ("project", "run"):
            raise InvalidArgumentError(f"listings are not ordered by {field.name}", field="order_by")
        fields.append(OrderBy(field, match[2] == "desc"))
    if len(fields) > limits.MAX_ORDER_FIELDS or len({one.field for one in fields}) < len(fields):
        raise InvalidArgumentError(
            f"an order has at most {limits.MAX_ORDER_FIELDS} fields, none twice", field="order_by"
        )
    return tuple(fields)


@dataclass(frozen=True)
class _Built:
    """A part of a filter, how deep it nests, and how many comparisons it has."""

    condition: Condition
    depth: int = 0
    count: int = 1


class _Builder(Transformer[Token, "_Built"]):
    """Makes conditions while the parser goes along: no tree is built, and nothing recurses."""

    @v_args(inline=True)
    def comparison(self, word: Token, sign: Token, value: Token) -> _Built:
        at = (word.start_pos or 0, value.start_pos or 0)
        return _Built(_comparison(_field(str(word), at[0]), str(sign), value, *at))

    def conjunction(self, parts: list[_Built]) -> _Built:
        return _joined(AllOf, parts)

    def disjunction(self, parts: list[_Built]) -> _Built:
        return _joined(AnyOf, parts)

    @v_args(inline=True)
    def inverted(self, part: _Built) -> _Built:
        return _deeper(_Built(Not(part.condition), part.depth, part.count))

    @v_args(inline=True)
    def nested(self, part: _Built) -> _Built:
        return _deeper(part)


def _joined(kind: Callable[[tuple[Condition, ...]], Condition], parts: list[_Built]) -> _Built:
    count = sum(part.count for part in parts)
    if count > limits.MAX_COMPARISONS:
        raise InvalidArgumentError(
            f"a filter has at most {limits.MAX_COMPARISONS} comparisons", reason="LIMIT_EXCEEDED", field="filter"
        )
    return _Built(kind(tuple(part.condition for part in parts)), max(part.depth for part in parts), count)


def _deeper(part: _Built) -> _Built:
    if part.depth >= limits.MAX_FILTER_DEPTH:
        raise InvalidArgumentError(
            f"parentheses and NOT nest at most {limits.MAX_FILTER_DEPTH} deep", reason="LIMIT_EXCEEDED", field="filter"
        )
    return _Built(part.condition, part.depth + 1, part.count)


_PARSER: Final = Lark(_GRAMMAR, parser="lalr", lexer="basic", transformer=_Builder(), maybe_placeholders=False)


def _parser() -> Lark:
    """The parser; parsing keeps its state apart, so threads share it."""
    return _PARSER


def _field(word: str, position: int, places: Sequence[str] = PLACES) -> Field:
    name, dot, key = word.partition(".")
    if name in (LABELS, METRICS):
        if not dot:
            raise _refused(f"write {name}.NAME for one of the {name}", position)
        try:
            return Field(name, check_name(key, "filter"))
        except InvalidArgumentError as error:
            raise _refused(error.message, position) from error
    if word not in COLUMNS and word not in PLACES:
        known = ", ".join([*places, *COLUMNS, "labels.KEY", "metrics.NAME"])
        raise _refused(f"{word[:80]!a} is no field: {known}", position)
    return Field(word)


def _comparison(field: Field, sign: str, token: Token, at: int, value_at: int) -> Condition:
    text, is_quoted = str(token), token.type == "TEXT"
    if sign == ":" and text == "*" and field.key:
        return Present(field)
    if field.name in _TEXTS:
        return _text_comparison(field, sign, text, value_at, is_quoted=is_quoted)
    if sign == ":":
        raise _refused(f"{field.name} is no text: compare it with =, !=, <, <=, > or >=", at)
    value = _ESCAPE.sub(r"\1", text[1:-1]) if is_quoted else text
    if field.name == "state":
        return _state(sign, value, at, value_at)
    return Compare(field, sign, _value(field, value, value_at))


def _text_comparison(field: Field, sign: str, text: str, at: int, *, is_quoted: bool) -> Condition:
    pieces = _pieces(text[1:-1] if is_quoted else text)
    if len(pieces) > _MAX_STARS + 1:
        raise _refused(f"a text has at most {_MAX_STARS} stars", at)
    if sign == ":":
        return (
            Match(field, ("", *pieces, ""))
            if pieces != ("",)
            else Present(field)
            if field.key
            else Match(field, ("", ""))
        )
    if len(pieces) == 1:
        return Compare(field, sign, pieces[0])
    if sign == "=":
        return Match(field, pieces)
    if sign != "!=":
        raise _refused("a text with a star in it is compared with = or !=; write \\* for a star", at)
    # Who lacks the label is not unlike it: no comparison holds for what is not there.
    unlike = Not(Match(field, pieces))
    return AllOf((Present(field), unlike)) if field.key else unlike


def _pieces(text: str) -> tuple[str, ...]:
    """Splits a text at its stars; a backslash before a character takes it as it is."""
    pieces, at = [""], 0
    while at < len(text):
        if text[at] == "*":
            pieces.append("")
        else:
            at += text[at] == "\\"
            pieces[-1] += text[at : at + 1]
        at += 1
    return tuple(pieces)


def _state(sign: str, value: str, at: int, value_at: int) -> Condition:
    if sign not in ("=", "!="):
        raise _refused("a state is compared with = or !=", at)
    if value not in CheckpointState.__members__:
        raise _refused(f"{value[:80]!a} is none of {', '.join(CheckpointState.__members__)}", value_at)
    return Compare(Field("state"), sign, int(CheckpointState[value]))


def _value(field: Field, text: str, at: int) -> int | float:
    if field.name == "create_time":
        return _time_us(text, at)
    if field.name == METRICS:
        if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
            raise _refused(f"a metric is a finite number, {text[:80]!a} is not", at)
        return float(text)
    if not _INTEGER.fullmatch(text) or abs(int(text)) > limits.INT64_MAX:
        raise _refused(f"{field.name} is an integer of 64 bits, {text[:80]!a} is not", at)
    # The column is narrower, and nothing in it comes near.
    return max(-_INT32_MAX, min(int(text), _INT32_MAX)) if field.name == "world_size" else int(text)


def _time_us(text: str, at: int) -> int:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise _refused(f'{text[:80]!a} is no time: write "2026-11-23T09:30:00Z" or "2026-11-23"', at) from None
    difference = (time if time.tzinfo else time.replace(tzinfo=UTC)) - _EPOCH
    return (difference.days * 86_400 + difference.seconds) * 1_000_000 + difference.microseconds


def _unexpected(error: UnexpectedInput, text: str) -> InvalidArgumentError:
    if isinstance(error, UnexpectedToken):
        if error.token.type == "$END":
            return _refused("the filter ends too early", len(text))
        return _refused(f"{str(error.token)[:80]!a} is not expected here", error.token.start_pos or 0)
    # Its type says that it has none.
    at = min(getattr(error, "pos_in_stream", 0), len(text))
    return _refused(f"{text[at : at + 1]!a} is not expected here", at)


def _refused(what: str, position: int) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"character {position + 1} of the filter: {what}",
        reason="INVALID_FILTER",
        field="filter",
        metadata={"position": str(position + 1)},
    )


__all__ = ["parse_filter", "parse_order"]
