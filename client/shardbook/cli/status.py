"""``shardbook status``."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from shardbook.cli import completing, durations, names, output
from shardbook.cli.aliases import refs_of
from shardbook.cli.checkpoints import state_of, timing_of, who_wrote
from shardbook.cli.durations import told
from shardbook.cli.failures import NEGATIVE
from shardbook.cli.options import DEFAULT_TIMEOUT_S, AsJson, Plain, Server, Timeout, client_of
from shardbook.core.names import DEFAULT_PART
from shardbook.descriptions import Alias
from shardbook.status import OpenAttempt, PartStatus, RankHost, RunStatus, SavePhase

EXAMPLES = """\b
Examples:
  shardbook status llm/8b-v3
  shardbook status llm/8b-v3:optim --json | jq '.parts[].open[].missing'
  shardbook status llm/8b-v3 --max-age 2h || page-somebody"""


#: Hosts whose missing ranks are named.
_HOSTS_SHOWN: Final = 10


def show_status(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="project/run, or project/run:part for one part.", autocompletion=completing.runs
        ),
    ],
    max_age_s: Annotated[
        float | None,
        typer.Option(
            "--max-age",
            metavar="DURATION",
            parser=durations.option,
            help="Exit 1 when a part has no commit, or its last one is older: 90s, 30m, 2h, 1d12h.",
        ),
    ] = None,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Show where the saves of a run stand: what is open, which ranks are missing, and the last commit.

    Ages are by the database's clock. What is recorded by `shardbook sync` and `import` counts by when it was written.
    """
    name, part = names.run_of(run)
    client, _ = client_of(server, timeout_s)
    status = client.get_run_status(name, part)
    aliases = [one for one in client.list_aliases(name, part=part) if one.checkpoint]
    stale = [] if max_age_s is None else [one for one in status.parts if not one.is_fresh(max_age_s)]
    if as_json:
        output.print_json(
            {
                "status": status.to_json(),
                "stale": [one.part.part for one in stale],
                "aliases": [one.to_json() for one in aliases],
            }
        )
    else:
        _print(status, aliases, refs_of(client, name, aliases), is_plain=is_plain)
        for one in stale:
            assert max_age_s is not None  # noqa: S101 - or nothing were stale
            output.print_line(f"{_ref(status, one)}: no commit within {told(max_age_s)}", is_plain=is_plain)
    if stale or (max_age_s is not None and not status.parts):
        raise typer.Exit(NEGATIVE)


def _print(status: RunStatus, aliases: list[Alias], refs: dict[str, str], *, is_plain: bool) -> None:
    for one in status.parts:
        facts = [("run", _ref(status, one)), ("writer", _writer(status, one)), ("last commit", _last(one))]
        facts += [("alias", text) for text in _aliases(status, one, aliases, refs)]
        if one.last_failure is not None:
            failed = one.last_failure
            why = f": {failed.failure}" if failed.failure else ""
            facts.append(("last attempt", f"{failed.ref} {state_of(failed)}{why}"))
        for attempt in one.open:
            facts += _attempt(attempt)
        hidden = one.open_count - len(one.open)
        if hidden:
            facts.append(("open", f"and {output.count(hidden)} more: `shardbook ls {_ref(status, one)} --all`"))
        if not one.open:
            facts.append(("open", "nothing"))
        output.print_facts(facts, is_plain=is_plain)


def _ref(status: RunStatus, one: PartStatus) -> str:
    return status.run if one.part.part == DEFAULT_PART else f"{status.run}:{one.part.part}"


def _aliases(status: RunStatus, one: PartStatus, aliases: list[Alias], refs: dict[str, str]) -> list[str]:
    """What the aliases of a part mean, and what they follow."""
    texts = []
    for alias in aliases:
        place, _, name = alias.ref.rpartition("@")
        if place == _ref(status, one):
            best = f", best {alias.metric} ({alias.direction.value})" if alias.direction is not None else ""
            protected = ", protected" if alias.protected else ""
            texts.append(f"@{name}: {refs[alias.checkpoint]}{best}{protected}")
    return texts


def _writer(status: RunStatus, one: PartStatus) -> str:
    part = one.part
    if not part.session:
        return "none: saved offline"
    known = who_wrote(part.user, part.host, part.job_id)
    who = f"session {part.session}, {known}" if known else f"session {part.session}"
    if part.last_seen_time is None:
        return who
    ago = told(max(0.0, (status.read_time - part.last_seen_time).total_seconds()))
    return f"{who}, {'alive' if part.writing else 'its lease has ended'}, last seen {ago} ago"


def _last(one: PartStatus) -> str:
    if one.last_commit is None or one.last_commit_age_s is None:
        return "none"
    recorded = ", recorded after the fact" if one.last_commit.recovered else ""
    return f"{one.last_commit.ref}, {told(one.last_commit_age_s)} ago{recorded}"


def _attempt(attempt: OpenAttempt) -> list[tuple[str, str]]:
    world = output.count(attempt.world_size)
    facts = [
        ("open", f"{attempt.checkpoint.ref}: {attempt.phase.value}, began {told(attempt.age_s)} ago"),
        ("  planned", f"{output.count(attempt.planned_count)} of {world} ranks{_so_far(attempt.plan_s)}"),
    ]
    if attempt.phase is not SavePhase.PLANNING:
        registered = output.count(attempt.registered_count)
        facts.append(("  registered", f"{registered} of {world} ranks{_so_far(attempt.write_s)}"))
    if attempt.registered:
        facts.append(("  there", _ranks(attempt.registered, attempt.registered_count)))
    if attempt.timing is not None:
        facts += [(f"  {name}", text) for name, text in timing_of(attempt.timing, is_open=True)]
    if attempt.phase is SavePhase.PLANNING and attempt.unplanned:
        told_of = attempt.unplanned_ranks or ",".join(map(str, attempt.unplanned))
        facts.append(("  no plan of", told_of))
    elif attempt.missing_hosts:
        facts.append(("  missing", _hosts(attempt)))
    elif attempt.missing:
        facts.append(("  missing", _ranks(attempt.missing, attempt.missing_count)))
    return facts


def _hosts(attempt: OpenAttempt) -> str:
    """Ranks that are missing, by host, as far as a screen has room."""
    shown = attempt.missing_hosts[:_HOSTS_SHOWN]
    named = "; ".join(f"{one.ranks} on {one.host}" if one.host else one.ranks for one in shown)
    ranks = attempt.missing_count - sum(one.rank_count for one in shown)
    if ranks <= 0:
        return named
    return f"{named}; and {output.count(ranks)} more on {output.count(attempt.missing_host_count - len(shown))} hosts"


def _so_far(seconds: float | None) -> str:
    return "" if seconds is None else f", {told(seconds)}"


def _ranks(ranks: tuple[RankHost, ...], count: int) -> str:
    """Ranks by host, and how many are not told."""
    hosts: dict[str, list[str]] = {}
    for one in ranks:
        hosts.setdefault(one.host, []).append(str(one.rank))
    named = "; ".join(f"{', '.join(some)} on {host}" if host else ", ".join(some) for host, some in hosts.items())
    hidden = count - len(ranks)
    return f"{named}; and {output.count(hidden)} more" if hidden > 0 else named


__all__ = ["EXAMPLES", "show_status"]
