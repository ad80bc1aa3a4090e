"""Parents of listings: one part, the parts of a run, or of many runs (AIP-159: ``-`` stands for all of a kind)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from shardbook.core.names import PartName, RunName, check_segment
from shardbook.errors import InvalidArgumentError, NotFoundError
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage.database import Connection
from shardbook_server.storage.filters import Compare, Field

ANY: Final = "-"
_PARENT: Final = re.compile(r"projects/([^/]*)/runs/([^/]*)/parts/([^/]*)")


@dataclass(frozen=True)
class Place:
    """What a parent names; each of the three may be None for all of them."""

    project: str | None
    run: str | None
    part: str | None

    @property
    def one_run(self) -> RunName | None:
        """The run, when it is one."""
        return None if self.project is None or self.run is None else RunName(self.project, self.run)

    @property
    def conditions(self) -> tuple[Compare, ...]:
        """What names of projects, runs and parts have to be."""
        names = (("project", self.project), ("run", self.run), ("part", self.part))
        return tuple(Compare(Field(field), "=", name) for field, name in names if name is not None)


def parse_parent(text: str) -> Place:
    """Returns what ``projects/{project}/runs/{run}/parts/{part}`` names.

    Raises:
        InvalidArgumentError: It names nothing.
    """
    match = _PARENT.fullmatch(text)
    if match is None:
        shown = ascii(text[:300])
        raise InvalidArgumentError(
            f"{shown} does not name a part: projects/{{project}}/runs/{{run}}/parts/{{part}}, each of them - for all",
            reason="INVALID_NAME",
            field="parent",
        )
    return Place(*(None if name == ANY else check_segment(name, "parent") for name in match.groups()))


def part_ids_of(connection: Connection, place: Place) -> list[int]:
    """Returns the keys of the parts of one run.

    Raises:
        InvalidArgumentError: The place is no single run.
        NotFoundError: The run or part does not exist.
    """
    run = place.one_run
    if run is None:
        raise InvalidArgumentError("name one project and run: only the part may be -", field="parent")
    ids = [part_id for part_id, name in run_rows.list_parts(connection, run) if place.part in (None, name)]
    if not ids:
        what = run.ref if place.part is None else PartName(run, place.part).ref
        raise NotFoundError(f"{what} does not exist; `shardbook runs` lists what there is")
    return ids
