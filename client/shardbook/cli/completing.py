"""What a shell completes names to: projects, runs and refs, asked of the server.

Somebody waits with a finger on the key: the server is given half a second, and whatever goes wrong completes to
nothing, silently. Paths are left to the shell.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Final

from shardbook.core.names import DEFAULT_PART

#: For everything that one key asks of the server, seconds.
_PATIENCE_S: Final = 0.5
#: Names that are looked at; a shell shows a hundred or so without asking.
_MOST_RUNS: Final = 1000
_MOST_CHECKPOINTS: Final = 50
#: What bash takes for words of their own, of what a ref is made of.
_BREAKS: Final = re.compile(r"[@:=]+")

#: What bash has before the word that it asks for, and keeps.
_kept = ""


def begin() -> None:
    """Puts the words together again that bash took apart: ``llm/8b@15`` comes as ``llm/8b``, ``@`` and ``15``."""
    global _kept  # noqa: PLW0603 - one process completes one line
    if os.environ.get("_SHARDBOOK_COMPLETE") != "complete_bash":
        return
    words = os.environ.get("COMP_WORDS", "").split("\n")
    number = os.environ.get("COMP_CWORD", "")
    at = int(number) if number.isdecimal() else 0
    mended: list[str] = []
    is_open = False
    for word in (*words, "")[: at + 1]:
        is_break = bool(_BREAKS.fullmatch(word))
        if len(mended) > 1 and (is_break or is_open):
            _kept = mended[-1] + (word if is_break else "")
            mended[-1] += word
        else:
            _kept = ""
            mended.append(word)
        is_open = is_break
    os.environ["COMP_WORDS"] = "\n".join(mended)
    os.environ["COMP_CWORD"] = str(len(mended) - 1)


def projects(ctx: Any, _param: Any, incomplete: str) -> list[str]:
    """Completes a project."""
    return _offered(ctx, incomplete, lambda client: (one.ref for one in client.list_projects(page_size=200)))


def runs(ctx: Any, _param: Any, incomplete: str) -> list[str]:
    """Completes a run."""
    return _offered(ctx, incomplete, lambda client: _runs(client, incomplete))


def refs(ctx: Any, _param: Any, incomplete: str) -> list[str]:
    """Completes a checkpoint: the newest of each run, and all of a run that is written out."""
    run, at, _ = incomplete.partition("@")
    if at:
        return _offered(ctx, incomplete, lambda client: _checkpoints(client, run))
    return _offered(ctx, incomplete, lambda client: (f"{one}@latest" for one in _runs(client, incomplete)))


def runs_or_refs(ctx: Any, param: Any, incomplete: str) -> list[str]:
    """Completes a run, or a checkpoint once there is an ``@``."""
    return refs(ctx, param, incomplete) if "@" in incomplete else runs(ctx, param, incomplete)


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


def _offered(ctx: Any, incomplete: str, ask: Callable[[Any], Iterable[str]]) -> list[str]:
    """Returns what begins like ``incomplete``, without what bash keeps by itself."""
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
    return [name.removeprefix(_kept) for name in found if name.startswith(incomplete)]


__all__ = ["begin", "projects", "refs", "runs", "runs_or_refs"]
