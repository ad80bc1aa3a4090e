"""What one rank tells the service about an attempt, and the same as a registration record on storage."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from shardbook.breaker import SaveBudget
from shardbook.client import Client
from shardbook.core import limits
from shardbook.core.columns import BoolArray
from shardbook.core.extents import Extents, encode_extents, encode_volatile
from shardbook.core.manifest import RegistrationRecord, StoredBlob
from shardbook.core.structure import BlobKind, RankPlan, RankStructure, encode_plan, encode_structure
from shardbook.core.table import encode_table
from shardbook.dcp.attempt import Attempt
from shardbook.dcp.runtime import Runtime
from shardbook.dcp.session import host_name
from shardbook.errors import InvalidArgumentError, ShardbookError
from shardbook.recording import blob_source, message_of, registration_of
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1 import types_pb2
from shardbook.v1.types_pb2 import AttemptKey, Blob, RankFailure

_LOG = logging.getLogger(__name__)

#: What telling the service about a failure may take, seconds.
REPORT_S: Final = 5.0
#: Kind and digest of a blob.
BlobKey = tuple[int, bytes]


@dataclass(frozen=True, eq=False)
class EncodedPlan:
    """A plan and its table, ready to send.

    Attributes:
        table: Blob of the table.
        plan: Blob of the plan.
        item_count: Items of the plan.
    """

    table: StoredBlob
    plan: StoredBlob
    item_count: int

    @classmethod
    def of(cls, plan: RankPlan) -> EncodedPlan:
        """Encodes ``plan``."""
        table = encode_table(plan.table)
        encoded = encode_plan(plan, table.digest)
        return cls(
            StoredBlob(BlobKind.TABLE, table.digest, table.payload),
            StoredBlob(BlobKind.PLAN, encoded.digest, encoded.payload),
            plan.item_count,
        )


def make_record(
    attempt: Attempt,
    session: int,
    plan: EncodedPlan,
    structure: RankStructure,
    extents: Extents,
    volatile: tuple[BoolArray, BoolArray],
    said: bytes = b"",
) -> RegistrationRecord:
    """Returns all that this rank has to tell about an attempt, once its data is on storage."""
    encoded = encode_structure(structure, plan.plan.digest)
    return RegistrationRecord(
        identity=attempt.identity(session),
        rank=attempt.member.rank,
        structure_digest=encoded.digest,
        extents=extents_as_sent(extents),
        volatile=encode_volatile(*volatile),
        blobs=(plan.table, plan.plan, StoredBlob(BlobKind.STRUCTURE, encoded.digest, encoded.payload)),
        host=host_name(),
        said=said,
    )


def extents_as_sent(extents: Extents) -> bytes:
    """Returns extents as sent; without their checksums where those might keep a save out of the catalogue."""
    payload = encode_extents(extents)
    if extents.checksums is None or len(payload) <= limits.MAX_CHECKED_EXTENTS_BYTES:
        return payload
    _LOG.warning("checksums of %d items are more than one registration may hold: none are kept", extents.item_count)
    return encode_extents(dataclasses.replace(extents, checksums=None))


class Submitter:
    """Makes a rank's calls about one attempt. Several threads may register for others at a time.

    Args:
        client: The server, charged to the save.
        attempt: The attempt.
        session: Number of the session.
        known: Blobs that the server is known to have; grows with every call, kept by the caller from save to save.
    """

    def __init__(self, client: Client, attempt: Attempt, session: int, known: set[BlobKey]) -> None:
        self._known = known
        self.client = client
        self.attempt = attempt
        self.session = session
        self.key = attempt.key(session)

    def plan(self, plan: EncodedPlan, *, to_lowest_rank: bool, timeout_s: float) -> BoolArray | None:
        """Returns which items of the plan other ranks write, (N,); None when that was not decided in time.

        Raises:
            ShardbookError: What the server answered, or that it did not.
        """
        request = pb.PlanSaveRequest(
            key=self.key,
            location=self.attempt.place(),
            rank=self.attempt.member.rank,
            plan_digest=plan.plan.digest,
            host=host_name(),
            save_to_lowest_rank=to_lowest_rank,
            blobs=self._unasked((plan.table, plan.plan)),
        )
        answer = self.client.plan_until_decided(request, blob_source((plan.table, plan.plan)), timeout_s=timeout_s)
        self._known.update(_key(blob) for blob in (plan.table, plan.plan))
        if answer.state != pb.PlanSaveResponse.STATE_DECIDED:
            return None
        return _dropped(answer.drop, plan.item_count)

    def register(
        self, record: RegistrationRecord, *, wait_s: float = 0.0, phase_ms: Sequence[int] = ()
    ) -> types_pb2.Checkpoint | None:
        """Registers what a rank wrote: this one, or another one whose record was found on storage.

        Args:
            record: What it wrote.
            wait_s: How long to wait for the attempt to be closed, in the same call, seconds.
            phase_ms: What this rank took to plan, to write and to leave its record, milliseconds.

        Returns:
            The checkpoint when it was closed in that time.

        Raises:
            ShardbookError: What the server answered, or that it did not.
        """
        request = pb.RegisterShardsRequest(
            key=self.key,
            location=self.attempt.place(),
            registration=registration_of(record, phase_ms),
            host=record.host,
            blobs=self._unasked(record.blobs),
        )
        answer = self.client.register_shards(request, blob_source(record.blobs), wait_s=wait_s)
        self._known.update(_key(blob) for blob in record.blobs)
        return answer.checkpoint if answer.HasField("checkpoint") else None

    def failure(self, phase: str, reason: str) -> RankFailure:
        """Returns how this rank says that it cannot finish."""
        return self.attempt.failure(phase, reason)

    def report(self, failure: RankFailure, deadline_s: float, *, about: ShardbookError | None = None) -> None:
        """Says that a rank cannot finish: this one, or one that has no route to the service.

        Args:
            failure: Which, where and why.
            deadline_s: Seconds for the call.
            about: Why it cannot, where the ranks disagree about their save: what it says of the others' is what fails.

        Raises:
            ShardbookError: What the server answered, or that it did not.
        """
        key = AttemptKey()
        key.CopyFrom(self.key)
        for name in ("step", "world_size"):
            if about is not None and name in about.metadata:
                setattr(key, name, int(about.metadata[name]))
        self.client.report_failure(
            pb.ReportFailureRequest(key=key, location=self.attempt.place(), failure=failure),
            deadline_s=deadline_s,
        )

    def _unasked(self, blobs: Sequence[StoredBlob]) -> list[Blob]:
        """Small blobs that are new to this process."""
        new = (blob for blob in blobs if _key(blob) not in self._known)
        return [message_of(blob) for blob in new if len(blob.payload) <= limits.SMALL_BLOB_BYTES]


def connect(runtime: Runtime, attempt: Attempt, budget: SaveBudget) -> Submitter | None:
    """Returns the way to the service, with the number of the session; None when the service is not to be asked.

    Raises:
        ShardbookError: What the server answered, or that it did not.
    """
    client = runtime.client(budget)
    if client is None:
        return None
    return Submitter(client, attempt, runtime.session_number(attempt.part, client), runtime.known_blobs)


def _key(blob: StoredBlob) -> BlobKey:
    return int(blob.kind), blob.digest


def _dropped(bitmap: bytes, item_count: int) -> BoolArray:
    """(N,) decision bits, most significant bit first; an empty bitmap drops nothing."""
    if not bitmap:
        return np.zeros(item_count, dtype=np.bool_)
    if len(bitmap) != (item_count + 7) // 8:
        raise InvalidArgumentError(f"a decision of {len(bitmap)} bytes for {item_count} items", field="drop")
    return np.unpackbits(np.frombuffer(bitmap, dtype=np.uint8), count=item_count).astype(np.bool_)
