"""How many bytes runs take, as the catalogue has them: ``usage``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from shardbook.catalog import CheckpointState
from shardbook.client import Client
from shardbook.core.names import RunName

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
        parts: dict[str, list[tuple[int, bool]]] = {}
        for one in client.list_checkpoints(run, show_all=True):
            seen += 1
            if progress is not None:
                progress(seen, seen, "checkpoints")
            if one.state is CheckpointState.COMMITTED:
                parts.setdefault(one.part, []).append((one.size_bytes, one.live))
        for part, sizes in sorted(parts.items()):
            old = [size for size, live in sizes if not live]
            yield PartUsage(run.ref, part, len(sizes), sum(size for size, _ in sizes), len(old), sum(old))


__all__ = ["PartUsage", "usage"]
