"""What a page of a listing takes in the server, 100,000 checkpoints in the catalogue: 20 runs of 5,000, both databases.

Each question is asked for its first page and for one further on, 50 checkpoints a page, through the service that the
calls use: parsing, statements and answers, without gRPC. Checkpoints have two labels, half of them a metric, one in a
thousand a rare label and a rare metric; one in five is an attempt that failed. Two questions are known to be long
walks, and have no goal: conditions that each hold of many and seldom together, and an order of two fields that sorts
all rows of which the first is equal.

Then the same catalogue is written and followed, through real servers: 24 jobs and 50 watchers, no event lost
(``benchmarks.following``), and claimants that share the work on checkpoints (``benchmarks.claimants``).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import psycopg

from benchmarks.catalogue_rows import Saved, catalogue, store
from benchmarks.common import Goal, Report, parse_arguments
from benchmarks.following import QUICK, FollowSizes, measure_following
from benchmarks.places import DURABILITY, places
from shardbook_server.service.services import Services, build_services
from shardbook_server.storage.database import Database
from shardbook_server.storage.urls import is_postgres

EVERYTHING: Final = "projects/-/runs/-/parts/-"
PROJECT: Final = "projects/llm/runs/-/parts/-"
RUN: Final = "projects/llm/runs/run-007/parts/-"
PART: Final = "projects/llm/runs/run-007/parts/default"
#: Half of the questions have to be answered within this, each of them.
MEDIAN_MS: Final = Goal("<=", 10)
#: Times that each page is asked for.
ROUNDS: Final = 40
#: Pages between the first and the one that stands for all others.
_FURTHER: Final = 5


@dataclass(frozen=True)
class Question:
    """A listing."""

    name: str
    parent: str = EVERYTHING
    filter_text: str = ""
    order_by: str = ""
    show_all: bool = False
    has_goal: bool = True


QUESTIONS: Final = (
    Question("a part", PART),
    Question("a run, its parts merged", RUN),
    Question("a run, every attempt", RUN, show_all=True),
    Question("everything"),
    Question("everything, every attempt", show_all=True),
    Question("a project", PROJECT),
    Question("a project by metric", PROJECT, order_by="metrics.val_loss"),
    Question("a run by metric", RUN, order_by="metrics.val_loss"),
    Question("everything by rare metric", order_by="metrics.mmlu desc"),
    Question("everything by step", order_by="step desc"),
    Question("everything by size", order_by="bytes desc"),
    Question("everything by part", order_by="part"),
    Question("everything by label", order_by="labels.team"),
    Question("everything by world size and step", order_by="world_size desc, step", has_goal=False),
    Question("common label", filter_text='labels.team = "red"'),
    Question("rare label", filter_text='labels.keep = "yes"'),
    Question("rare label by size", filter_text="labels.keep:*", order_by="bytes"),
    Question("metric range", filter_text="metrics.val_loss < 0.05"),
    Question("metric range by metric", filter_text="metrics.val_loss < 0.5", order_by="metrics.val_loss desc"),
    Question("steps", filter_text="step >= 100000 AND step < 100500"),
    Question("step and world size", filter_text="world_size = 512 AND step > 250000"),
    Question("a day", filter_text='create_time >= "2026-02-01" AND create_time < "2026-02-02"'),
    Question("either of two", filter_text='labels.team = "red" OR metrics.val_loss < 0.1'),
    Question("neither of two", filter_text='NOT labels.team = "red" AND NOT world_size = 8'),
    Question("runs by pattern", filter_text='run = "run-00*"', order_by="metrics.val_loss"),
    Question("text in a label", filter_text='labels.team:"ree"'),
    Question("failed", filter_text="state = FAILED", show_all=True),
    Question("nothing", filter_text="step = 12345678"),
    Question("metric of two in a hundred", filter_text="metrics.val_loss < 0.042"),
    Question("metric and label", filter_text='metrics.val_loss < 0.03 AND labels.team = "red"'),
    Question("label by metric", filter_text='labels.seed = "7"', order_by="metrics.val_loss"),
    Question("label of a run", RUN, filter_text='labels.team = "red"'),
    Question("metric of a run", RUN, filter_text="metrics.val_loss < 0.03"),
    Question("either of two rare ones", filter_text='metrics.mmlu > 0.5 OR labels.keep = "yes"'),
    Question("two that never meet", filter_text='labels.seed = "7" AND run = "run-003"'),
    Question("early steps, newest first", filter_text="step < 20000"),
    Question("text in no label", filter_text='labels.team:"zzz"'),
    Question(
        "two that seldom meet",
        filter_text='labels.seed = "7" AND labels.team = "red" AND world_size = 512',
        has_goal=False,
    ),
)


def measure(saves: list[Saved], rounds: int, sizes: FollowSizes) -> Report:
    """Returns the report."""
    report = Report(
        "catalogue",
        {
            "durability": DURABILITY,
            "checkpoints": len(saves),
            "pages": f"{rounds} a question",
            "writers and watchers": f"{sizes.writers} and {sizes.watchers}; one server on SQLite, two on Postgres",
        },
    )
    with places(postgres=True) as found:
        for place in found:
            database = Database(place.url)
            try:
                store(database, saves)
                _settle(database)
                for question in QUESTIONS:
                    _ask(report, place.name, build_services(database), question, rounds)
            finally:
                database.close()
        measure_following(report, found, sizes)
    return report


def _settle(database: Database) -> None:
    """What Postgres does by itself within a minute or so: without it, its planner knows nothing of the tables.

    Nor does it know which pages of a table everybody sees, so that an index is enough.
    """
    if is_postgres(database.url):
        with psycopg.connect(database.url, autocommit=True) as connection:
            connection.execute("VACUUM (ANALYZE)")


def _ask(report: Report, place: str, services: Services, question: Question, rounds: int) -> None:
    def page(token: str) -> tuple[int, str]:
        answer = services.catalog.list_checkpoints(
            question.parent,
            page_token=token,
            show_all=question.show_all,
            filter_text=question.filter_text,
            order_by=question.order_by,
        )
        return len(answer.items), answer.next_page_token

    further = ""
    for _ in range(_FURTHER):
        further = page(further)[1] or further
    first_ms, count = _timed(page, "", rounds)
    further_ms, _ = _timed(page, further, rounds)
    everything = sorted([*first_ms, *further_ms])
    report.row(
        database=place,
        question=question.name,
        found=count,
        first_median_ms=round(statistics.median(first_ms), 2),
        further_median_ms=round(statistics.median(further_ms), 2),
        p99_ms=round(everything[int(0.99 * len(everything))], 2),
    )
    median_ms = max(statistics.median(first_ms), statistics.median(further_ms))
    report.ratio(f"{place}: {question.name}, median ms", median_ms, MEDIAN_MS if question.has_goal else None)


def _timed(page: Callable[[str], tuple[int, str]], token: str, rounds: int) -> tuple[list[float], int]:
    times_ms, count = [], 0
    for _ in range(rounds):
        began_s = time.perf_counter()
        count = page(token)[0]
        times_ms.append((time.perf_counter() - began_s) * 1e3)
    return times_ms, count


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    arguments = parse_arguments(__doc__ or "")
    per_run, rounds, sizes = (500, 5, QUICK) if arguments.quick else (5_000, ROUNDS, FollowSizes())
    return measure(catalogue(20, per_run), rounds, sizes).finish(check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
