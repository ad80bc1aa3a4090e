"""What every write of a save does first: is the session current, which checkpoint is it, does the rest agree.

Called inside a write transaction that holds the lock of the runs; what is judged here stays true until it ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shardbook.errors import (
    CheckpointClosedError,
    InvalidArgumentError,
    SessionFencedError,
    SessionUnknownError,
    ShardbookError,
)
from shardbook_server.service.types import AttemptKey, AttemptLocation, SessionKey
from shardbook_server.service.views import CheckpointState
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage import sessions as session_rows
from shardbook_server.storage.checkpoints import CheckpointRow, NewCheckpoint
from shardbook_server.storage.database import Connection
from shardbook_server.storage.dialect import lock_names
from shardbook_server.storage.runs import PartRow

#: An attempt as a call names it: with the place of its files.
Ask = tuple[AttemptKey, AttemptLocation]


@dataclass(frozen=True)
class Attempt:
    """An attempt that may be written, as far as its session is concerned.

    Attributes:
        part: Its part.
        checkpoint: Its row; the state is for the caller to judge.
    """

    part: PartRow
    checkpoint: CheckpointRow

    @property
    def state(self) -> CheckpointState:
        """Where the checkpoint is in its life."""
        return CheckpointState(self.checkpoint.state)


def open_attempts(
    connection: Connection, asks: Iterable[Ask], now_us: int, lease_ttl_s: float
) -> dict[Ask, Attempt | ShardbookError]:
    """Finds attempts, or opens those that are new; renews their leases, revives the expired.

    Returns:
        An attempt or the error for it, by ask. A few statements in all, however many asks there are.
    """
    verdicts: dict[Ask, Attempt | ShardbookError] = {}
    parts = find_current(connection, [key for key, _ in asks])
    fine: dict[Ask, PartRow] = {}
    for ask in asks:
        judged = parts[ask[0]]
        if isinstance(judged, ShardbookError):
            verdicts[ask] = judged
        else:
            fine[ask] = judged
    rows, clashes = _find_or_open(connection, fine, now_us)
    verdicts |= clashes
    fine = {ask: part for ask, part in fine.items() if ask not in clashes}
    expired = [row.id for row in rows.values() if row.state == CheckpointState.EXPIRED and row.staged]
    if expired:
        # The session is current, so nobody has superseded these: their writers are back.
        checkpoint_rows.reopen(connection, expired)
        rows |= _by_key(checkpoint_rows.find_by_ids(connection, expired).values())
    renew(connection, fine.values(), now_us, lease_ttl_s)
    for (key, location), part in fine.items():
        row = rows[row_key(part.id, key)]
        verdicts[key, location] = disagreement(row, key, location) or Attempt(part, row)
    return verdicts


def find_current(
    connection: Connection, keys: Iterable[AttemptKey | SessionKey]
) -> dict[AttemptKey | SessionKey, PartRow | ShardbookError]:
    """Returns the parts of those keys whose session is the current one, and for the others the error."""
    keys = list(dict.fromkeys(keys))
    parts = run_rows.find_parts(connection, list({key.part_name: None for key in keys}))
    judged: dict[AttemptKey | SessionKey, PartRow | ShardbookError] = {}
    doubtful: dict[AttemptKey | SessionKey, PartRow] = {}
    for key in keys:
        part = parts.get(key.part_name)
        if key.session == 0:
            judged[key] = InvalidArgumentError("session 0 is for recovered attempts", field="session").within("key")
        elif part is None:
            judged[key] = _unknown(key)
        elif part.session == key.session and part.incarnation == key.incarnation:
            judged[key] = part
        else:
            doubtful[key] = part
    known = session_rows.find_incarnations(
        connection, list({(part.id, key.session): None for key, part in doubtful.items()})
    )
    for key, part in doubtful.items():
        is_known = known.get((part.id, key.session)) == key.incarnation
        judged[key] = _fenced(key, part) if is_known else _unknown(key)
    return judged


def renew(connection: Connection, parts: Iterable[PartRow], now_us: int, lease_ttl_s: float) -> None:
    """Renews the leases of parts whose current session just wrote."""
    part_ids = sorted({part.id for part in parts})
    session_rows.renew_leases(connection, part_ids, now_us, now_us + round(lease_ttl_s * 1e6))


def row_key(part_id: int, key: AttemptKey) -> checkpoint_rows.Key:
    """Returns the natural key of an attempt as the table has it."""
    return part_id, key.session, key.step, key.attempt, key.incarnation


def disagreement(
    row: CheckpointRow, key: AttemptKey, location: AttemptLocation | None = None
) -> InvalidArgumentError | None:
    """Returns the error when a call says other things about an attempt than the call that opened it."""
    pairs = [("key.world_size", row.world_size, key.world_size)]
    texts = []
    if location is not None:
        texts = [
            ("location.location", row.location, location.location),
            ("location.prefix", row.prefix, location.prefix),
        ]
        # What is committed may have been moved since its ranks wrote it.
        if row.state == CheckpointState.COMMITTED:
            del texts[0]
    for field, first, now in (*pairs, *texts):
        if first != now:
            return _mismatch(field, first, now)
    return None


def _mismatch(field: str, first: object, now: object) -> InvalidArgumentError:
    """Returns the error for a rank that says another thing about the save than the rank before it."""
    name = field.partition(".")[2]
    return InvalidArgumentError(
        f"the ranks of this save disagree: another one said {name} {first!r}, this one says {now!r}",
        reason="ATTEMPT_MISMATCH",
        field=field,
        metadata={name: str(first)} if field.startswith("key.") else {},
    )


def closed_error(row: CheckpointRow) -> CheckpointClosedError:
    """Returns the error for a write to an attempt that takes none any more."""
    state = CheckpointState(row.state)
    why = f": {row.failure}" if row.failure else ""
    metadata = {"state": state.name}
    if row.failed_rank is not None:
        metadata |= {"rank": str(row.failed_rank), "host": row.failed_host or "", "phase": row.failed_phase or ""}
    return CheckpointClosedError(f"the checkpoint is {state.name} and takes no more writes{why}", metadata=metadata)


def _find_or_open(
    connection: Connection, asks: Mapping[Ask, PartRow], now_us: int
) -> tuple[dict[checkpoint_rows.Key, CheckpointRow], dict[Ask, InvalidArgumentError]]:
    """Returns the rows of attempts, and the asks that clash with an attempt of another step."""
    wanted: dict[checkpoint_rows.Key, NewCheckpoint] = {}
    for (key, location), part in asks.items():
        natural = row_key(part.id, key)
        # The first of a batch opens the attempt; the others are compared with what it said.
        wanted.setdefault(
            natural,
            NewCheckpoint(natural, key.world_size, key.world_size, location.location, location.prefix),
        )
    rows = checkpoint_rows.find_checkpoints(connection, list(wanted))
    absent = [natural for natural in wanted if natural not in rows]
    clashes: dict[Ask, InvalidArgumentError] = {}
    if absent:
        # Whoever opens another step at such a place at the same moment, through another replica, waits and sees it.
        lock_names(connection, {_place_name(part.id, *ask) for ask, part in asks.items()})
        clashes = _clashes(connection, {ask: part for ask, part in asks.items() if row_key(part.id, ask[0]) in absent})
        refused = {row_key(asks[ask].id, ask[0]): error for ask, error in clashes.items()}
        # Whoever else names that attempt, at whatever place, would open it after all.
        keys = {ask: row_key(part.id, ask[0]) for ask, part in asks.items()}
        clashes = {ask: refused[natural] for ask, natural in keys.items() if natural in refused}
        absent = [natural for natural in absent if natural not in refused]
    if absent:
        # Two replicas may do so at once, as both share the run's lock: the second finds what the first stored.
        checkpoint_rows.open_checkpoints(connection, [wanted[natural] for natural in absent], now_us)
        rows |= checkpoint_rows.find_checkpoints(connection, absent)
    return rows, clashes


def _place_name(part_id: int, key: AttemptKey, location: AttemptLocation) -> str:
    who = f"{key.session}/{key.incarnation.hex()}/{key.attempt}"
    return f"place/{part_id}/{who}/{location.prefix}/{location.location}"


def _clashes(connection: Connection, asks: Mapping[Ask, PartRow]) -> dict[Ask, InvalidArgumentError]:
    """Returns the asks for a step whose files would lie where an open attempt of another step has its own.

    An attempt's number is unique in a session and directory, so that is one save whose ranks count steps differently;
    a checkpoint made of both would be torn.
    """
    taken = {
        (row.part_id, row.session, row.incarnation, row.attempt, row.location, row.prefix): row.step
        for row in checkpoint_rows.read_staged(connection, sorted({part.id for part in asks.values()}))
    }
    clashes: dict[Ask, InvalidArgumentError] = {}
    for ask, part in asks.items():
        key, location = ask
        place = (part.id, key.session, key.incarnation, key.attempt, location.location, location.prefix)
        first = taken.setdefault(place, key.step)
        if first != key.step:
            clashes[ask] = _mismatch("key.step", first, key.step)
    return clashes


def _by_key(rows: Iterable[CheckpointRow]) -> dict[checkpoint_rows.Key, CheckpointRow]:
    return {row.key: row for row in rows}


def _unknown(key: AttemptKey | SessionKey) -> SessionUnknownError:
    return SessionUnknownError(
        f"{key.part_name.ref} has no session {key.session} of incarnation {key.incarnation.hex()[:12]}: "
        "start a session first"
    )


def _fenced(key: AttemptKey | SessionKey, part: PartRow) -> SessionFencedError:
    return SessionFencedError(
        f"session {part.session} has taken {key.part_name.ref}; session {key.session} must not write it any more",
        metadata={"session": str(part.session)},
    )
