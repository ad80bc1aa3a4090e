"""``shardbook prune`` and ``shardbook policy``."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from shardbook.catalog import FileDeletion
from shardbook.cli import completing, durations, names, output, progress
from shardbook.cli.deleting import DeleteFiles, DryRun, told
from shardbook.cli.failures import NEGATIVE, USAGE, asking_storage
from shardbook.cli.options import AsJson, Plain, Server, Timeout, client_of
from shardbook.config import ClientConfig
from shardbook.core.names import RunName
from shardbook.core.retention import KeepBest, RetentionPolicy
from shardbook.descriptions import PruneDecision
from shardbook.errors import InvalidArgumentError, ShardbookError

if TYPE_CHECKING:
    from shardbook.client import Client
    from shardbook.deleting import DeletedFiles, PrunedDirectories

EXAMPLES = """\b
Examples:
  shardbook prune llm/8b-v3 --keep-last 3 --keep-every 1000 --dry-run
  shardbook prune llm/8b-v3 --keep-last 3 --keep-best 2 --metric val_loss --min --newer-than 7d --yes
  shardbook prune llm/8b-v3 --delete-files --yes
  shardbook prune /lustre/ckpt/8b-v3 --keep-last 3 --offline --dry-run"""
POLICY_EXAMPLES = """\b
Examples:
  shardbook policy llm/8b-v3
  shardbook policy llm/8b-v3 --keep-last 3 --keep-every 1000
  shardbook policy llm/8b-v3:optim --newer-than 2d
  shardbook policy llm/8b-v3 --clear"""
_COLUMNS = (("REF", False), ("WHAT", False), ("SIZE", True), ("SAVED", False), ("WHY", False))
_EXPENDABLE = ("SAVED", "SIZE")
#: How a reason begins that is nothing but holders, and how one of them names a subscription.
_HELD: Final = "held by "
_WATCH: Final = re.compile(r"\bwatch ([A-Za-z0-9._-]+)")
#: Subscriptions that are named, each on a line of its own.
_MOST_WATCHES: Final = 5
#: Deadline of one call, seconds.
_TIMEOUT_S = 60.0

KeepLast = Annotated[int, typer.Option("--keep-last", metavar="N", min=0, help="Keep the newest N.")]
KeepEvery = Annotated[
    int, typer.Option("--keep-every", metavar="K", min=0, help="Keep those whose step is a multiple of K.")
]
KeepBestCount = Annotated[
    int, typer.Option("--keep-best", metavar="M", min=0, help="Keep the M with the best values of --metric.")
]
Metric = Annotated[str | None, typer.Option("--metric", metavar="METRIC", help="Of which metric.")]
Smallest = Annotated[bool, typer.Option("--min", help="The smallest value is best.")]
Largest = Annotated[bool, typer.Option("--max", help="The largest value is best.")]
NewerThan = Annotated[
    float | None,
    typer.Option(
        "--newer-than", metavar="DURATION", parser=durations.option, help="Keep those saved within 12h, 7d, ..."
    ),
]


def prune(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|DIR...",
            help="project/run, project/run:part; or directories, offline.",
            autocompletion=completing.runs,
        ),
    ],
    keep_last: KeepLast = 0,
    keep_every: KeepEvery = 0,
    keep_best: KeepBestCount = 0,
    metric: Metric = None,
    smallest: Smallest = False,
    largest: Largest = False,
    newer_than_s: NewerThan = None,
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
    delete_data: DeleteFiles = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Judge directories by themselves although a server is configured.")
    ] = False,
    show_all: Annotated[bool, typer.Option("--all", "-a", help="A row for each that is kept, too.")] = False,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = _TIMEOUT_S,
) -> None:
    """Delete the checkpoints of a run that no rule keeps; first it says which.

    What any of the rules keeps is kept, and so is what an alias means (@latest among them), what is held, what is not
    committed, and one checkpoint at least. Without rules the stored policy counts (`shardbook policy`). All is judged
    again when it is deleted. With --delete-files data files go too, and deletions that were interrupted are ended.
    """
    policy = _policy(keep_last, keep_every, keep_best, metric, newer_than_s, smallest=smallest, largest=largest)
    paths = [one for one in targets if names.is_path(one)]
    if paths and len(paths) < len(targets):
        raise InvalidArgumentError("name runs or directories, not both", field="prune")
    if paths:
        _check_offline(server, is_offline=offline)
        work: _Work = _Directories(paths, policy, delete_data=delete_data)
    else:
        client, config = client_of(server, timeout_s)
        if len(targets) > 1:
            raise InvalidArgumentError("name one run", field="prune")
        run, part = names.run_of(targets[0])
        work = _Run(client, config, run, part, policy, delete_data=delete_data)
    with asking_storage():
        decisions, unfinished = work.plan()
    answer: dict[str, Any] = {"dry_run": dry_run, "decisions": [one.to_json() for one in decisions]}
    answer["unfinished"] = unfinished
    if not as_json:
        _show(decisions, unfinished, show_all=show_all, is_plain=is_plain)
    doomed = [one for one in decisions if not one.keep]
    if dry_run or not (doomed or unfinished) or not (work.can_delete or as_json):
        if not dry_run and doomed:
            output.print_line("nothing was deleted: directories are pruned with --delete-files", is_plain=is_plain)
        if as_json:
            output.print_json(answer | {"deleted": [], "files": [], "failures": []})
        return
    if not yes:
        _confirm(len(doomed) + len(unfinished))
    with asking_storage(), progress.shown("deleting", is_wanted=not is_plain) as tell:
        done = work.delete(doomed, tell)
    if as_json:
        output.print_json(answer | done.to_json())
    else:
        _report(done, delete_data=delete_data, is_plain=is_plain)
    if done.failures:
        raise typer.Exit(NEGATIVE)


@dataclass(frozen=True)
class _Done:
    """What was deleted."""

    deleted: Sequence[PruneDecision]
    kept: Sequence[PruneDecision]
    files: Sequence[DeletedFiles]
    failures: Sequence[tuple[str, str]]

    def to_json(self) -> dict[str, Any]:
        """Returns what the command prints."""
        return {
            "deleted": [one.to_json() for one in self.deleted],
            "files": [one.to_json() for one in self.files],
            "failures": [{"ref": ref, "message": message} for ref, message in self.failures],
        }


class _Run:
    """A run of the catalogue."""

    can_delete = True

    def __init__(
        self,
        client: Client,
        config: ClientConfig,
        run: RunName,
        part: str | None,
        policy: RetentionPolicy | None,
        *,
        delete_data: bool,
    ) -> None:
        self._client, self._config = client, config
        self._run, self._part, self._policy = run, part, policy
        self._delete_data = delete_data
        self._unfinished: list[str] = []

    def plan(self) -> tuple[list[PruneDecision], list[str]]:
        decisions = list(self._client.preview_prune(self._run, self._policy, part=self._part))
        if not self._delete_data:
            return decisions, []
        deleted = self._client.list_checkpoints(self._run, part=self._part, show_all=True, filter="state = DELETED")
        begun = [one for one in deleted if one.file_deletion is FileDeletion.BEGUN]
        self._unfinished = [one.name for one in begun]
        return decisions, [one.ref for one in begun]

    def delete(self, doomed: Sequence[PruneDecision], tell: Any) -> _Done:
        from shardbook.deleting import delete_files

        wanted = [one.name for one in doomed]
        made = list(
            self._client.prune(self._run, wanted, self._policy, part=self._part, delete_files=self._delete_data)
            if wanted
            else ()
        )
        deleted = [one for one in made if not one.keep]
        files: list[DeletedFiles] = []
        failures: list[tuple[str, str]] = []
        going = [*self._unfinished, *(one.name for one in deleted)] if self._delete_data else []
        for name in going:
            try:
                files.append(delete_files(name, client=self._client, config=self._config, progress=tell))
            except ShardbookError as error:
                # One store out of reach does not stand in the way of the others; the next time goes on here.
                failures.append((name, error.message))
        return _Done(deleted, [one for one in made if one.keep], files, failures)


class _Directories:
    """Directories, judged by themselves."""

    def __init__(self, paths: list[str], policy: RetentionPolicy | None, *, delete_data: bool) -> None:
        if policy is None:
            raise InvalidArgumentError(
                "say what to keep: directories have no stored policy (--keep-last N, ...)", field="policy"
            )
        self._paths, self._policy = paths, policy
        self.can_delete = delete_data
        self._planned: PrunedDirectories | None = None

    def plan(self) -> tuple[list[PruneDecision], list[str]]:
        from shardbook.deleting import plan_directories

        self._planned = plan_directories(self._paths, self._policy, now_us=time.time_ns() // 1000)
        begun = [ref for _, ref in self._planned.unfinished] if self.can_delete else []
        return list(self._planned.decisions), begun

    def delete(self, doomed: Sequence[PruneDecision], tell: Any) -> _Done:
        if self._planned is None or not self.can_delete:
            return _Done((), (), (), ())
        return _Done(doomed, (), self._planned.delete(tell), ())


_Work = _Run | _Directories


def policy(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="project/run, or project/run:part for one part.", autocompletion=completing.runs
        ),
    ],
    keep_last: KeepLast = 0,
    keep_every: KeepEvery = 0,
    keep_best: KeepBestCount = 0,
    metric: Metric = None,
    smallest: Smallest = False,
    largest: Largest = False,
    newer_than_s: NewerThan = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove the stored policy.")] = False,
    as_json: AsJson = False,
    is_plain: Plain = False,
    server: Server = None,
    timeout_s: Timeout = _TIMEOUT_S,
) -> None:
    """Show or store what `shardbook prune` keeps of a run when it is told nothing.

    A part's own policy counts before that of its run. The server deletes nothing by itself.
    """
    wanted = _policy(keep_last, keep_every, keep_best, metric, newer_than_s, smallest=smallest, largest=largest)
    if clear and wanted is not None:
        raise InvalidArgumentError("give rules or --clear", field="policy")
    name, part = names.run_of(run)
    client, _ = client_of(server, timeout_s)
    if clear or wanted is not None:
        stored = client.set_retention_policy(name, wanted, part=part)
    else:
        stored = client.get_retention_policy(name, part=part)
    if as_json:
        output.print_json({"policy": None if stored is None else stored.to_json()})
    elif stored is None:
        output.print_line(f"no policy: `shardbook policy {run} --keep-last 5` stores one", is_plain=is_plain)
    else:
        output.print_facts(_rules(stored), is_plain=is_plain)


def _policy(
    keep_last: int,
    keep_every: int,
    keep_best: int,
    metric: str | None,
    newer_than_s: float | None,
    *,
    smallest: bool,
    largest: bool,
) -> RetentionPolicy | None:
    """Returns the policy that options give; None when they give none."""
    best: tuple[KeepBest, ...] = ()
    if keep_best:
        if metric is None or smallest is largest:
            raise InvalidArgumentError("--keep-best goes with --metric, and with --min or --max", field="metric")
        best = (KeepBest(metric, keep_best, largest),)
    elif metric is not None or smallest or largest:
        raise InvalidArgumentError("--metric, --min and --max go with --keep-best", field="metric")
    made = RetentionPolicy(keep_last, keep_every, best, 0 if newer_than_s is None else max(1, round(newer_than_s)))
    return made or None


def _rules(stored: RetentionPolicy) -> list[tuple[str, str]]:
    rules = []
    if stored.keep_last:
        rules.append(("keep last", str(stored.keep_last)))
    if stored.keep_every:
        rules.append(("keep every", f"{stored.keep_every} steps"))
    rules += [
        ("keep best", f"{best.count} by the {'largest' if best.largest else 'smallest'} {best.metric}")
        for best in stored.keep_best
    ]
    if stored.newer_than_s:
        rules.append(("newer than", f"{stored.newer_than_s} s"))
    return rules


def _check_offline(server: str | None, *, is_offline: bool) -> None:
    if not is_offline and (server or ClientConfig.from_env().server):
        raise InvalidArgumentError(
            "a server is configured, which knows of aliases and holds that directories do not: "
            "`shardbook prune project/run` heeds them, --offline judges the directories by themselves",
            field="offline",
        )


def _show(decisions: Sequence[PruneDecision], unfinished: Sequence[str], *, show_all: bool, is_plain: bool) -> None:
    shown = [one for one in decisions if show_all or not one.keep]
    if shown:
        output.print_table(_COLUMNS, map(_row, shown), expendable=_EXPENDABLE, is_plain=is_plain)
    doomed = [one for one in decisions if not one.keep]
    size = output.size(sum(one.size_bytes for one in doomed))
    output.print_line(
        f"{len(doomed)} of {len(decisions)} checkpoints are not kept, {size}" if doomed else "everything is kept",
        is_plain=is_plain,
    )
    for line in _kept_for_watches(decisions):
        output.print_line(line, is_plain=is_plain)
    if unfinished:
        output.print_line(f"deletions of files to end: {', '.join(unfinished[:5])}", is_plain=is_plain)


def _kept_for_watches(decisions: Sequence[PruneDecision]) -> Iterator[str]:
    """Yields what no rule keeps but subscriptions do, which may be forgotten by everybody: a line for each of them."""
    held = [one for one in decisions if one.keep and all(reason.startswith(_HELD) for reason in one.reasons)]
    counts = Counter(name for one in held for reason in one.reasons for name in set(_WATCH.findall(reason)))
    for name, count in counts.most_common(_MOST_WATCHES):
        what = "1 checkpoint is" if count == 1 else f"{count} checkpoints are"
        yield (
            f"{what} kept for the subscription {name} alone: `shardbook watch --name {name} --status` shows it, "
            f"`shardbook watch --name {name} --delete` forgets it"
        )
    if len(counts) > _MOST_WATCHES:
        yield f"and some for {len(counts) - _MOST_WATCHES} more subscriptions: --all shows which"


def _row(one: PruneDecision) -> tuple[str, ...]:
    return (
        one.ref,
        "keep" if one.keep else "delete",
        output.size(one.size_bytes),
        output.table_time(one.create_time),
        "; ".join(one.reasons),
    )


def _confirm(count: int) -> None:
    if not sys.stdin.isatty():
        output.print_error(f"nothing was deleted: --yes deletes these {count}")
        raise typer.Exit(USAGE)
    typer.confirm(f"Delete these {count}?", abort=True)


def _report(done: _Done, *, delete_data: bool, is_plain: bool) -> None:
    for kept in done.kept:
        output.print_line(f"{kept.ref} is kept by now: {'; '.join(kept.reasons)}", is_plain=is_plain)
    size = output.size(sum(one.size_bytes for one in done.deleted))
    left = "" if delete_data else f"; {size} of data left: `shardbook rm REF --delete-files` deletes that of one"
    output.print_line(f"deleted {len(done.deleted)} checkpoints{left}", is_plain=is_plain)
    for one in done.files:
        output.print_line(told(one), is_plain=is_plain)
    for ref, message in done.failures:
        output.print_line(f"{ref}: its files are not all gone: {message}", is_plain=is_plain)
