"""What may stand at the end of an edge, and how origins travel in records and manifests."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardbook.core import limits
from shardbook.core.description import origins_in, pack_said, unpack_said, with_origins
from shardbook.core.lineage import ORIGIN_KINDS, LineageKind, Origin, check_end
from shardbook.core.names import CheckpointName
from shardbook.errors import InvalidArgumentError, ShardbookError
from shardbook.recording import description_of
from shardbook.v1 import types_pb2

ends = st.one_of(
    st.sampled_from(["llm/8b@1", "llm/8b:optim@latest", "projects/a/runs/b/parts/c/checkpoints/1.s2.a3"]),
    st.text(st.characters(codec="utf-8", categories=["L", "N", "Zs", "P"]), min_size=1, max_size=30),
)


def origin(kind: LineageKind, source: str) -> Origin | None:
    """An origin; None when it cannot be one."""
    try:
        return Origin(kind, source)
    except InvalidArgumentError:
        return None


origins = st.builds(origin, st.sampled_from(ORIGIN_KINDS), ends).filter(lambda one: one is not None)


@given(st.lists(origins, max_size=limits.MAX_ORIGINS, unique=True))
def test_origins_come_back_from_records(told: list[Origin]) -> None:
    """Beside what else is said, which stays readable without them; and as a call carries them."""
    said = pack_said({"a": "b"}, {"loss": 1.0}, "", {"host": "h"}, told)
    assert ({"a": "b"}, {"loss": 1.0}, "", {"host": "h"}) == unpack_said(said)
    assert tuple(told) == origins_in(said) == origins_in(with_origins(pack_said({}, {}, "", {}), told))
    message = description_of(said)
    assert [(int(one.kind), one.source) for one in told] == [(one.kind, one.source) for one in message.origins]


def damaged(value: object) -> bytes:
    """What is said, with other origins."""
    return json.dumps({"labels": {"a": "b"}, "origins": value}).encode()


values = st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists)


@given(st.one_of(st.binary(max_size=40), values.map(damaged)))
def test_damaged_origins_say_nothing(content: bytes) -> None:
    """What is said besides counts; no error of ours or anybody's."""
    assert () == origins_in(content)
    if content.startswith(b'{"labels"'):
        assert {"a": "b"} == dict(description_of(content).labels)


def test_kinds_are_those_of_the_wire() -> None:
    """Numbers in the database and in messages; names in arguments are forgiving."""
    assert {f"LINEAGE_KIND_{one.name}": int(one) for one in LineageKind} == {
        name: number for name, number in types_pb2.LineageKind.items() if number
    }
    for text in ("fine_tuned_from", "fine-tuned-from", "Fine tuned from"):
        assert LineageKind.FINE_TUNED_FROM is LineageKind.parse(text)
    with pytest.raises(InvalidArgumentError):
        Origin(LineageKind.EVALUATED_BY, "x")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("llm/8b@1500", CheckpointName.parse("llm/8b@1500")),
        ("llm/8b@best", CheckpointName.parse("llm/8b@best")),
        ("org/model", "org/model"),
        ("org/model@v1.0/x", "org/model@v1.0/x"),
        ("my runs/8b@5", "my runs/8b@5"),
        ("/ckpt/step@5", "/ckpt/step@5"),
        ("abfs://container@account.host/x", "abfs://container@account.host/x"),
        ("https://wandb.example/r/1?workspace=ada", "https://wandb.example/r/1?workspace=ada"),
        ("mail ada@example.org", "mail ada@example.org"),
        ("https://hub.example by ada@example.org", "https://hub.example by ada@example.org"),
        ("https://wandb.example/r/1?design=monkey&hockey=1", "https://wandb.example/r/1?design=monkey&hockey=1"),
    ],
)
def test_what_an_end_means(text: str, meant: CheckpointName | str) -> None:
    """A checkpoint where it is a ref or a name of one, else what it says."""
    assert meant == check_end(text, "object")


@pytest.mark.parametrize(
    "text",
    [
        "https://ada:secret@host/x",
        "s3://secret@bucket/x",
        "zip://a.zip::s3://k:secret@bucket",
        "abfs://container:secret@account",
        "https://host/x?token=secret",
        "https://host/x?a=1&X-Amz-Signature=secret",
        "https://host/x#access_token=secret",
        "copy of s3://k:secret@bucket/x",
        "https://host/x?url=https%3A%2F%2Fother%2Fy%3Fsig%3Dsecret",
    ],
)
def test_credentials_are_refused_and_not_repeated(text: str) -> None:
    """Users, passwords, signatures, tokens."""
    with pytest.raises(ShardbookError) as caught:
        check_end(text, "object")
    assert ("CREDENTIALS", "object") == (caught.value.reason, caught.value.violations[0].field)
    assert "secret" not in str(caught.value)
