"""Sends spans to an OpenTelemetry collector by OTLP over gRPC. Needs the extra `otel`.

The only module that touches OpenTelemetry's SDK, which it imports when it is asked to: a conductor
that exports nothing does not load it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from baton.errors import ConfigError
from baton.types.trace import TraceContext
from conductor.span_tree import CONDUCTOR, Kind, TreeSpan

EXPORT_TIMEOUT_S = 5.0  # of one batch, with the exporter's own retries


def check_installed() -> None:
    """Raises ConfigError."""
    try:
        found = importlib.util.find_spec("opentelemetry.exporter.otlp.proto.grpc")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ConfigError("--otlp-endpoint needs OpenTelemetry: pip install 'baton-llm[otel]'")


class OtlpSender:
    """Makes a connection and threads of grpc's at once; `close` ends them. `send` blocks.

    Headers, certificates and compression come from OpenTelemetry's own variables
    (OTEL_EXPORTER_OTLP_HEADERS, OTEL_EXPORTER_OTLP_CERTIFICATE, ...), and OTEL_RESOURCE_ATTRIBUTES
    is said of every process.
    """

    def __init__(self, endpoint: str, cluster: str, conductor: str) -> None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        self._exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)
        self._cluster = cluster
        self._conductor = conductor
        self._resources: dict[tuple[str, str], Any] = {}

    def send(self, traces: Sequence[tuple[TraceContext, Sequence[TreeSpan]]]) -> bool:
        """Whether the collector has taken them all."""
        from opentelemetry.sdk.trace.export import SpanExportResult

        spans = [self._span(context, span) for context, tree in traces for span in tree]
        return bool(self._exporter.export(spans) is SpanExportResult.SUCCESS)

    def close(self) -> None:
        """Calls that still run fail at once."""
        self._exporter.shutdown()

    def _span(self, trace: TraceContext, span: TreeSpan) -> Any:
        """Ids and times are known already, so that no tracer makes it."""
        from opentelemetry.sdk.trace import Event, ReadableSpan
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        from opentelemetry.trace import Link, SpanKind, Status, StatusCode

        kinds = {Kind.SERVER: SpanKind.SERVER, Kind.CLIENT: SpanKind.CLIENT}
        parent, before = span.parent_id, span.follows
        return ReadableSpan(
            span.name,
            _context(trace, span.span_id),
            _context(trace, parent) if parent else None,
            self._resource(span),
            dict(span.attributes),
            [Event(name, timestamp=_nanoseconds(at_s)) for name, at_s in span.events],
            [Link(_context(trace, before), {"baton.link": "retry of"})] if before else (),
            kinds.get(span.kind, SpanKind.INTERNAL),
            status=Status(StatusCode.ERROR, span.error) if span.error else Status(),
            start_time=_nanoseconds(span.start_s),
            end_time=_nanoseconds(max(span.end_s, span.start_s)),
            instrumentation_scope=InstrumentationScope("baton"),
        )

    def _resource(self, span: TreeSpan) -> Any:
        from opentelemetry.sdk.resources import Resource

        name = span.process or (self._conductor if span.service == CONDUCTOR else "")
        key = (span.service, name)
        if key not in self._resources:
            self._resources[key] = Resource.create(
                {
                    "service.name": span.service,
                    "service.namespace": self._cluster,
                    "service.instance.id": name,
                }
            )
        return self._resources[key]


def _context(trace: TraceContext, span_id: str) -> Any:
    from opentelemetry.trace import SpanContext, TraceFlags, TraceState

    state = TraceState.from_header([trace.state]) if trace.state else None
    flags = TraceFlags(TraceFlags.SAMPLED if trace.sampled else TraceFlags.DEFAULT)
    return SpanContext(int(trace.trace_id, 16), int(span_id, 16), False, flags, state)


def _nanoseconds(unix_s: float) -> int:
    return round(unix_s * 1e9)
