"""What the catalogue knows of attempts, for who wants to remove their files."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from shardbook.catalog import Checkpoint, CheckpointState
from shardbook.client import Client
from shardbook.core.manifest import AttemptIdentity
from shardbook.core.names import CheckpointId, CheckpointName, PartName, RunName, prefix_of
from shardbook.errors import NotFoundError


def name_of(identity: AttemptIdentity) -> CheckpointName:
    """Returns the name of the attempt that left a file."""
    part = PartName(RunName.parse(identity.run), identity.part)
    return CheckpointName(
        part, CheckpointId.full(identity.step, identity.session, identity.attempt, identity.incarnation)
    )


@dataclass
class Known:
    """Asks the catalogue. Thread-safe.

    An attempt whose ranks left no record has no name but its directory's: the beginning of its incarnation and its
    number. Those of the whole catalogue are listed for the first such attempt, and once more before it is removed.

    Attributes:
        client: The server.
        run: The only run to look at for attempts without a name; None for all.
    """

    client: Client
    run: RunName | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _listed: dict[str, list[Checkpoint]] | None = field(default=None, init=False, repr=False)

    def find(self, prefix: str, identity: AttemptIdentity | None) -> list[Checkpoint]:
        """Returns the attempts of the catalogue that files may be of: of one name, or of one directory name."""
        if identity is None:
            return self._by_prefix().get(prefix, [])
        try:
            found = self.client.get_checkpoint(name_of(identity))
        except NotFoundError:
            # Ranks that were cut off from the service did not know their session's number.
            return self._by_prefix().get(prefix, [])
        # A number alone is no identity: after a restore the catalogue may have handed it out again.
        if found.incarnation == identity.incarnation.hex():
            return [found]
        return self._by_prefix().get(prefix, [])

    def is_alive(self, one: Checkpoint) -> bool:
        """Returns True when the session that wrote an attempt holds a lease."""
        try:
            parts = self.client.get_run(CheckpointName.parse(one.name).part.run).parts
        except NotFoundError:
            return False
        return any(part.part == one.part and part.session == one.session and part.writing for part in parts)

    def forget(self) -> None:
        """Has everything asked anew."""
        with self._lock:
            self._listed = None

    def _by_prefix(self) -> dict[str, list[Checkpoint]]:
        with self._lock:
            if self._listed is None:
                listed: dict[str, list[Checkpoint]] = {}
                runs = [self.run] if self.run is not None else [run.name for run in self.client.list_runs()]
                for run in runs:
                    for one in self.client.list_checkpoints(run, show_all=True):
                        prefix = prefix_of(bytes.fromhex(one.incarnation), one.attempt)
                        listed.setdefault(prefix, []).append(one)
                self._listed = listed
            return self._listed


def may_be_needed(one: Checkpoint, known: Known) -> CheckpointState | None:
    """Returns the state of an attempt whose files may still be needed; None when they are not."""
    if one.state is CheckpointState.FAILED:
        return None
    if one.state is CheckpointState.EXPIRED and not known.is_alive(one):
        return None
    return one.state


__all__ = ["Known", "may_be_needed", "name_of"]
