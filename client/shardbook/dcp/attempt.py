"""One attempt to save: who, what and where, fixed before anything is written."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from shardbook.core import limits
from shardbook.core.manifest import AttemptIdentity
from shardbook.core.names import RunName, prefix_of
from shardbook.dcp.runtime import Member
from shardbook.dcp.session import host_name
from shardbook.stores import encodable
from shardbook.v1.types_pb2 import AttemptKey, AttemptLocation, RankFailure

_FIRST_WAIT_S = 2.0
#: Waits of all ranks of a world that may begin per second.
_WAITS_A_SECOND = 500


@dataclass(frozen=True)
class Attempt:
    """One attempt to save, as one rank sees it. Immutable.

    Attributes:
        run: ``project/run``.
        part: Part of the run.
        step: Training step.
        incarnation: 16 bytes.
        number: Attempt within the session, 1 or more.
        member: Place of this rank among those that save.
        path: Directory or URL as the user gave it.
        location: What the catalogue records for it.
        begin_time_s: When this rank began, seconds since the epoch.
    """

    run: str
    part: str
    step: int
    incarnation: bytes
    number: int
    member: Member
    path: str
    location: str
    begin_time_s: float = field(default_factory=time.time)

    @property
    def prefix(self) -> str:
        """Directory of the attempt's data files, relative to ``path``."""
        return prefix_of(self.incarnation, self.number)

    def identity(self, session: int) -> AttemptIdentity:
        """Returns what the files of the attempt say about it; ``session`` is 0 while no server gave a number."""
        return AttemptIdentity(
            run=self.run,
            part=self.part,
            step=self.step,
            session=session,
            incarnation=self.incarnation,
            attempt=self.number,
            world_size=self.member.world_size,
            prefix=self.prefix,
            write_time_s=self.begin_time_s,
        )

    def key(self, session: int) -> AttemptKey:
        """Returns the key that every call of the attempt carries."""
        return AttemptKey(
            run=str(RunName.parse(self.run)),
            part=self.part,
            step=self.step,
            session=session,
            incarnation=self.incarnation,
            attempt=self.number,
            world_size=self.member.world_size,
        )

    def failure(self, phase: str, reason: str) -> RankFailure:
        """Returns how this rank says that it cannot finish."""
        return RankFailure(rank=self.member.rank, host=host_name(), phase=phase, reason=encodable(reason))

    @property
    def first_wait_s(self) -> float:
        """How long this rank waits for the others before it looks on storage what keeps them, seconds.

        Longer in a large world: what every rank does every two seconds is thousands of calls a second.
        """
        return min(limits.MAX_WAIT_S, max(_FIRST_WAIT_S, self.member.world_size / _WAITS_A_SECOND))

    def place(self) -> AttemptLocation:
        """Returns where its files are, as every call of the attempt says."""
        return AttemptLocation(location=self.location, prefix=self.prefix)
