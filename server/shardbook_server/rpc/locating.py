"""Moves of checkpoints, as messages and as the service's dataclasses."""

from __future__ import annotations

from shardbook.core import limits
from shardbook.errors import InvalidArgumentError
from shardbook.v1 import locations_pb2
from shardbook_server.rpc.convert import within
from shardbook_server.service.locations import Move


def moves(request: locations_pb2.MoveCheckpointsRequest) -> list[Move]:
    """Returns what MoveCheckpoints asks."""
    if len(request.moves) > limits.MAX_MOVES:
        raise InvalidArgumentError(
            f"{len(request.moves)} moves, the limit is {limits.MAX_MOVES} a call",
            reason="LIMIT_EXCEEDED",
            field="moves",
        )
    result = []
    for at, one in enumerate(request.moves):
        with within(f"moves[{at}]"):
            result.append(Move(one.name, one.from_location, one.to_location, one.keep))
    return result
