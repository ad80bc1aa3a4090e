"""The call of CatalogService that gives checkpoints other locations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shardbook._transport import Rpc, Transport
from shardbook.catalog import Checkpoint
from shardbook.core.uris import check_no_credentials, check_stays_inside
from shardbook.v1 import locations_pb2

MOVE_CHECKPOINTS = Rpc("MoveCheckpoints", lambda on: on.catalog.MoveCheckpoints)


@dataclass(frozen=True)
class Move:
    """One checkpoint and where it is to be.

    Attributes:
        name: Its full name.
        from_location: Its first location as the caller knows it.
        to_location: Where its files are now.
        keep: Add it behind the others, rather than make it the only one.

    Raises:
        InvalidArgumentError: The location carries credentials (``CREDENTIALS_IN_URI``) or leaves its place.
    """

    name: str
    from_location: str
    to_location: str
    keep: bool = False

    def __post_init__(self) -> None:
        check_no_credentials(self.to_location, "to_location")
        check_stays_inside(self.to_location, "to_location")


class MovingCalls:
    """Where checkpoints are. The call may be made again: the same again changes nothing. Thread-safe."""

    _transport: Transport

    def move_checkpoints(self, moves: Iterable[Move], *, deadline_s: float | None = None) -> list[Checkpoint]:
        """Gives committed checkpoints of one run other locations, all or none; returns them in order.

        Nobody looks whether their files are there: ``shardbook.move`` does, and calls this.

        Args:
            moves: At most 500.
            deadline_s: Seconds for the call.

        Raises:
            NotFoundError: There is no such checkpoint.
            FailedPreconditionError: One is not committed, or was moved meanwhile (``LOCATION_CHANGED``).
            ResourceExhaustedError: One would have more than 8 locations.
        """
        request = locations_pb2.MoveCheckpointsRequest(
            moves=[locations_pb2.CheckpointMove(**vars(one)) for one in moves]
        )
        answer = self._transport.write(MOVE_CHECKPOINTS, request, deadline_s=deadline_s)
        return list(map(Checkpoint.of, answer.checkpoints))


__all__ = ["Move", "MovingCalls"]
