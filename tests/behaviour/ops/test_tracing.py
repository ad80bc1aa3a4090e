"""OpenTelemetry: spans of real calls."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shardbook.errors import FailedPreconditionError
from shardbook.v1 import catalog_pb2
from shardbook_server.app import running_server
from shardbook_server.tracing import Tracing
from tests.behaviour.ops.conftest import running_ops
from tests.behaviour.rpc.api import DEADLINE_S, Job, api_of, refusal, settings_in

RUN = "projects/test/runs/r"


def _code(span: ReadableSpan) -> int:
    assert span.attributes is not None
    return int(str(span.attributes["rpc.grpc.status_code"]))


def test_each_call_is_one_span_with_its_name_and_status(tmp_path: Path) -> None:
    """Rule: unary, streamed and refused calls alike; metrics go on beside it."""
    exporter = InMemorySpanExporter()
    with running_ops(tmp_path, tracing=Tracing(SimpleSpanProcessor(exporter))) as ops:
        job = Job.start(ops.api, RUN)
        refusal(ops.api.catalog.GetRun, catalog_pb2.GetRunRequest(name="projects/test/runs/none"))
        refusal(job.commit)
        assert 1 == ops.sample("grpc_server_started_total", grpc_method="GetRun")
    spans = exporter.get_finished_spans()
    not_found = grpc.StatusCode.NOT_FOUND.value[0]
    assert [
        ("shardbook.v1.RegistrationService/StartSession", 0),
        ("shardbook.v1.CatalogService/GetRun", not_found),
        ("shardbook.v1.RegistrationService/CommitCheckpoint", not_found),
    ] == [(span.name.removeprefix("/"), _code(span)) for span in spans]
    assert {"shardbook-server"} == {span.resource.attributes["service.name"] for span in spans}


class _Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans as a collector would."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.services: set[str] = set()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
        """Remembers them."""
        for resource in request.resource_spans:
            self.services |= {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
            self.names += [span.name for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Collector]:
    """A collector that the standard variables name."""
    servicer = _Collector()
    server = grpc.server(ThreadPoolExecutor(1))
    add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    add(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "checkpoints-eu")
    yield servicer
    server.stop(0).wait()


def test_spans_go_where_the_standard_variables_say(tmp_path: Path, collector: _Collector) -> None:
    """Rule: `otel = true` and OTEL_* are enough; what is left is sent before the server has ended."""
    with running_server(settings_in(tmp_path, otel=True)) as server, api_of(server.address) as api:
        api.catalog.ListRuns(catalog_pb2.ListRunsRequest(parent="projects/test"), timeout=DEADLINE_S)
    assert ["shardbook.v1.CatalogService/ListRuns"] == [name.removeprefix("/") for name in collector.names]
    assert {"checkpoints-eu"} == collector.services


def test_without_the_packages_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: tracing that was asked for is never silently left out."""
    monkeypatch.setitem(sys.modules, "opentelemetry.instrumentation.grpc", None)
    with pytest.raises(FailedPreconditionError) as refused, running_server(settings_in(tmp_path, otel=True)):
        pass
    assert "shardbook[otel]" in refused.value.message
    assert "MISSING_PACKAGE" == refused.value.reason
