"""What a shell completes names to: projects, runs and refs, asked of the server.

Somebody waits with a finger on the key: the server is given half a second, and whatever goes wrong completes to
nothing, silently. Paths are left to the shell.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from itertools import islice
from typing import Any, Final

import typer

from shardbook.core.names import DEFAULT_PART

#: For everything that one key asks of the server, seconds.
_PATIENCE_S: Final = 0.5
#: Names that are looked at; a shell shows a hundred or so without asking.
_MOST_RUNS: Final = 1000
_MOST_CHECKPOINTS: Final = 50
#: What bash takes for words of their own, of what a ref is made of.
_BREAKS: Final = re.compile(r"[@:=]+")


@contextmanager
def mended() -> Iterator[None]:
    """Puts the words together again that bash took apart: ``llm/8b@15`` comes as ``llm/8b``, ``@`` and ``15``.

    What bash keeps by itself is taken off what is offered. Other shells, and commands that run, are left alone.
    """
    if os.environ.get("_SHARDBOOK_COMPLETE") != "complete_bash":
        yield
        return
    kept = _mend()
    offered = io.StringIO()
    try:
        with redirect_stdout(offered):
            yield
    finally:
        sys.stdout.writelines(line.removeprefix(kept) + "\n" for line in offered.getvalue().splitlines())


def _mend() -> str:
    """Mends the words in the environment; returns what the last one has before what bash asks for."""
    words = os.environ.get("COMP_WORDS", "").split("\n")
    number = os.environ.get("COMP_CWORD", "")
    at = int(number) if number.isdecimal() else 0
    mended_words: list[str] = []
    is_open, kept = False, ""
    for word in (*words, "")[: at + 1]:
        is_break = bool(_BREAKS.fullmatch(word))
        if len(mended_words) > 1 and (is_break or is_open):
            # A break that is the last word is one that bash replaces.
            kept = mended_words[-1]
            mended_words[-1] += word
        else:
            kept = ""
            mended_words.append(word)
        is_open = is_break
    os.environ["COMP_WORDS"] = "\n".join(mended_words)
    os.environ["COMP_CWORD"] = str(len(mended_words) - 1)
    return kept


def projects(ctx: typer.Context, incomplete: str) -> list[str]:
    """Completes a project."""
    return _offered(ctx, incomplete, lambda client: (one.ref for one in client.list_projects(page_size=200)))


def runs(ctx: typer.Context, incomplete: str) -> list[str]:
    """Completes a run."""
    return _offered(ctx, incomplete, lambda client: _runs(client, incomplete))


def refs(ctx: typer.Context, incomplete: str) -> list[str]:
    """Completes a checkpoint: the newest of each run, and all of a run that is written out."""
    run, at, _ = incomplete.partition("@")
    if at:
        return _offered(ctx, incomplete, lambda client: _checkpoints(client, run))
    return _offered(ctx, incomplete, lambda client: (f"{one}@latest" for one in _runs(client, incomplete)))


def deleted(ctx: typer.Context, incomplete: str) -> list[str]:
    """Completes a checkpoint that was deleted and can be brought back."""
    return _offered(ctx, incomplete, lambda client: _deleted(client, incomplete))


def runs_or_refs(ctx: typer.Context, incomplete: str) -> list[str]:
    """Completes a run, or a checkpoint once there is an ``@``."""
    return refs(ctx, incomplete) if "@" in incomplete else runs(ctx, incomplete)


def _runs(client: Any, incomplete: str) -> Iterator[str]:
    project, slash, _ = incomplete.partition("/")
    found = client.list_runs(project if slash else None, page_size=200)
    return (one.ref for one in islice(found, _MOST_RUNS))


def _checkpoints(client: Any, run: str) -> Iterator[str]:
    name, _, part = run.partition(":")
    for alias in islice(client.list_aliases(name, part=part or DEFAULT_PART), _MOST_CHECKPOINTS):
        yield f"{run}@{alias.ref.rpartition('@')[2]}"
    found = client.list_checkpoints(name, part=part or DEFAULT_PART, page_size=_MOST_CHECKPOINTS)
    for one in islice(found, _MOST_CHECKPOINTS):
        yield f"{run}@{one.step}"


def _deleted(client: Any, incomplete: str) -> Iterator[str]:
    from shardbook.catalog import FileDeletion

    run, at, _ = incomplete.partition("@")
    name, _, part = run.partition(":")
    if at:
        place, only = name, part or DEFAULT_PART
    else:
        project, slash, _ = name.partition("/")
        place, only = f"{project if slash else '*'}/*", None
    found = client.list_checkpoints(
        place, part=only, show_all=True, filter="state = DELETED", page_size=_MOST_CHECKPOINTS
    )
    for one in islice(found, _MOST_CHECKPOINTS):
        # Without its files nothing brings it back.
        if one.file_deletion is FileDeletion.NONE:
            yield f"{run}@{one.ref.partition('@')[2]}" if at else one.ref


def _offered(ctx: typer.Context, incomplete: str, ask: Callable[[Any], Iterable[str]]) -> list[str]:
    """Returns what begins like ``incomplete``; nothing where that is a path, or the server does not answer."""
    if incomplete.startswith(("/", ".", "~")) or "://" in incomplete:
        return []
    try:
        from shardbook.client import Client
        from shardbook.config import ClientConfig

        config = ClientConfig.from_env()
        address = ctx.params.get("server") or config.server
        client = Client(address, token=config.token, timeout_s=_PATIENCE_S, outage_s=_PATIENCE_S)
        found = dict.fromkeys(ask(client))
    except Exception:  # noqa: BLE001 - nobody reads an error in the middle of a line
        return []
    return [name for name in found if name.startswith(incomplete)]


__all__ = ["deleted", "mended", "projects", "refs", "runs", "runs_or_refs"]
