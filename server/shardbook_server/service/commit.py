"""Commit and abort of an attempt."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from shardbook.core import limits
from shardbook.errors import (
    InvalidArgumentError,
    InvalidGeometryError,
    NotFoundError,
    RankFailedError,
    RanksMissingError,
    ShardbookError,
)
from shardbook_server.observer import SILENT, Observer
from shardbook_server.service import origins, present
from shardbook_server.service.admission import MemoryBudget
from shardbook_server.service.attempts import closed_error, disagreement, find_current, renew, row_key
from shardbook_server.service.blobs import BlobService
from shardbook_server.service.checks import prose
from shardbook_server.service.closing import commit_attempt, fail_attempt
from shardbook_server.service.describing import NO_DESCRIPTION, Description
from shardbook_server.service.descriptions import full_info
from shardbook_server.service.folding import Folder
from shardbook_server.service.progress import missing_ranks
from shardbook_server.service.types import AttemptKey
from shardbook_server.service.views import CheckpointInfo, CheckpointState
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import registrations as registration_rows
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage.checkpoints import CheckpointRow
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.registrations import RegistrationRow
from shardbook_server.storage.runs import PartRow

#: What was committed once; somebody may have deleted it since.
_PROVED: Final = (CheckpointState.COMMITTED, CheckpointState.DELETED)
#: Longest text of one fact in an error: all of them have to fit into gRPC's metadata.
_FACT_CHARS: Final = 2000


@dataclass(frozen=True)
class _Ready:
    """An attempt in which every rank is there."""

    part: PartRow
    rows: list[RegistrationRow]


class CommitService:
    """Commits attempts in which every rank is there. Thread-safe.

    Unknown structures are assembled outside the transaction, as many at a time as memory is set apart for.
    """

    def __init__(
        self,
        database: Database,
        blobs: BlobService,
        memory: MemoryBudget,
        *,
        lease_ttl_s: float,
        observer: Observer = SILENT,
    ) -> None:
        """Keeps no state of its own."""
        self._database = database
        self._folder = Folder(database, blobs, memory)
        self._lease_ttl_s = lease_ttl_s
        self._observer = observer

    def commit(
        self, key: AttemptKey, description: Description = NO_DESCRIPTION, *, recovered: bool = False
    ) -> CheckpointInfo:
        """Assembles, validates and commits; answers at once, ``RANKS_MISSING`` is for the caller to wait on.

        Committing again returns the same checkpoint.

        Args:
            key: The attempt.
            description: What is said of the checkpoint; of no effect when it is committed already.
            recovered: Past the fence, for RecordCheckpoint alone.

        Raises:
            NotFoundError: No rank of the attempt has spoken yet.
            RanksMissingError: ``metadata`` has ``missing_count``, and ``ranks`` and ``hosts`` (JSON lists) of the
                first 50.
            RankFailedError: A rank reported failure; ``metadata`` has rank, host, phase.
            InvalidGeometryError: The chunks do not make whole tensors; the checkpoint is FAILED now.
            FailedPreconditionError: ``recovered``, and a later session holds the step (``STEP_SUPERSEDED``).
            CheckpointClosedError, SessionFencedError, SessionUnknownError, InvalidArgumentError: As for writes.
        """
        try:
            checkpoint, is_new = self._commit(key, description, recovered=recovered)
        except RanksMissingError:
            # No outcome yet: whoever waits for the ranks asks again.
            raise
        except ShardbookError as error:
            self._observer.commit_ended(error.reason.lower())
            raise
        self._observer.commit_ended("committed" if is_new else "repeated")
        if is_new and recovered:
            self._observer.recorded_late()
        return checkpoint

    def _commit(self, key: AttemptKey, description: Description, *, recovered: bool) -> tuple[CheckpointInfo, bool]:
        """Returns the checkpoint, and whether this call committed it."""
        began_s = time.monotonic()
        with self._phase("read"):
            found = self._prepare(key, recovered=recovered)
        if isinstance(found, CheckpointInfo):
            return found, False
        try:
            with self._phase("fold"):
                folded = self._folder.fold(found.part, found.rows)
        except (InvalidGeometryError, InvalidArgumentError) as error:
            self._refuse(key, error, recovered=recovered)
            raise
        with self._phase("transaction"), self._database.write([key.part_name.run]) as connection:
            now_us = self._database.now_us(connection)
            part, row = _find(connection, key, recovered=recovered)
            is_new = row.state not in _PROVED
            if is_new:
                may_link = origins.lock_for_commit(connection, part.name, row, description.origins)
                self._judge(connection, key, row, now_us, recovered=recovered)
                _require_complete(connection, row)
                commit_attempt(
                    connection,
                    part,
                    row,
                    folded,
                    now_us,
                    recovered=recovered,
                    description=description,
                    took_ms=round((time.monotonic() - began_s) * 1e3),
                    may_link=may_link,
                )
            checkpoint = full_info(connection, row.id, now_us)
        return checkpoint, is_new

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Tells how long the block took, when it ended well."""
        began_s = time.perf_counter()
        yield
        self._observer.commit_phase(name, time.perf_counter() - began_s)

    def _prepare(self, key: AttemptKey, *, recovered: bool) -> CheckpointInfo | _Ready:
        """Reads what is to be committed, or the answer when it is already."""
        with self._database.read() as connection:
            part, row = _find(connection, key, recovered=recovered)
            if row.state in _PROVED:
                return full_info(connection, row.id, self._database.now_us(connection))
            if not recovered:
                _require_current(connection, key)
            _require_open(row)
            _require_complete(connection, row)
            return _Ready(part, registration_rows.read_registrations(connection, row.id))

    def _judge(
        self, connection: Connection, key: AttemptKey, row: CheckpointRow, now_us: int, *, recovered: bool
    ) -> None:
        """Refuses a write to an attempt, under the lock; renews its lease when the session is current."""
        if not recovered:
            renew(connection, [_require_current(connection, key)], now_us, self._lease_ttl_s)
        _require_open(row)

    def _refuse(self, key: AttemptKey, error: ShardbookError, *, recovered: bool) -> None:
        """Turns an attempt FAILED whose geometry is wrong: no retry would make it right."""
        with self._database.write([key.part_name.run]) as connection:
            now_us = self._database.now_us(connection)
            _, row = _find(connection, key, recovered=recovered)
            self._judge(connection, key, row, now_us, recovered=recovered)
            fail_attempt(connection, row, prose(error.message, 2 * limits.MAX_REASON_CHARS), now_us)
        self._observer.attempt_failed()

    def abort(self, key: AttemptKey, reason: str) -> CheckpointInfo:
        """Gives the attempt up: the checkpoint is FAILED. Aborting again returns the same checkpoint.

        Raises:
            NotFoundError: No rank of the attempt has spoken yet.
            CheckpointClosedError: It is committed.
            SessionFencedError, SessionUnknownError: As for writes.
        """
        text = prose(reason, limits.MAX_REASON_CHARS) or "aborted"
        with self._database.write([key.part_name.run]) as connection:
            now_us = self._database.now_us(connection)
            _, row = _find(connection, key)
            if row.state == CheckpointState.COMMITTED:
                raise closed_error(row)
            is_news = row.state != CheckpointState.FAILED
            if is_news:
                renew(connection, [_require_current(connection, key)], now_us, self._lease_ttl_s)
                fail_attempt(connection, row, text, now_us)
            checkpoint = present.checkpoint_info(connection, row.id)
        if is_news:
            self._observer.attempt_failed()
        return checkpoint


def _find(connection: Connection, key: AttemptKey, *, recovered: bool = False) -> tuple[PartRow, CheckpointRow]:
    part = run_rows.find_parts(connection, [key.part_name]).get(key.part_name)
    row = None
    if part is not None:
        natural = row_key(part.id, key)
        row = checkpoint_rows.find_checkpoints(connection, [natural]).get(natural)
    if part is None or row is None:
        if not recovered:
            _require_current(connection, key)
        raise NotFoundError(f"no rank has planned or registered for {key.checkpoint_name.ref} yet")
    mismatch = disagreement(row, key)
    if mismatch is not None:
        raise mismatch
    return part, row


def _require_current(connection: Connection, key: AttemptKey) -> PartRow:
    part = find_current(connection, [key])[key]
    if isinstance(part, ShardbookError):
        raise part
    return part


def _require_open(row: CheckpointRow) -> None:
    """Refuses an attempt that cannot be committed; an expired one that nobody superseded can."""
    if row.state == CheckpointState.FAILED and row.failed_rank is not None:
        raise RankFailedError(
            row.failure,
            metadata={"rank": str(row.failed_rank), "host": row.failed_host or "", "phase": row.failed_phase or ""},
        )
    if not row.staged:
        raise closed_error(row)


def _require_complete(connection: Connection, row: CheckpointRow) -> None:
    """Refuses an attempt in which a rank is missing."""
    if registration_rows.count_registrations(connection, [row.id]).get(row.id, 0) != row.registration_count:
        raise _missing(connection, row)


def _missing(connection: Connection, row: CheckpointRow) -> RanksMissingError:
    named, count = missing_ranks(connection, row)
    shown = ", ".join(f"{one.rank} ({one.host})" if one.host else str(one.rank) for one in named[:10])
    more = f" and {count - 10} more" if count > 10 else ""
    return RanksMissingError(
        f"{count} of {row.registration_count} ranks are not registered: {shown}{more}",
        metadata={
            "missing_count": str(count),
            "ranks": json.dumps([one.rank for one in named], separators=(",", ":")),
            "hosts": _bounded([one.host for one in named]),
        },
    )


def _bounded(hosts: list[str]) -> str:
    """Returns hosts as a JSON list of at most _FACT_CHARS; the last ones become empty where that is too long."""
    text = json.dumps(hosts, separators=(",", ":"))
    while len(text) > _FACT_CHARS:
        last = max(at for at, host in enumerate(hosts) if host)
        hosts = [*hosts[:last], "", *hosts[last + 1 :]]
        text = json.dumps(hosts, separators=(",", ":"))
    return text
