"""What the catalogue knows of attempts, for who wants to remove their files."""

from __future__ import annotations

import math
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from shardbook.catalog import Checkpoint, CheckpointState
from shardbook.client import Client
from shardbook.core.manifest import AttemptIdentity
from shardbook.core.names import CheckpointName, RunName, prefix_of
from shardbook.errors import CheckpointClosedError, NotFoundError, SessionFencedError, SessionUnknownError
from shardbook.stores import Stores, normalized
from shardbook.v1.registration_pb2 import AbortCheckpointRequest
from shardbook.v1.types_pb2 import AttemptKey

#: How long a listing of the catalogue is good for, seconds: what it is asked about is a day old.
_LISTED_S: Final = 60.0


@dataclass(frozen=True)
class KnownAttempt:
    """An attempt of the catalogue that files may be of.

    Attributes:
        checkpoint: The attempt.
        is_sure: True when they are its files; False when they may be, seen from another host.
    """

    checkpoint: Checkpoint
    is_sure: bool


@dataclass
class Known:
    """Asks the catalogue. Thread-safe.

    An attempt whose ranks left no record has no name but its directory's: the beginning of its incarnation and its
    number, which the attempts of a session share that save into different directories. Those of the whole catalogue
    are listed for the first such attempt, and again when that is a minute ago.

    Attributes:
        client: The server.
        run: The only run to look at for attempts without a name; None for all.
        stores: What locations of the catalogue mean here.
    """

    client: Client
    run: RunName | None = None
    stores: Stores = field(default_factory=Stores)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _listed: dict[str, list[Checkpoint]] = field(default_factory=dict, init=False, repr=False)
    _listed_s: float = field(default=-math.inf, init=False, repr=False)

    def find(self, directory: str, prefix: str, identity: AttemptIdentity | None) -> list[KnownAttempt]:
        """Returns the attempts of the catalogue that files may be of, by name, or by where they lie."""
        if identity is not None:
            with suppress(NotFoundError):  # ranks that were cut off did not know their session's number
                found = self.client.get_checkpoint(identity.checkpoint_name)
                # A number alone is no identity: after a restore the catalogue may have handed it out again.
                if found.incarnation == identity.incarnation.hex():
                    return [KnownAttempt(found, is_sure=True)]
        places = [(one, self._is_at(one.location, directory)) for one in self._by_prefix().get(prefix, [])]
        return [KnownAttempt(one, is_sure) for one, is_sure in places if is_sure is not None]

    def _is_at(self, location: str, directory: str) -> bool | None:
        """True for the location of a directory, None for that of another one; False when it may be the same.

        Another host may mount it elsewhere, or call its store otherwise; but it has the same name there.
        """
        here = self.stores.here(location)
        if here is not None and normalized(here) == directory:
            return True
        names = (text.rstrip("/").rpartition("/")[2].rpartition(":")[2] for text in (location, directory))
        return False if len(set(names)) == 1 else None

    def is_alive(self, one: Checkpoint) -> bool:
        """Returns True when the session that wrote an attempt holds a lease."""
        try:
            parts = self.client.get_run(CheckpointName.parse(one.name).part.run).parts
        except NotFoundError:
            return False
        return any(part.part == one.part and part.session == one.session and part.writing for part in parts)

    def close(self, one: Checkpoint) -> bool:
        """Fails an expired attempt for good, so that no rank can take it up again; False when one has meanwhile.

        The attempt of a session that a later one replaced is closed to its ranks already.
        """
        if self.client.get_checkpoint(one.name).state not in (CheckpointState.EXPIRED, CheckpointState.FAILED):
            return False
        name = CheckpointName.parse(one.name)
        key = AttemptKey(
            run=str(name.part.run),
            part=one.part,
            step=one.step,
            session=one.session,
            incarnation=bytes.fromhex(one.incarnation),
            attempt=one.attempt,
            world_size=one.world_size,
        )
        request = AbortCheckpointRequest(key=key, reason="its ranks were gone, and its files are removed")
        try:
            self.client.abort(request)
        except (SessionFencedError, SessionUnknownError):
            return True
        except CheckpointClosedError:
            return False
        return True

    def forget(self) -> None:
        """Has everything asked anew."""
        with self._lock:
            self._listed_s = -math.inf

    def _by_prefix(self) -> dict[str, list[Checkpoint]]:
        with self._lock:
            if time.monotonic() - self._listed_s > _LISTED_S:
                began_s, listed = time.monotonic(), dict[str, list[Checkpoint]]()
                runs = [self.run] if self.run is not None else [run.name for run in self.client.list_runs()]
                for run in runs:
                    for one in self.client.list_checkpoints(run, show_all=True):
                        prefix = prefix_of(bytes.fromhex(one.incarnation), one.attempt)
                        listed.setdefault(prefix, []).append(one)
                self._listed, self._listed_s = listed, began_s
            return self._listed


def state_if_needed(one: KnownAttempt, known: Known) -> CheckpointState | None:
    """Returns the state of an attempt whose files may still be needed; None when they are not."""
    state = one.checkpoint.state
    if state is CheckpointState.FAILED:
        return None
    if state is CheckpointState.EXPIRED and one.is_sure and not known.is_alive(one.checkpoint):
        return None
    return state


__all__ = ["Known", "KnownAttempt", "state_if_needed"]
