"""The calls of MetadataService and CatalogService: what loaders, people and tools ask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardbook._patterns import listing_place
from shardbook._targets import resource_name
from shardbook._transport import Rpc, StreamRpc, Transport
from shardbook.catalog import Checkpoint, Run, TensorInfo
from shardbook.core.digest import digest_of
from shardbook.core.limits import MAX_PAGE_SIZE
from shardbook.core.names import CheckpointName, RunName, check_segment
from shardbook.core.texts import encode_name
from shardbook.errors import InternalError, InvalidArgumentError, NotFoundError
from shardbook.status import RunStatus, ServerInfo
from shardbook.v1 import catalog_pb2, metadata_pb2, registration_pb2
from shardbook.v1.types_pb2 import Checkpoint as CheckpointMessage

# What takes numpy is imported where it is asked for: most commands ask for none of it, and a person waits.
if TYPE_CHECKING:
    from shardbook.chunks import CheckpointChunks
    from shardbook.core.wanted import Wanted
    from shardbook.stored_metadata import StoredMetadata

GET_METADATA = StreamRpc("GetMetadata", lambda on: on.metadata.GetMetadata)
QUERY_CHUNKS = Rpc("QueryChunks", lambda on: on.metadata.QueryChunks)
LIST_TENSORS = Rpc("ListTensors", lambda on: on.metadata.ListTensors)
GET_SERVER_INFO = Rpc("GetServerInfo", lambda on: on.metadata.GetServerInfo)
GET_RUN_STATUS = Rpc("GetRunStatus", lambda on: on.registration.GetRunStatus)
GET_RUN = Rpc("GetRun", lambda on: on.catalog.GetRun)
LIST_RUNS = Rpc("ListRuns", lambda on: on.catalog.ListRuns)
GET_CHECKPOINT = Rpc("GetCheckpoint", lambda on: on.catalog.GetCheckpoint)
LIST_CHECKPOINTS = Rpc("ListCheckpoints", lambda on: on.catalog.ListCheckpoints)


@dataclass(frozen=True, eq=False)
class ChunkPages:
    """An answer to ``QueryChunks`` as it came, in pages.

    Attributes:
        checkpoint: The checkpoint that was meant.
        metadata_header: Payload of ``shardbook.core.head``.
        found: Payloads of ``shardbook.core.found``, those too that were held; empty where nothing was found.
        places: Payloads of ``shardbook.core.places``, likewise.
        is_apart: False from a server that does not know ``places``: ``found`` is the whole answer.
    """

    checkpoint: CheckpointMessage
    metadata_header: bytes
    found: list[bytes]
    places: list[bytes]
    is_apart: bool


class ReadingCalls:
    """Metadata and catalogue calls of a client. Thread-safe.

    A run is named ``project/run`` or ``projects/{project}/runs/{run}``, a checkpoint by a ref (``project/run@1500``,
    ``@1500.s3``, ``@latest``, ``project/run:part@...``), a ``Ref`` or its resource name. Lists are fetched a page at a
    time while they are iterated; ``deadline_s`` is for each page.
    """

    _transport: Transport

    def get_metadata(
        self,
        name: CheckpointName | str,
        fqn_prefix: str | bytes = b"",
        *,
        show_deleted: bool = False,
        deadline_s: float | None = None,
    ) -> StoredMetadata:
        """Returns the metadata of a committed checkpoint, all of it or the entries whose fqn starts with a prefix.

        With ``show_deleted`` also that of one that was deleted and not purged yet.

        Raises:
            NotFoundError: There is no such checkpoint, or it is not committed.
        """
        return self._get_metadata(name, fqn_prefix, show_deleted=show_deleted, deadline_s=deadline_s)

    def _get_metadata(
        self,
        name: CheckpointName | str,
        fqn_prefix: str | bytes = b"",
        *,
        held_digest: bytes = b"",
        show_deleted: bool = False,
        deadline_s: float | None = None,
    ) -> StoredMetadata:
        """Does the same; without head and blocks where the checkpoint's structure has the digest that is held."""
        request = metadata_pb2.GetMetadataRequest(
            name=resource_name(name),
            fqn_prefix=_prefix(fqn_prefix),
            held_structure_digest=held_digest,
            show_deleted=show_deleted,
        )
        return _stored(self._transport.collect(GET_METADATA, request, deadline_s=deadline_s))

    def query_chunks(
        self,
        name: CheckpointName | str,
        wanted: Wanted,
        *,
        include_head: bool = False,
        deadline_s: float | None = None,
    ) -> CheckpointChunks:
        """Returns the chunks of a committed checkpoint that meet the wanted boxes, and where their bytes are.

        Names that the checkpoint lacks are no error: ``found.found`` says which ones it has.

        Args:
            name: The checkpoint.
            wanted: Tensors and boxes.
            include_head: Fetch the key paths of all entries, too.
            deadline_s: Seconds for each call; nearly always it is one.

        Raises:
            NotFoundError: There is no such checkpoint.
            FailedPreconditionError: It is not committed.
            InvalidArgumentError: A box does not fit its tensor, and the tensor's shape was not stated; or the question
                is larger than the 4 MiB of one call.
        """
        from shardbook.core.wanted import encode_wanted

        request = metadata_pb2.QueryChunksRequest(
            name=resource_name(name), wanted=encode_wanted(wanted), include_head=include_head
        )
        return _found(wanted, self._pages(request, deadline_s))

    def _query_apart(
        self, name: CheckpointName | str, wanted: bytes, held: Sequence[bytes], *, deadline_s: float | None = None
    ) -> ChunkPages:
        """Returns an answer in its two pieces, see ``shardbook.core.places``.

        Args:
            name: The checkpoint.
            wanted: Payload of the question.
            held: Pages of ``found`` that another checkpoint was answered with; they are not sent again.
            deadline_s: Seconds for each call.
        """
        from shardbook.core.columns import unframe

        digests = [digest_of(unframe(page)) if page else b"" for page in held]
        request = metadata_pb2.QueryChunksRequest(name=resource_name(name), wanted=wanted, apart=True)
        pages = self._pages(request, deadline_s, digests)
        by_digest = dict(zip(digests, held, strict=True))
        return ChunkPages(
            checkpoint=pages[0].checkpoint,
            metadata_header=pages[0].metadata_header,
            found=[page.found or by_digest.get(page.found_digest, b"") for page in pages],
            places=[page.places for page in pages],
            is_apart=all(page.found_digest for page in pages),
        )

    def _pages(
        self,
        request: metadata_pb2.QueryChunksRequest,
        deadline_s: float | None,
        held_digests: Sequence[bytes] = (),
    ) -> list[metadata_pb2.QueryChunksResponse]:
        """Returns all pages of an answer; ``held_digests`` are of pages that need not be sent, in their order."""
        pages: list[metadata_pb2.QueryChunksResponse] = []
        while not pages or pages[-1].next_page_token:
            if pages:
                # `latest` may mean another checkpoint by now.
                request.name, request.page_token = pages[0].checkpoint.name, pages[-1].next_page_token
            request.held_found_digest = held_digests[len(pages)] if len(pages) < len(held_digests) else b""
            pages.append(self._transport.call(QUERY_CHUNKS, request, deadline_s=deadline_s))
        return pages

    def list_tensors(
        self,
        name: CheckpointName | str,
        fqn_prefix: str | bytes = b"",
        *,
        page_size: int = MAX_PAGE_SIZE,
        deadline_s: float | None = None,
    ) -> Iterator[TensorInfo]:
        """Yields the entries of a committed checkpoint in state-dict order.

        Raises:
            NotFoundError: There is no such checkpoint, or it is not committed.
        """
        request = metadata_pb2.ListTensorsRequest(
            parent=resource_name(name), page_size=page_size, fqn_prefix=_prefix(fqn_prefix)
        )
        for page in self._transport.pages(LIST_TENSORS, request, deadline_s=deadline_s):
            yield from map(TensorInfo.of, page.tensors)

    def get_run(self, run: RunName | str, *, deadline_s: float | None = None) -> Run:
        """Returns a run.

        Raises:
            NotFoundError: There is no such run.
        """
        name = run if isinstance(run, RunName) else RunName.parse(run)
        request = catalog_pb2.GetRunRequest(name=str(name))
        return Run.of(self._transport.call(GET_RUN, request, deadline_s=deadline_s).run)

    def get_server_info(self, *, deadline_s: float | None = None) -> ServerInfo:
        """Returns who answers: release, kind of database, and the time there."""
        request = metadata_pb2.GetServerInfoRequest()
        return ServerInfo.of(self._transport.call(GET_SERVER_INFO, request, deadline_s=deadline_s))

    def get_run_status(
        self, run: RunName | str, part: str | None = None, *, deadline_s: float | None = None
    ) -> RunStatus:
        """Returns where the saves of a run stand: what is open and who is missing, and the last commit.

        Args:
            run: The run.
            part: One part; None for all.
            deadline_s: Seconds for the call.

        Raises:
            NotFoundError: There is no such run or part.
        """
        name = run if isinstance(run, RunName) else RunName.parse(run)
        request = registration_pb2.GetRunStatusRequest(run=str(name), part=part or "")
        return RunStatus.of(name.ref, self._transport.call(GET_RUN_STATUS, request, deadline_s=deadline_s))

    def list_runs(
        self, project: str | None = None, *, page_size: int = MAX_PAGE_SIZE, deadline_s: float | None = None
    ) -> Iterator[Run]:
        """Yields the runs of a project, or of all projects, by name."""
        parent = "projects/-" if project is None else f"projects/{check_segment(project, 'project')}"
        request = catalog_pb2.ListRunsRequest(parent=parent, page_size=page_size)
        for page in self._transport.pages(LIST_RUNS, request, deadline_s=deadline_s):
            yield from map(Run.of, page.runs)

    def get_checkpoint(
        self, name: CheckpointName | str, *, show_deleted: bool = False, deadline_s: float | None = None
    ) -> Checkpoint:
        """Returns a checkpoint.

        Args:
            name: The checkpoint; by its full name also one that was deleted.
            show_deleted: One that was deleted by any other name, too.
            deadline_s: Seconds for each call.

        Raises:
            NotFoundError: There is no such checkpoint.
        """
        request = catalog_pb2.GetCheckpointRequest(name=resource_name(name))
        try:
            return Checkpoint.of(self._transport.call(GET_CHECKPOINT, request, deadline_s=deadline_s).checkpoint)
        except NotFoundError as error:
            if not show_deleted or error.reason != "CHECKPOINT_DELETED":
                raise
            return self.get_checkpoint(error.metadata["name"], deadline_s=deadline_s)

    def list_checkpoints(
        self,
        run: RunName | str,
        *,
        part: str | None = None,
        show_all: bool = False,
        filter: str = "",  # noqa: A002 - its name in the API
        order_by: str = "",
        page_size: int = MAX_PAGE_SIZE,
        deadline_s: float | None = None,
    ) -> Iterator[Checkpoint]:
        """Yields the checkpoints of a run, or of all runs that a pattern names.

        Args:
            run: ``project/run``; ``*`` stands for anything: ``llm/*``, ``llm/8b-*``, ``*/*``.
            part: One part; None for all.
            show_all: True for open, failed, expired and superseded attempts too.
            filter: Which of them: ``metrics.val_loss < 2 AND labels.stage = "eval"``, see docs/filters.md.
            order_by: Fields to order by: ``metrics.val_loss desc, step``. By default the newest session and step come
                first in one run, and the newest in several.
            page_size: Checkpoints a call, at most 1,000.
            deadline_s: Seconds for each page.

        Raises:
            NotFoundError: There is no such run; a pattern may name none.
            InvalidArgumentError: The filter or order cannot be read; ``metadata`` has the ``position``.
        """
        place, conditions = listing_place(run, part)
        request = catalog_pb2.ListCheckpointsRequest(
            parent=place,
            page_size=page_size,
            show_all=show_all,
            # AND binds least, and the caller's filter comes first: positions in errors are right.
            filter=" AND ".join([*([filter] if filter.strip() else []), *conditions]),
            order_by=order_by,
        )
        for page in self._checkpoint_pages(request, deadline_s):
            yield from map(Checkpoint.of, page)

    def _checkpoint_pages(
        self, request: catalog_pb2.ListCheckpointsRequest, deadline_s: float | None = None
    ) -> Iterator[Sequence[CheckpointMessage]]:
        """Yields checkpoints as they came, a page at a time: for who adds up 100,000 of them."""
        for page in self._transport.pages(LIST_CHECKPOINTS, request, deadline_s=deadline_s):
            yield page.checkpoints


def _prefix(fqn_prefix: str | bytes) -> bytes:
    return fqn_prefix if isinstance(fqn_prefix, bytes) else encode_name(fqn_prefix)


def _found(wanted: Wanted, pages: list[metadata_pb2.QueryChunksResponse]) -> CheckpointChunks:
    """Puts the pages of an answer together; raises InternalError when they are damaged."""
    from shardbook.chunks import CheckpointChunks
    from shardbook.core.found import decode_part, merge

    try:
        found = merge(wanted, [decode_part(page.found) for page in pages if page.found])
    except InvalidArgumentError as error:
        raise InternalError(f"the server's answer cannot be read: {error}", reason="MALFORMED_ANSWER") from error
    first = pages[0]
    place, name = first.checkpoint.location, first.checkpoint.name
    others = tuple(first.checkpoint.other_locations)
    return CheckpointChunks(found, place.location, place.prefix, first.metadata_header, first.head, name, others)


def _stored(messages: list[metadata_pb2.GetMetadataResponse]) -> StoredMetadata:
    """Puts the messages of a stream together; raises InternalError when the header is not there."""
    from shardbook.stored_metadata import StoredMetadata

    header: metadata_pb2.MetadataHeader | None = None
    segments: list[tuple[int, bytes]] = []
    blocks: list[bytes] = []
    for message in messages:
        content = message.WhichOneof("content")
        if content == "header":
            header = message.header
        elif content == "extents":
            segments.append((message.extents.first_rank, message.extents.payload))
        elif content == "block":
            blocks.extend(message.block.entries)
    if header is None:
        raise InternalError("the server streamed metadata without a header", reason="MALFORMED_STREAM")
    checkpoint = CheckpointMessage()
    checkpoint.CopyFrom(header.checkpoint)
    return StoredMetadata(
        checkpoint=checkpoint,
        head=header.head,
        metadata_header=header.metadata_header,
        segments=tuple(segments),
        blocks=blocks,
    )
