"""A collector that keeps what it gets: OTLP over gRPC on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as stubs


@dataclass(frozen=True, slots=True)
class Got:
    """One span, with ids as hex digits. `attributes` are its own, `resource` its process's."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    state: str
    links: tuple[str, ...]
    events: tuple[str, ...]
    error: str
    attributes: dict[str, Any]
    resource: dict[str, Any]


@dataclass
class Collector(stubs.TraceServiceServicer):  # type: ignore[misc]
    url: str = ""
    raw: list[bytes] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    answers: threading.Event = field(default_factory=threading.Event)  # cleared: it hangs
    called: threading.Event = field(default_factory=threading.Event)
    _spans: list[Got] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def Export(self, request: Any, context: Any) -> Any:
        self.called.set()
        self.answers.wait()
        with self._lock:
            self.raw.append(request.SerializeToString())
            self.metadata.append(dict(context.invocation_metadata()))
            for group in request.resource_spans:
                resource = _attributes(group.resource.attributes)
                for scope in group.scope_spans:
                    self._spans += [_got(span, resource) for span in scope.spans]
        return pb.ExportTraceServiceResponse()

    def trace(self, trace_id: str) -> list[Got]:
        with self._lock:
            return [span for span in self._spans if span.trace_id == trace_id]


@contextmanager
def collector() -> Iterator[Collector]:
    server = grpc.server(ThreadPoolExecutor(1))
    found = Collector()
    found.answers.set()
    stubs.add_TraceServiceServicer_to_server(found, server)
    found.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield found
    finally:
        found.answers.set()
        server.stop(None).wait(10)


def _got(span: Any, resource: dict[str, Any]) -> Got:
    return Got(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.trace_state,
        tuple(link.span_id.hex() for link in span.links),
        tuple(event.name for event in span.events),
        span.status.message,
        _attributes(span.attributes),
        resource,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return tuple(_value(each) for each in value.array_value.values)
    return getattr(value, kind)
