"""Sends spans to an OpenTelemetry collector by OTLP over gRPC. Needs the extra `otel`.

The only module that touches OpenTelemetry's SDK, which it imports when it is asked to: a conductor
that exports nothing does not load it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
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
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk import trace as sdk
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import SpanExportResult
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        self._exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)
        self._success = SpanExportResult.SUCCESS
        self._api, self._sdk, self._make_resource = trace, sdk, Resource.create
        self._scope = InstrumentationScope("baton")
        self._kinds = {
            Kind.SERVER: trace.SpanKind.SERVER,
            Kind.CLIENT: trace.SpanKind.CLIENT,
            Kind.INTERNAL: trace.SpanKind.INTERNAL,
        }
        self._cluster = cluster
        self._conductor = conductor
        self._resources: dict[tuple[str, str], Any] = {}

    def send(self, traces: Sequence[tuple[TraceContext, Sequence[TreeSpan]]]) -> bool:
        """Whether the collector has taken them all."""
        spans = []
        for context, tree in traces:
            make_context = self._contexts(context)
            spans += [self._span(span, make_context) for span in tree]
        return bool(self._exporter.export(spans) is self._success)

    def close(self) -> None:
        """Calls that still run fail at once."""
        self._exporter.shutdown()

    def _contexts(self, trace: TraceContext) -> Callable[[str], Any]:
        """What makes the context of a span of that trace from its id."""
        api = self._api
        trace_id = int(trace.trace_id, 16)
        flags = api.TraceFlags(api.TraceFlags.SAMPLED if trace.sampled else 0)
        state = api.TraceState.from_header([trace.state]) if trace.state else None
        return lambda span_id: api.SpanContext(trace_id, int(span_id, 16), False, flags, state)

    def _span(self, span: TreeSpan, make_context: Callable[[str], Any]) -> Any:
        """Ids and times are known already, so that no tracer makes it."""
        api, sdk = self._api, self._sdk
        links = []
        if span.follows:
            links.append(api.Link(make_context(span.follows), {"baton.link": "retry of"}))
        error = api.Status(api.StatusCode.ERROR, span.error) if span.error else api.Status()
        return sdk.ReadableSpan(
            span.name,
            make_context(span.span_id),
            make_context(span.parent_id) if span.parent_id else None,
            self._resource(span),
            dict(span.attributes),
            [sdk.Event(name, timestamp=_nanoseconds(at_s)) for name, at_s in span.events],
            links,
            self._kinds[span.kind],
            status=error,
            start_time=_nanoseconds(span.start_s),
            end_time=_nanoseconds(max(span.end_s, span.start_s)),
            instrumentation_scope=self._scope,
        )

    def _resource(self, span: TreeSpan) -> Any:
        name = span.process or (self._conductor if span.service == CONDUCTOR else "")
        key = (span.service, name)
        if key not in self._resources:
            self._resources[key] = self._make_resource(
                {
                    "service.name": span.service,
                    "service.namespace": self._cluster,
                    "service.instance.id": name,
                }
            )
        return self._resources[key]


def _nanoseconds(unix_s: float) -> int:
    return round(unix_s * 1e9)
