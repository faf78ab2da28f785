"""Errors keep their class, code and retryability between processes."""

from __future__ import annotations

import grpc
import pytest

from baton import errors
from baton.errors import BatonError, InternalError, InvalidRequest, ModelNotFound, PeerGone
from baton.rpc.errors import from_status, from_wire, status_of, to_wire, trailing_metadata


def concrete_classes() -> list[type[BatonError]]:
    found = [cls for cls in vars(errors).values() if isinstance(cls, type)]
    return [cls for cls in found if issubclass(cls, BatonError) and cls is not BatonError]


@pytest.mark.parametrize("cls", concrete_classes())
def test_every_class_survives_the_wire(cls: type[BatonError]) -> None:
    rebuilt = from_wire(to_wire(cls("what happened")))
    assert type(rebuilt) is cls
    assert (rebuilt.message, rebuilt.retryable) == ("what happened", cls.retryable)


@pytest.mark.parametrize("cls", concrete_classes())
def test_every_class_survives_a_status(cls: type[BatonError]) -> None:
    error = cls("what happened")
    metadata = grpc.aio.Metadata(*trailing_metadata(error))
    raised = grpc.aio.AioRpcError(status_of(error), grpc.aio.Metadata(), metadata, error.message)
    rebuilt = from_status(raised, "peer")
    assert type(rebuilt) is cls
    assert (rebuilt.message, rebuilt.retryable) == ("what happened", cls.retryable)


def test_a_request_error_with_its_own_code_stays_a_request_error() -> None:
    rebuilt = from_wire(to_wire(InvalidRequest("too long", code="context_length_exceeded")))
    assert isinstance(rebuilt, InvalidRequest)
    assert rebuilt.code == "context_length_exceeded"


def test_an_unknown_code_is_a_plain_error_that_keeps_its_flags() -> None:
    error = BatonError("later")
    error.code, error.retryable = "from_the_future", True
    rebuilt = from_wire(to_wire(error))
    assert type(rebuilt) is BatonError
    assert (rebuilt.code, rebuilt.retryable) == ("from_the_future", True)


def test_foreign_exceptions_are_internal_errors() -> None:
    rebuilt = from_wire(to_wire(ValueError("oops")))
    assert isinstance(rebuilt, InternalError)
    assert rebuilt.message == "ValueError: oops"


def test_status_codes() -> None:
    assert status_of(ModelNotFound("x")) is grpc.StatusCode.NOT_FOUND
    assert status_of(InvalidRequest("x")) is grpc.StatusCode.INVALID_ARGUMENT
    assert status_of(ValueError("x")) is grpc.StatusCode.INTERNAL


def test_a_status_without_our_metadata_is_peer_gone() -> None:
    empty = grpc.aio.Metadata()
    refused = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, empty, empty, "refused")
    assert isinstance(from_status(refused, "w"), PeerGone)
    assert from_status(refused, "w").message == "w is gone: unavailable: refused"
    late = grpc.aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, empty, empty, "late")
    assert "w did not answer in time" in from_status(late, "w").message
