"""``shardbook label``, ``shardbook metric`` and ``shardbook note``: what is said of a checkpoint."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from shardbook.catalog import Checkpoint
from shardbook.cli import completing, names, output
from shardbook.cli.options import DEFAULT_TIMEOUT_S, AsJson, Etag, Plain, Server, Timeout, client_of
from shardbook.errors import InvalidArgumentError

LABEL_EXAMPLES = """\b
Examples:
  shardbook label llm/8b-v3@1500 stage=eval owner=ada
  shardbook label llm/8b-v3@1500 --remove stage"""
METRIC_EXAMPLES = """\b
Examples:
  shardbook metric llm/8b-v3@1500 val_loss=1.87 mmlu=0.62
  shardbook metric llm/8b-v3@1500 --json | jq .checkpoint.metrics"""
NOTE_EXAMPLES = """\b
Examples:
  shardbook note llm/8b-v3@1500 "before the learning rate was halved"
  shardbook note llm/8b-v3@1500 --value '{"eval": {"shots": 5}}'
  shardbook note llm/8b-v3@1500 --clear"""

Ref = Annotated[
    str,
    typer.Argument(metavar="REF", help="project/run@1500, @1500.s3, @latest, @best.", autocompletion=completing.refs),
]
Remove = Annotated[list[str] | None, typer.Option("--remove", metavar="KEY", help="Remove this one; may be repeated.")]


def label(
    ref: Ref,
    labels: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Labels to set.")] = None,
    remove: Remove = None,
    etag: Etag = None,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Set, remove or show the labels of a checkpoint. The others stay as they are."""
    name, changes = names.checkpoint_of(ref), _changes(labels, remove, "KEY=VALUE", "labels")
    client, _ = client_of(server, timeout_s)
    checkpoint = client.update_checkpoint(name, labels=changes, etag=etag) if changes else client.get_checkpoint(name)
    _print(
        checkpoint,
        checkpoint.labels,
        as_json=as_json,
        is_plain=is_plain,
        nothing=f"no labels: `shardbook label {ref} KEY=VALUE` sets one",
    )


def metric(
    ref: Ref,
    metrics: Annotated[list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="Metrics to set.")] = None,
    remove: Remove = None,
    etag: Etag = None,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Set, remove or show the metrics of a checkpoint. Aliases that follow one of them move at once."""
    name, changes = names.checkpoint_of(ref), _changes(metrics, remove, "NAME=VALUE", "metrics")
    numbers = {key: None if text is None else _number(key, text) for key, text in changes.items()}
    client, _ = client_of(server, timeout_s)
    checkpoint = client.update_checkpoint(name, metrics=numbers, etag=etag) if numbers else client.get_checkpoint(name)
    shown = {key: output.number(value) for key, value in checkpoint.metrics.items()}
    _print(
        checkpoint,
        shown,
        as_json=as_json,
        is_plain=is_plain,
        nothing=f"no metrics: `shardbook metric {ref} NAME=VALUE` sets one",
    )


def note(
    ref: Ref,
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="What to note.")] = None,
    value: Annotated[
        str | None, typer.Option("--value", metavar="JSON", help="Any JSON value, instead of TEXT.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove the note.")] = False,
    etag: Etag = None,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Keep a note with a checkpoint, or show it."""
    name = names.checkpoint_of(ref)
    if (text is not None) + (value is not None) + clear > 1:
        raise InvalidArgumentError("give one of TEXT, --value and --clear", field="note")
    if "" in (text, value):
        # Such as a variable that is not set.
        raise InvalidArgumentError("an empty text is no note: --clear removes the note", field="note")
    client, _ = client_of(server, timeout_s)
    if text is None and value is None and not clear:
        checkpoint = client.get_checkpoint(name)
    else:
        checkpoint = client.update_checkpoint(name, note=text if value is None else _value(value), etag=etag)
    if as_json:
        output.print_json({"checkpoint": checkpoint.to_json()})
        return
    output.print_line(
        note_text(checkpoint.note) or f"no note: `shardbook note {ref} TEXT` keeps one", is_plain=is_plain
    )


def note_text(value: Any) -> str:
    """Returns a note as people read it: a text as it is, another value as JSON; empty for none."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _print(checkpoint: Checkpoint, values: Any, *, as_json: bool, is_plain: bool, nothing: str) -> None:
    if as_json:
        output.print_json({"checkpoint": checkpoint.to_json()})
    elif values:
        output.print_facts(values.items(), is_plain=is_plain)
    else:
        output.print_line(nothing, is_plain=is_plain)


def given_labels(given: list[str] | None) -> dict[str, str]:
    """Returns labels that an option gave as ``KEY=VALUE``, by key; raises InvalidArgumentError."""
    return {key: text for key, text in _changes(given, None, "KEY=VALUE", "labels").items() if text is not None}


def given_metrics(given: list[str] | None) -> dict[str, float]:
    """Returns metrics that an option gave as ``NAME=VALUE``, by name; raises InvalidArgumentError."""
    changes = _changes(given, None, "NAME=VALUE", "metrics")
    return {name: _number(name, text) for name, text in changes.items() if text is not None}


def _changes(given: list[str] | None, remove: list[str] | None, form: str, field: str) -> dict[str, str | None]:
    changes: dict[str, str | None] = dict.fromkeys(remove or [])
    for one in given or []:
        key, equals, text = one.partition("=")
        if not equals:
            raise InvalidArgumentError(f"{one} is not {form}", field=field)
        if key in changes:
            raise InvalidArgumentError(f"{key} is named twice", field=field)
        changes[key] = text
    return changes


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidArgumentError(f"{name} is {text!r}, not a number", field=f"metrics.{name}") from None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidArgumentError(f"--value is no JSON: {error}", field="note") from None
