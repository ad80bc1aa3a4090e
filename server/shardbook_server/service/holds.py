"""Holds: a reader's word that it needs a checkpoint for a while, which keeps it from being deleted."""

from __future__ import annotations

from collections.abc import Sequence

from shardbook.core import limits
from shardbook.core.names import CheckpointName, check_segment
from shardbook.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError
from shardbook_server.service import present
from shardbook_server.service.descriptions import full_info
from shardbook_server.service.present import utc
from shardbook_server.service.views import CheckpointInfo, HoldView
from shardbook_server.storage import claims as claim_rows
from shardbook_server.storage import holds as hold_rows
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.holds import HoldRow


class HoldService:
    """Holds and releases checkpoints. Thread-safe."""

    def __init__(self, database: Database) -> None:
        """Keeps no state of its own."""
        self._database = database

    def hold(self, name: str, holder: str, ttl_us: int) -> tuple[CheckpointInfo, HoldView]:
        """Holds a committed checkpoint for some time from now; extends a hold of the same holder, and shortens none.

        Args:
            name: The checkpoint; an alias is held as what it means now.
            holder: Who needs it.
            ttl_us: For how long, microseconds; at most ``limits.MAX_HOLD_S``.

        Raises:
            NotFoundError: There is no such checkpoint, or it was deleted.
            FailedPreconditionError: It is not committed.
            ResourceExhaustedError: Too many hold it.
            InvalidArgumentError: The time or the holder's name is not valid.
        """
        parsed, who = CheckpointName.parse(name, "name"), check_segment(holder, "holder")
        if not 0 < ttl_us <= limits.MAX_HOLD_S * 1_000_000:
            raise InvalidArgumentError(
                f"a hold lasts for more than 0 s and at most {limits.MAX_HOLD_S} s (30 days); extend it before it ends",
                field="ttl",
            )
        with self._database.write([parsed.part.run]) as connection:
            now_us = self._database.now_us(connection)
            row = present.resolve_committed(connection, parsed)
            hold_rows.drop_ended(connection, row.id, now_us)
            held = hold_rows.find_holds(connection, [row.id], now_us).get(row.id, [])
            mine = next((one for one in held if one.holder == who), HoldRow(who, now_us, 0))
            if not mine.expire_time_us and len(held) >= limits.MAX_HOLDS:
                raise ResourceExhaustedError(
                    f"{parsed.ref} has {len(held)} holds, which is the limit", reason="LIMIT_EXCEEDED", field="holder"
                )
            hold = HoldRow(who, mine.create_time_us, max(mine.expire_time_us, now_us + ttl_us))
            hold_rows.put_hold(connection, row.id, hold)
            return full_info(connection, row.id, now_us), HoldView(**vars(hold))

    def release(self, name: str, holder: str) -> CheckpointInfo:
        """Ends a hold; one that is not there is no error.

        Raises:
            NotFoundError: There is no such checkpoint.
            InvalidArgumentError: The holder's name is not valid.
        """
        parsed, who = CheckpointName.parse(name, "name"), check_segment(holder, "holder")
        with self._database.write([parsed.part.run]) as connection:
            checkpoint_id = present.resolve(connection, parsed)
            hold_rows.delete_hold(connection, checkpoint_id, who)
            return full_info(connection, checkpoint_id, self._database.now_us(connection))


def find_holders(connection: Connection, ids: Sequence[int], now_us: int) -> dict[int, tuple[str, ...]]:
    """Returns who keeps some checkpoints from being pruned: holders, and subscriptions whose watchers work on them.

    A watcher that was lost counts for an hour, as one does that is to try again: another one takes its work up.
    """
    found: dict[int, tuple[str, ...]] = {}
    for one, held in hold_rows.find_holds(connection, ids, now_us).items():
        found[one] = tuple(row.holder for row in held)
    held_by = claim_rows.find_held(connection, ids, now_us, lost_us=claim_rows.HELD_WAITING_US)
    for one, watching in held_by.items():
        found[one] = (*found.get(one, ()), *(f"watch {name}" for name in watching))
    return found


def check_not_held(connection: Connection, checkpoint_id: int, name: CheckpointName, now_us: int) -> None:
    """Refuses to delete what somebody holds, or works on; the checkpoint is locked.

    Raises:
        FailedPreconditionError: Somebody does (``CHECKPOINT_HELD``); ``metadata`` has the ``holder``.
    """
    watching = claim_rows.find_held(connection, [checkpoint_id], now_us).get(checkpoint_id)
    if watching:
        raise FailedPreconditionError(
            f"{name.ref} is worked on by watchers of {watching[0]}: `shardbook watch --name {watching[0]} --status` "
            "shows until when",
            reason="CHECKPOINT_HELD",
            metadata={"holder": watching[0]},
        )
    held = hold_rows.find_holds(connection, [checkpoint_id], now_us).get(checkpoint_id)
    if held:
        last = max(held, key=lambda one: one.expire_time_us)
        more = f" and {len(held) - 1} more" if len(held) > 1 else ""
        raise FailedPreconditionError(
            f"{name.ref} is held by {last.holder}{more} until {utc(last.expire_time_us)}; "
            f"`shardbook release {name.ref} --name {last.holder}` ends that",
            reason="CHECKPOINT_HELD",
            metadata={"holder": last.holder},
        )
