"""Anything that parses, and anything that does not: every call answers with a typed status, and the server lives on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardbook.v1 import catalog_pb2, metadata_pb2, registration_pb2
from tests.behaviour.rpc.api import DEADLINE_S, Api, Job, error_of

#: Real values first, so that some requests get past the checks; then the extremes.
INT64 = st.sampled_from([0, 1, 2, -1, 2**31, 2**62, 2**63 - 1, -(2**63)])
UINT32 = st.sampled_from([0, 1, 2**32 - 1])
DOUBLES = st.sampled_from([0.0, -0.0, 1.5, -1e300, math.nan, math.inf])
INT32 = st.sampled_from([0, 1, 2, 3, -1, 4096, 2**31 - 1, -(2**31)])
STRINGS = st.sampled_from(
    [
        "projects/fuzz/runs/r",
        "projects/-",
        "fuzz/r@latest",
        "/ckpt/x",
        "write",
        "",
        "\x00",
        "../..",
        "x" * 5000,
        "\u202e",
        "3f1d7a2e-9c40-4a8e-8f5b-0f6f2f1f9a11",
    ]
) | st.text(max_size=20)
BYTES = st.sampled_from([b"", b"x" * 16, b"x" * 32, bytes(32), b"\x00\x01\x00\x00"]) | st.binary(max_size=40)
METHODS = [
    method
    for module in (registration_pb2, metadata_pb2, catalog_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


def _is_repeated(field: FieldDescriptor) -> bool:
    # protobuf 5 says so by `label`, which protobuf 6 warns of.
    return hasattr(getattr(GetMessageClass(field.containing_type)(), field.name), "extend")


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    kinds: dict[int, Callable[[], st.SearchStrategy[Any]]] = {
        FieldDescriptor.TYPE_INT32: lambda: INT32,
        FieldDescriptor.TYPE_INT64: lambda: INT64,
        FieldDescriptor.TYPE_UINT32: lambda: UINT32,
        FieldDescriptor.TYPE_DOUBLE: lambda: DOUBLES,
        FieldDescriptor.TYPE_BOOL: st.booleans,
        FieldDescriptor.TYPE_STRING: lambda: STRINGS,
        FieldDescriptor.TYPE_BYTES: lambda: BYTES,
        FieldDescriptor.TYPE_ENUM: lambda: st.integers(-1, 6),
        FieldDescriptor.TYPE_MESSAGE: lambda: _messages(field.message_type, depth + 1),
    }
    if _is_map(field):
        key, value = (_values(field.message_type.fields_by_name[name], depth) for name in ("key", "value"))
        return st.dictionaries(key, value, max_size=3)
    value = kinds[field.type]()
    return st.lists(value, max_size=3) if _is_repeated(field) else value


def _messages(descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[Message]:
    """Messages with any of their fields set."""
    fields = {field.name: st.none() | _values(field, depth) for field in descriptor.fields}
    return st.fixed_dictionaries(fields).map(lambda values: _build(descriptor, values))


def _build(descriptor: Descriptor, values: dict[str, Any]) -> Message:
    message: Message = GetMessageClass(descriptor)()
    for name, value in values.items():
        field = descriptor.fields_by_name[name]
        if value is None:
            continue
        if _is_map(field):
            getattr(message, name).update(value)
        elif _is_repeated(field):
            getattr(message, name).extend(value)
        elif field.message_type is not None:
            getattr(message, name).CopyFrom(value)
        else:
            setattr(message, name, value)
    return message


@pytest.fixture(scope="module")
def job(api: Api) -> Job:
    """A session that requests can hit by chance, with one committed checkpoint."""
    job = Job(api, "projects/fuzz/runs/r", incarnation=b"x" * 16)
    job = replace(job, session=job.start_session().session)
    job.save(1)
    return job


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=settings().max_examples // 2,
)
@given(data=st.data())
def test_any_message_gets_a_typed_answer(api: Api, job: Job, method: Any, data: st.DataObject) -> None:
    """Rule: OK or an error with ErrorInfo; never INTERNAL, UNKNOWN or a hang."""
    request: Any = data.draw(_messages(method.input_type))
    if "wait" in request.DESCRIPTOR.fields_by_name and request.wait.seconds >= 0:
        request.wait.Clear()
    _call(api, method, request.SerializeToString())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(garbage=st.binary(max_size=60))
def test_any_bytes_get_a_typed_answer(api: Api, method: Any, garbage: bytes) -> None:
    """Rule: the same for bytes that are no message at all."""
    _call(api, method, garbage)


def _call(api: Api, method: Any, request: bytes) -> None:
    path = f"/{method.containing_service.full_name}/{method.name}"
    channel: Any = api.channel
    try:
        if method.server_streaming:
            list(channel.unary_stream(path)(request, timeout=DEADLINE_S))
        else:
            channel.unary_unary(path)(request, timeout=DEADLINE_S)
    except grpc.RpcError as error:
        error_of(error)


def test_the_server_is_as_it_was(api: Api, job: Job) -> None:
    """Rule: what the calls above left behind does not keep others from working."""
    assert health_pb2.HealthCheckResponse.SERVING == api.health.Check(health_pb2.HealthCheckRequest()).status
    other = Job.start(api, "projects/fuzz/runs/after")
    assert other.save(1).live
