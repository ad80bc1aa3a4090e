"""Containers, manifests and registration records: exact, and never trusted when damaged."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardbook.core.container import pack_list, read_container, read_index, read_section, unpack_list, write_container
from shardbook.core.manifest import AttemptIdentity, Manifest, RegistrationRecord, StoredBlob
from shardbook.core.structure import BlobKind
from shardbook.errors import CorruptManifestError, InvalidArgumentError

IDENTITY = AttemptIdentity(
    run="llm/8b",
    part="optim",
    step=1500,
    session=3,
    incarnation=bytes(range(16)),
    attempt=2,
    world_size=4,
    prefix="000102030405-a2",
)
BLOBS = (StoredBlob(BlobKind.TABLE, b"t" * 32, b"table"), StoredBlob(BlobKind.PLAN, b"p" * 32, b"plan"))


def record(rank: int = 3) -> RegistrationRecord:
    """A record of one rank."""
    return RegistrationRecord(IDENTITY, rank, b"s" * 32, b"extents", b"", BLOBS, host="node-7")


def manifest() -> Manifest:
    """A manifest with an ugly fqn."""
    digests = (b"s" * 32, b"s" * 32, b"r" * 32, b"s" * 32)
    return Manifest(IDENTITY, b"head", (b"one", b"two"), ("a\0\ud800", ""), (b"segment",), digests, BLOBS, b"header")


def test_a_record_and_a_manifest_come_back() -> None:
    """Field by field."""
    assert record() == RegistrationRecord.from_bytes(record().to_bytes())
    assert manifest() == Manifest.from_bytes(manifest().to_bytes())


@given(st.integers(min_value=0), st.integers(1, 255))
def test_an_altered_file_is_never_taken_for_another(at: int, flip: int) -> None:
    """Each byte counts: a flipped one is CORRUPT_MANIFEST, or the same content read from a spelling of JSON."""
    content = bytearray(manifest().to_bytes())
    content[at % len(content)] ^= flip
    try:
        read = Manifest.from_bytes(bytes(content))
    except CorruptManifestError as error:
        assert error.reason == "CORRUPT_MANIFEST"
    else:
        assert manifest() == read


def test_every_truncation_is_refused() -> None:
    """A torn write never reads as a shorter manifest."""
    content = record().to_bytes()
    for size in range(len(content)):
        with pytest.raises(CorruptManifestError):
            RegistrationRecord.from_bytes(content[:size])


def test_a_record_is_no_manifest() -> None:
    """The kind is part of the file."""
    with pytest.raises(CorruptManifestError, match="not a manifest"):
        Manifest.from_bytes(record().to_bytes())


def test_a_section_can_be_read_by_its_range() -> None:
    """The index is in front, with absolute offsets and checksums."""
    content = write_container("test", {"a": b"aaa", "b": b"bb"})
    section = read_index(content, "test")["b"]
    assert b"bb" == content[section.offset : section.offset + section.size_bytes]
    assert b"bb" == read_section(content, section, "b")
    assert {"a": b"aaa", "b": b"bb"} == read_container(content, "test")


@given(st.lists(st.binary(max_size=9), max_size=9))
@example([b""] * 4)
@example([b""] * 500)
def test_lists_of_payloads_come_back(items: list[bytes]) -> None:
    """Also empty ones."""
    assert items == unpack_list(pack_list(items))


@pytest.mark.parametrize(
    "change",
    [
        {"world_size": 0},
        {"attempt": 0},
        {"step": -1},
        {"step": 2**63},
        {"incarnation": b"x"},
        {"run": "llm"},
        {"run": "../8b"},
        {"part": "a/b"},
        {"prefix": ""},
        {"prefix": "../../elsewhere"},
        {"prefix": "/etc"},
        {"prefix": "ffffffffffff-a1"},
        {"write_time_s": float("nan")},
    ],
)
def test_an_impossible_identity_is_refused(change: dict[str, object]) -> None:
    """The error names the field."""
    with pytest.raises(InvalidArgumentError) as caught:
        AttemptIdentity(
            **{"run": "llm/8b", "incarnation": bytes(range(16)), "prefix": "000102030405-a1", **change}  # type: ignore[arg-type]
        )
    assert caught.value.violations[0].field == next(iter(change))


def test_a_rank_beyond_the_world_is_refused() -> None:
    """Ranks run from 0 to world_size - 1."""
    with pytest.raises(InvalidArgumentError):
        record(rank=4)
