"""GetMetadata and ListTensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from shardbook.core.blocks import block_fqn, decode_blocks
from shardbook.core.extents import Extents, decode_segment, encode_extents
from shardbook.core.head import decode_head
from shardbook.core.locate import locate
from shardbook.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from shardbook_server.service.services import Services
from shardbook_server.service.views import BlockView, HeaderView, MetadataView, SegmentView, TensorView
from shardbook_server.storage.database import Database
from tests.behaviour.service.saves import Job, Model, RankBlobs, blobs_of, whole


@pytest.fixture
def wide(services: Services) -> Job:
    """A job of 600 ranks: three segments."""
    job = Job(services, Model(600, sharded=2), run="projects/llm/runs/wide")
    job.start()
    return job


def read(services: Services, name: str, prefix: bytes = b"") -> list[MetadataView]:
    """The whole stream."""
    return list(services.metadata.get_metadata(name, prefix))


def test_the_stream_is_header_extents_blocks(job: Job) -> None:
    """In this order, complete, in state-dict order."""
    job.save(1)
    header, segment, block = read(job.services, "llm/8b@1")
    assert isinstance(header, HeaderView)
    assert isinstance(segment, SegmentView)
    assert isinstance(block, BlockView)
    assert job.services.catalog.get_attempt(header.checkpoint.checkpoint_id) == header.checkpoint
    assert job.services.catalog.get_checkpoint("llm/8b@1").name == header.checkpoint.name
    assert 0 == segment.first_rank
    assert ["model.w0", "model.w1", "model.w2", "model.norm", "extra"] == [block_fqn(one) for one in block.entries]


def test_what_is_read_says_where_every_byte_lies(job: Job) -> None:
    """Structure and extents joined again: starts follow from the lengths before them."""
    job.save(1)
    header, segment, block = read(job.services, "llm/8b@1")
    assert isinstance(header, HeaderView)
    assert isinstance(segment, SegmentView)
    assert isinstance(block, BlockView)
    head = decode_head(header.head)
    structure = decode_blocks(block.entries, head.rank_files)
    located = locate(structure, decode_segment(segment.payload))
    assert [0, 0, 1532, 1532, 3064, 3064, 4596, 6112] == located.start.tolist()
    assert [1532] * 6 + [1516, 900] == located.length.tolist()
    assert ["__0_0.distcp", "__1_0.distcp"] == [head.rank_files.path(rank, 0) for rank in range(2)]


def test_segments_hold_256_ranks_each(wide: Job) -> None:
    """A big world's extents come in several."""
    ranks = [blobs_of(wide.model, rank) for rank in range(600)]
    wide.register(1, ranks)
    wide.commit(1)
    segments = [one for one in read(wide.services, "llm/wide@1") if isinstance(one, SegmentView)]
    assert [0, 256, 512] == [segment.first_rank for segment in segments]
    pairs = [pair for segment in segments for pair in decode_segment(segment.payload)]
    assert [(blobs.extents, b"") for blobs in ranks] == pairs


@pytest.mark.parametrize(
    ("prefix", "fqns"),
    [(b"model.w", ["model.w0", "model.w1", "model.w2"]), (b"extra", ["extra"]), (b"nothing", [])],
)
def test_a_prefix_selects_entries(job: Job, prefix: bytes, fqns: list[str]) -> None:
    """Exact bytes, as fqns are any text."""
    job.save(1)
    blocks = [one for one in read(job.services, "llm/8b@1", prefix) if isinstance(one, BlockView)]
    assert fqns == [block_fqn(entry) for block in blocks for entry in block.entries]


def test_no_transaction_is_open_between_items(job: Job, database: Database) -> None:
    """A slow reader holds no connection and no snapshot."""
    job.save(1)
    stream: Iterator[MetadataView] = job.services.metadata.get_metadata("llm/8b@1")
    for _ in stream:
        assert 0 == database.checked_out()


def test_what_is_not_committed_cannot_be_read(job: Job) -> None:
    """Readers see the whole or nothing."""
    job.register(1, whole(job.model))
    with pytest.raises(FailedPreconditionError) as caught:
        read(job.services, "llm/8b@1.s1.a1")
    assert "NOT_COMMITTED" == caught.value.reason
    with pytest.raises(NotFoundError):
        read(job.services, "llm/8b@1")
    with pytest.raises(InvalidArgumentError):
        read(job.services, "llm/8b")


def test_tensors_are_listed_for_people(job: Job) -> None:
    """With shape, dtype, chunks and the bytes they take."""
    job.save(1)
    page = job.services.metadata.list_tensors("llm/8b@1")
    assert (5, "") == (page.total_size, page.next_page_token)
    assert TensorView(b"model.w0", "float32", (4, 4), 2, 3064, tensor=True) == page.items[0]
    assert TensorView(b"model.norm", "float32", (4,), 1, 1516, tensor=True) == page.items[3]
    assert TensorView(b"extra", "", (), 1, 900, tensor=False) == page.items[4]


def explicit(blobs: RankBlobs) -> RankBlobs:
    """The same registration with lengths and starts given, as writers that transform their streams do."""
    lengths = np.array([100, 200, 300, 400, 500], np.int64)
    return replace(blobs, extents=encode_extents(Extents(lengths=lengths, starts=np.cumsum(lengths) - lengths)))


def test_given_lengths_count_where_they_were_given(job: Job) -> None:
    """Bytes of a tensor are those of its extents, not the expected ones."""
    job.register(1, [explicit(blobs) for blobs in whole(job.model)])
    assert 3000 == job.commit(1).size_bytes
    sizes = [tensor.size_bytes for tensor in job.services.metadata.list_tensors("llm/8b@1").items]
    assert [200, 400, 600, 400, 500] == sizes


def test_pages_of_tensors_stay_with_their_checkpoint(job: Job) -> None:
    """A token that began at ``latest`` goes on with the same checkpoint when ``latest`` has moved."""
    job.save(1)
    tensors = job.services.metadata.list_tensors
    first = tensors("llm/8b@latest", page_size=3)
    job.model = Model(2, sharded=9)
    job.save(2)
    second = tensors("llm/8b@latest", page_size=3, page_token=first.next_page_token)
    assert [b"model.norm", b"extra"] == [tensor.fqn for tensor in second.items]
    assert (5, "") == (second.total_size, second.next_page_token)
    assert 11 == tensors("llm/8b@latest").total_size


def test_a_prefix_counts_what_it_selects(job: Job) -> None:
    """``total_size`` is about the listing, not the checkpoint."""
    job.save(1)
    page = job.services.metadata.list_tensors("llm/8b@1", fqn_prefix=b"model.w", page_size=2)
    assert ([b"model.w0", b"model.w1"], 3) == ([tensor.fqn for tensor in page.items], page.total_size)
