"""OpenTelemetry: a span for each call, exported as the standard ``OTEL_*`` variables say; needs the extra ``otel``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import grpc.aio

from shardbook.errors import FailedPreconditionError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

_SERVICE_NAME: Final = "shardbook-server"


class Tracing:
    """Makes spans and sends them away; of one server, so nothing global is touched.

    Args:
        processor: Where spans go; by default in batches to the collector that the environment names.

    Attributes:
        interceptor: For the server, before all others: spans hold what those do.
    """

    def __init__(self, processor: SpanProcessor | None = None) -> None:
        """Reads the environment; connects to nothing yet.

        Raises:
            FailedPreconditionError: The packages are not installed; reason ``MISSING_PACKAGE``.
        """
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.instrumentation.grpc import aio_server_interceptor
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise FailedPreconditionError(
                "OpenTelemetry is switched on and not installed: pip install 'shardbook[otel]', or set otel = false",
                reason="MISSING_PACKAGE",
                field="otel",
            ) from error
        # Attributes that are given here would win over OTEL_SERVICE_NAME.
        named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        self._provider = TracerProvider(
            resource=Resource.create({} if named else {SERVICE_NAME: _SERVICE_NAME}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()) if processor is None else processor)
        # Published with types for some of its functions, not for this one.
        intercept: Any = aio_server_interceptor
        self.interceptor: grpc.aio.ServerInterceptor = intercept(tracer_provider=self._provider)

    def close(self) -> None:
        """Sends what is left; blocks for as long as the exporter's own time limit."""
        self._provider.shutdown()
