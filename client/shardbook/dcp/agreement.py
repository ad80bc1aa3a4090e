"""The two things that ranks say to each other in ``init``: that none of them has failed, and what rank 0 was told.

A rank that fails before a collective and does not take part in it leaves the others waiting for as long as the process
group allows. So whatever happens on a rank happens before or after it, never instead of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from shardbook.dcp._torch import highest
from shardbook.dcp.runtime import is_distributed
from shardbook.errors import InternalError, ShardbookError

T = TypeVar("T")


def agreed(begin: Callable[[], T], process_group: dist.ProcessGroup | None) -> T:
    """Returns what ``begin`` does on this rank, once it has worked on every rank of the group.

    Raises:
        ShardbookError: It failed on this rank, or on another one, which is named.
    """
    if not _are_several(process_group):
        return begin()
    rank, world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
    begun: list[T] = []
    mine: BaseException | None = None
    try:
        begun.append(begin())
    except BaseException as error:  # noqa: BLE001 - raised below, once the others know
        mine = error
    failed = highest(0 if mine is None else world_size - rank, process_group)
    if failed:
        source = world_size - failed
        told: list[Any] = [_as_told(mine, rank)]
        dist.broadcast_object_list(told, src=_global_rank(process_group, source), group=process_group)
        raise told[0] if mine is None else mine
    return begun[0]


def from_rank(source: int, make: Callable[[], T], process_group: dist.ProcessGroup | None) -> T:
    """Returns on every rank of the group what ``make`` returns on one of them; its failure is raised on all.

    Raises:
        ShardbookError: What ``make`` raised, or what stands for it on the other ranks.
    """
    if not _are_several(process_group):
        return make()
    mine: BaseException | None = None
    told: list[Any] = [None]
    if dist.get_rank(process_group) == source:
        try:
            told[0] = make()
        except BaseException as error:  # noqa: BLE001 - raised below, once the others know
            mine = error
            told[0] = error if isinstance(error, ShardbookError) else _as_told(error, source)
    dist.broadcast_object_list(told, src=_global_rank(process_group, source), group=process_group)
    if mine is not None:
        raise mine
    if isinstance(told[0], ShardbookError):
        raise told[0]
    result: T = told[0]
    return result


def _are_several(process_group: dist.ProcessGroup | None) -> bool:
    """True when this process is one of several in the group."""
    return is_distributed() and dist.get_rank(process_group) >= 0 and dist.get_world_size(process_group) > 1


def _global_rank(process_group: dist.ProcessGroup | None, rank: int) -> int:
    return rank if process_group is None else dist.get_global_rank(process_group, rank)


def _as_told(error: BaseException | None, rank: int) -> ShardbookError:
    """Returns what a rank's failure is to the others: the same kind of error, with the rank's name on it."""
    if isinstance(error, ShardbookError):
        metadata = {**error.metadata, "rank": str(rank)}
        return type(error)(
            f"on rank {rank}: {error.message}", reason=error.reason, violations=error.violations, metadata=metadata
        )
    return InternalError(f"rank {rank} could not start the session: {type(error).__name__}: {error}")
