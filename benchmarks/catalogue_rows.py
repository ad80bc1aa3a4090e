"""A catalogue of many checkpoints as rows, for tests of listings: no save is made, only what one leaves."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import insert, text

from shardbook_server.storage.database import Database
from shardbook_server.storage.tables import checkpoints, labels, metrics, parts, projects, runs

#: 2026-01-01, microseconds since the epoch.
START_US = 1_767_225_600_000_000
MINUTE_US = 60_000_000


@dataclass(frozen=True)
class Saved:
    """A checkpoint as a row has it."""

    project: str
    run: str
    part: str
    session: int
    step: int
    attempt: int = 1
    state: int = 2
    live: bool = True
    world_size: int = 8
    bytes: int = 1000
    create_time_us: int = START_US
    write_time_us: int | None = None
    labels: dict[str, str] = field(default_factory=dict, hash=False)
    metrics: dict[str, float] = field(default_factory=dict, hash=False)

    @property
    def save_time_us(self) -> int:
        """When it was saved, as listings say it."""
        return self.create_time_us if self.write_time_us is None else self.write_time_us


def store(database: Database, saves: Sequence[Saved]) -> dict[int, Saved]:
    """Adds rows; returns them by key."""
    with database.write() as connection:
        ids: dict[tuple[str, ...], int] = {}

        def key(table: Any, path: tuple[str, ...], **values: object) -> int:
            if path not in ids:
                statement = insert(table).values(name=path[-1], **values).returning(table.c.id)
                ids[path] = connection.execute(statement).scalar_one()
            return ids[path]

        rows, part_ids = [], []
        for at, one in enumerate(saves):
            project_id = key(projects, (one.project,))
            run_id = key(runs, (one.project, one.run), project_id=project_id, create_time_us=START_US)
            part_id = key(parts, (one.project, one.run, one.part), run_id=run_id, session=1, last_session=1)
            part_ids.append(part_id)
            rows.append(_row(one, part_id, at))
        connection.execute(insert(checkpoints), rows)
        # Given in order, so their keys ascend as they do.
        found = connection.scalars(text("SELECT id FROM checkpoints ORDER BY id DESC LIMIT :n"), {"n": len(rows)})
        by_id = dict(zip(reversed(list(found)), saves, strict=True))
        part_of = dict(zip(by_id, part_ids, strict=True))
        said = [
            {"checkpoint_id": one, "name": name, "value": value}
            for one, saved in by_id.items()
            for name, value in saved.labels.items()
        ]
        measured = [
            {"checkpoint_id": one, "name": name, "value": value, "part_id": part_of[one]}
            for one, saved in by_id.items()
            for name, value in saved.metrics.items()
        ]
        for table, values in ((labels, said), (metrics, measured)):
            if values:
                connection.execute(insert(table), values)
    return by_id


def _row(one: Saved, part_id: int, number: int) -> dict[str, object]:
    return {
        "part_id": part_id,
        "session": one.session,
        "step": one.step,
        "attempt": one.attempt,
        "incarnation": number.to_bytes(16, "big"),
        "world_size": one.world_size,
        "registration_count": one.world_size,
        "state": one.state,
        "live": int(one.live),
        "staged": 0,
        "recovered": 0,
        "explicit": 0,
        "location": "lustre:llm/step",
        "prefix": "x",
        "create_time_us": one.create_time_us,
        "write_time_us": one.write_time_us,
        "size_bytes": one.bytes,
        "metadata_header": b"",
        "failure": "",
    }


def catalogue(run_count: int, per_run: int, seed: int = 0) -> list[Saved]:
    """Returns checkpoints of runs of two projects, most of them live, with labels and metrics of unlike frequency."""
    chance = random.Random(seed)
    saves = []
    for number in range(run_count):
        for at in range(per_run):
            step = at * 100
            measured = {"val_loss": round(3 / (1 + at) + chance.random(), 4)} if at % 2 else {}
            if chance.random() < 0.001:
                measured["mmlu"] = chance.random()
            said = {"team": chance.choice(["red", "green", "blue"]), "seed": str(number)}
            if chance.random() < 0.001:
                said["keep"] = "yes"
            saves.append(
                Saved(
                    project="llm" if number % 2 else "vision",
                    run=f"run-{number:03}",
                    part="default" if at % 3 else "optim",
                    session=1 + at * 3 // per_run,
                    step=step,
                    state=chance.choice([2, 2, 2, 2, 3]),
                    live=True,
                    world_size=chance.choice([8, 8, 64, 512]),
                    bytes=chance.randrange(10**12),
                    create_time_us=START_US + (at * run_count + number) * MINUTE_US,
                    labels=said,
                    metrics=measured,
                )
            )
    return [one if one.state == 2 else _closed(one) for one in saves]


def _closed(one: Saved) -> Saved:
    return Saved(**{**vars(one), "live": False})
