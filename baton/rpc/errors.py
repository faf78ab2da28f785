"""Errors across processes: BatonError <-> WireError <-> gRPC status.

A status carries the stable code in the trailing metadata `baton-error-code`, so that the caller
gets the class that the callee raised, with its `retryable`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import grpc

from baton.errors import (
    BY_CODE,
    BatonError,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    LayoutMismatch,
    ModelNotFound,
    NoWorker,
    Overloaded,
    PeerGone,
    PermissionDenied,
    ProtocolMismatch,
    RegistryUnavailable,
    StaleAttempt,
    TakenOver,
    Unauthenticated,
    UnknownAttempt,
    WorkerLost,
    WorkerMoved,
)
from baton.types.request import WireError

CODE_KEY = "baton-error-code"
RETRYABLE_KEY = "baton-error-retryable"
CLIENT_FAULT_KEY = "baton-error-client-fault"

# How gRPC says that no connection came about, before it comes to the reason.
_NO_CONNECTION = re.compile(
    r"failed to connect to all addresses; last error: \w+: \S+: "
    r"(?:Failed to connect to remote host: )?"
)

_STATUS: tuple[tuple[type[BatonError], grpc.StatusCode], ...] = (
    (ModelNotFound, grpc.StatusCode.NOT_FOUND),
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (PermissionDenied, grpc.StatusCode.PERMISSION_DENIED),
    (LayoutMismatch, grpc.StatusCode.FAILED_PRECONDITION),
    (ProtocolMismatch, grpc.StatusCode.FAILED_PRECONDITION),
    (StaleAttempt, grpc.StatusCode.FAILED_PRECONDITION),
    (TakenOver, grpc.StatusCode.ABORTED),
    (UnknownAttempt, grpc.StatusCode.NOT_FOUND),
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (Cancelled, grpc.StatusCode.CANCELLED),
    (NoWorker, grpc.StatusCode.UNAVAILABLE),
    (WorkerLost, grpc.StatusCode.UNAVAILABLE),
    (WorkerMoved, grpc.StatusCode.UNAVAILABLE),
    (PeerGone, grpc.StatusCode.UNAVAILABLE),
    (RegistryUnavailable, grpc.StatusCode.UNAVAILABLE),
)


def to_wire(error: BaseException) -> WireError:
    """What another process learns of `error`. Foreign exceptions become `internal_error`."""
    if isinstance(error, BatonError):
        fault = isinstance(error, InvalidRequest)
        return WireError(error.code, error.message, error.retryable, fault)
    return WireError(InternalError.code, f"{type(error).__name__}: {error}")


def from_wire(error: WireError) -> BatonError:
    """The exception to raise for `error`: the class of its code, with the sender's `retryable`."""
    cls = BY_CODE.get(error.code, InvalidRequest if error.client_fault else BatonError)
    rebuilt = cls(error.message)
    rebuilt.code = error.code
    rebuilt.retryable = error.retryable
    return rebuilt


def copy_of(error: BatonError) -> BatonError:
    """The same error to raise again: raised many times, one would grow a traceback without end."""
    return from_wire(to_wire(error))


def status_of(error: BaseException) -> grpc.StatusCode:
    """The gRPC status that stands for `error`."""
    for cls, status in _STATUS:
        if isinstance(error, cls):
            return status
    return grpc.StatusCode.INTERNAL


def trailing_metadata(error: BaseException) -> tuple[tuple[str, str], ...]:
    """What `from_status` needs to rebuild `error` at the caller."""
    wire = to_wire(error)
    flags = ((RETRYABLE_KEY, wire.retryable), (CLIENT_FAULT_KEY, wire.client_fault))
    return ((CODE_KEY, wire.code), *((key, "1") for key, is_set in flags if is_set))


def from_status(error: grpc.aio.AioRpcError, peer: str) -> BatonError:
    """The exception that a failed call to `peer` stands for; PeerGone unless the peer said why."""
    metadata = dict(_text_pairs(error.trailing_metadata()))
    details = error.details() or error.code().name
    if CODE_KEY in metadata:
        wire = WireError(
            metadata[CODE_KEY], details, RETRYABLE_KEY in metadata, CLIENT_FAULT_KEY in metadata
        )
        return from_wire(wire)
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return PeerGone(f"{peer} did not answer in time")
    reason, known = _NO_CONNECTION.subn("", details)
    if not known:
        reason = f"{error.code().name.lower()}: {details}"
    return PeerGone(f"{peer} is gone: {reason}")


def _text_pairs(metadata: grpc.aio.Metadata | None) -> Iterator[tuple[str, str]]:
    for key, value in metadata or ():
        if isinstance(value, str):
            yield key, value
