"""How many bytes runs take, as the catalogue has them: ``usage``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from shardbook.client import Client
from shardbook.core.limits import MAX_PAGE_SIZE
from shardbook.core.names import RunName
from shardbook.v1 import catalog_pb2

#: Hears how many checkpoints were counted so far, twice, and that it is checkpoints.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class PartUsage:
    """What the committed checkpoints of one part of a run take.

    Attributes:
        run: Short form, ``project/run``.
        part: Part of the run.
        checkpoint_count: Committed checkpoints, superseded ones included.
        size_bytes: Bytes that they cover.
        superseded_count: Those that a later session's checkpoint of the step replaced; no run's `@step` means them.
        superseded_bytes: Bytes that these cover.
    """

    run: str
    part: str
    checkpoint_count: int
    size_bytes: int
    superseded_count: int
    superseded_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Returns every attribute under its own name."""
        return dict(vars(self))


def usage(client: Client, runs: Iterable[RunName], progress: Progress | None = None) -> Iterator[PartUsage]:
    """Adds up what the catalogue says of runs; nothing on storage is looked at.

    What killed saves left is not in the catalogue: ``shardbook.collecting`` finds it.

    Yields:
        One for each part that has a committed checkpoint, run by run.

    Raises:
        NotFoundError: There is no such run.
        ShardbookError: The service could not be asked.
    """
    seen = 0
    for run in runs:
        sizes: dict[tuple[str, bool], list[int]] = {}
        request = catalog_pb2.ListCheckpointsRequest(
            parent=f"{run}/parts/-", show_all=True, filter="state = COMMITTED", page_size=MAX_PAGE_SIZE
        )
        for page in client._checkpoint_pages(request):  # noqa: SLF001
            for one in page:
                # projects/P/runs/R/parts/PART/checkpoints/...: parsed as a name it takes longer than all the rest.
                sizes.setdefault((one.name.split("/")[5], one.live), []).append(one.size_bytes)
            seen += len(page)
            if progress is not None:
                progress(seen, seen, "checkpoints")
        for part in sorted({part for part, _ in sizes}):
            live, old = sizes.get((part, True), []), sizes.get((part, False), [])
            yield PartUsage(run.ref, part, len(live) + len(old), sum(live) + sum(old), len(old), sum(old))


__all__ = ["PartUsage", "usage"]
