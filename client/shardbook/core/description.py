"""What may be said of a checkpoint: labels, metrics and a note. Both sides check with the same functions.

A label is ``key = text``, a metric ``name = number``; a note is any JSON value.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

from shardbook.core import limits
from shardbook.core.lineage import Origin, pack_origins, unpack_origins
from shardbook.errors import InvalidArgumentError

#: Key of a label, or name of a metric.
_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_./-]{{0,{limits.MAX_LABEL_NAME_CHARS - 1}}}")


def check_labels(labels: Mapping[str, str], field: str = "labels") -> dict[str, str]:
    """Returns ``labels`` when each may be stored.

    Raises:
        InvalidArgumentError: One may not; the field names it.
    """
    _check_count(labels, field, limits.MAX_LABELS)
    for name, value in labels.items():
        check_name(name, field)
        if not isinstance(value, str):
            raise InvalidArgumentError(f"label {name} is {value!r}, not a text", field=f"{field}.{name}")
        if not value.isprintable() or len(value) > limits.MAX_LABEL_CHARS:
            raise InvalidArgumentError(
                f"label {name} is {value[:80]!a}: a label is at most {limits.MAX_LABEL_CHARS} printable characters",
                field=f"{field}.{name}",
            )
    return dict(labels)


def check_metrics(metrics: Mapping[str, SupportsFloat], field: str = "metrics") -> dict[str, float]:
    """Returns ``metrics`` as floats when each may be stored.

    Raises:
        InvalidArgumentError: One may not; the field names it.
    """
    _check_count(metrics, field, limits.MAX_METRICS)
    checked: dict[str, float] = {}
    for name, value in metrics.items():
        check_name(name, field)
        checked[name] = _number(name, value, f"{field}.{name}")
        if not math.isfinite(checked[name]):
            raise InvalidArgumentError(
                f"metric {name} is {value}, not a finite number", reason="NOT_FINITE", field=f"{field}.{name}"
            )
    return checked


def finite_metrics(metrics: Mapping[str, SupportsFloat], field: str = "metrics") -> tuple[dict[str, float], list[str]]:
    """Returns the metrics that may be stored, and the names of those that are NaN or infinite.

    A save is not given up because a loss has diverged.

    Raises:
        InvalidArgumentError: A name or a value is none at all.
    """
    values = {name: _number(name, value, f"{field}.{name}") for name, value in metrics.items()}
    lost = [name for name, value in values.items() if not math.isfinite(value)]
    return check_metrics({name: value for name, value in values.items() if name not in lost}, field), lost


def encode_note(note: Any, field: str = "note") -> str:
    """Returns any JSON value as the text that is stored; ``None`` is no note, and empty.

    Raises:
        InvalidArgumentError: It has no JSON form, or a long one.
    """
    if note is None:
        return ""
    try:
        text = json.dumps(note, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"the note has no JSON form: {error}", field=field) from error
    return check_note(text, field)


def check_note(text: str, field: str = "note") -> str:
    """Returns JSON text in ASCII, however it was written; empty for none.

    Raises:
        InvalidArgumentError: It is no JSON, or a long one.
    """
    if not text:
        return ""
    if len(text) > limits.MAX_NOTE_BYTES:
        raise _too_long(len(text), field)
    try:
        note = json.loads(text, parse_constant=_refuse)
        stored = json.dumps(note, separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"the note is no JSON: {error}", field=field) from error
    if len(stored) > limits.MAX_NOTE_BYTES:
        raise _too_long(len(stored), field)
    return "" if note is None else stored


def pack_said(
    labels: Mapping[str, str],
    metrics: Mapping[str, float],
    note: str,
    writer: Mapping[str, str],
    origins: Sequence[Origin] = (),
) -> bytes:
    """Returns what is said of a checkpoint as records and manifests hold it; empty when nothing is."""
    values: dict[str, Any] = {"labels": dict(labels), "metrics": dict(metrics), "note": note, "writer": dict(writer)}
    values["origins"] = pack_origins(origins)
    known = {name: value for name, value in values.items() if value}
    return json.dumps(known, sort_keys=True).encode() if known else b""


def unpack_said(content: bytes) -> tuple[dict[str, str], dict[str, float], str, dict[str, str]]:
    """Returns labels, metrics, note and writer that ``pack_said`` packed.

    Raises:
        InvalidArgumentError: They are damaged, or none that may be stored.
    """
    if not content:
        return {}, {}, "", {}
    try:
        known = json.loads(content)
        writer = check_labels(known.get("writer", {}), "writer")
        return (
            check_labels(known.get("labels", {})),
            check_metrics(known.get("metrics", {})),
            check_note(known.get("note", "")),
            writer,
        )
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidArgumentError(f"what is said of the checkpoint is damaged: {error}", field="said") from error


def origins_in(content: bytes) -> tuple[Origin, ...]:
    """Returns the origins that ``pack_said`` packed; none where they are damaged."""
    try:
        known = json.loads(content) if content else {}
    except (ValueError, RecursionError):
        return ()
    return unpack_origins(known.get("origins")) if isinstance(known, dict) else ()


def with_origins(content: bytes, origins: Sequence[Origin]) -> bytes:
    """Returns what is said of a checkpoint with other origins; what is damaged says nothing but those."""
    try:
        said = unpack_said(content)
    except InvalidArgumentError:
        said = {}, {}, "", {}
    return pack_said(*said, origins)


def decode_note(text: str) -> Any:
    """Returns the value of a stored note; None for none."""
    return json.loads(text) if text else None


def check_name(name: object, field: str) -> str:
    """Returns ``name`` when it may be the key of a label or the name of a metric."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"{str(name)[:80]!a} is no name of a label or metric: letters, digits, '_', '.', '/' and '-', at most "
            f"{limits.MAX_LABEL_NAME_CHARS}, beginning with a letter, digit or '_'",
            reason="INVALID_NAME",
            field=field,
        )
    return name


def _number(name: str, value: SupportsFloat, field: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgumentError(f"metric {name} is {str(value)[:80]!a}, not a number", field=field) from error


def _check_count(values: Mapping[str, object], field: str, limit: int) -> None:
    if len(values) > limit:
        raise InvalidArgumentError(f"{len(values)} {field}, the limit is {limit}", reason="LIMIT_EXCEEDED", field=field)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _too_long(size_bytes: int, field: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"a note of {size_bytes} bytes, the limit is {limits.MAX_NOTE_BYTES}", reason="LIMIT_EXCEEDED", field=field
    )
