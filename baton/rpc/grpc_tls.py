"""gRPC with the certificates of a process: credentials of both sides, and what failures mean."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from baton.errors import Unauthenticated
from baton.rpc.errors import status_of, trailing_metadata
from baton.rpc.tls import Certificates, FrontCertificate, Pems

NAMES_KEY = "x509_subject_alternative_name"

_HINTS = (
    ("WRONG_VERSION_NUMBER", "it does not speak TLS, and this process does"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not of an authority in our --tls-ca"),
    ("Hostname Verification Check failed", "its certificate is not for our --tls-peer-name"),
)
_CUT_WITH_TLS = "if it is up, it did not accept our certificate, or speaks no TLS"
_CUT_WITHOUT_TLS = "if it is up, it may want TLS, and this process has no --tls-cert"


def server_credentials(shown: Certificates | FrontCertificate) -> grpc.ServerCredentials:
    """With Certificates, callers must show theirs. New files count from the next connection on."""
    given = shown.current()

    def fetch() -> Any:
        """None: nothing is new. In a thread of gRPC's, at each handshake."""
        nonlocal given
        now = shown.current()
        if now is given:
            return None
        given = now
        return _configuration(now)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(given),
        fetch,
        require_client_authentication=isinstance(shown, Certificates),
    )


def _configuration(pems: Pems) -> Any:
    return grpc.ssl_server_certificate_configuration([(pems.key, pems.cert)], pems.ca or None)


def make_channel(
    address: str, options: tuple[tuple[str, Any], ...], certificates: Certificates | None
) -> grpc.aio.Channel:
    """A channel keeps the certificate that it was made with."""
    if certificates is None:
        return grpc.aio.insecure_channel(address, options=list(options))
    pems = certificates.current()
    credentials = grpc.ssl_channel_credentials(pems.ca, pems.key, pems.cert)
    name = ("grpc.ssl_target_name_override", certificates.config.peer_name)
    return grpc.aio.secure_channel(address, credentials, options=[*options, name])


def hint(details: str, certificates: Certificates | None) -> str:
    """What a connection that failed with `details` may mean; empty: nothing to do with TLS."""
    for words, meaning in _HINTS:
        if words in details:
            return meaning
    if "Socket closed" in details or "Connection reset" in details:
        return _CUT_WITHOUT_TLS if certificates is None else _CUT_WITH_TLS
    return ""


class PeerNameInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets a call to a service whose name begins with one of `services` pass only from a peer whose
    certificate has `name`: an authority may have issued others, for other purposes."""

    def __init__(self, name: str, services: tuple[str, ...]) -> None:
        self._name = name.encode()
        self._services = services

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._services):
            return handler
        serve = handler.stream_stream or handler.unary_unary

        async def checked(request: Any, context: grpc.aio.ServicerContext) -> Any:
            if self._name not in context.auth_context().get(NAMES_KEY, ()):
                refusal = Unauthenticated(
                    f"the certificate is not for {self._name.decode()!r}, as those of the "
                    "cluster's processes are (--tls-peer-name)"
                )
                metadata = trailing_metadata(refusal)
                await context.abort(status_of(refusal), refusal.message, metadata)
            return await serve(request, context)

        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return make(checked, handler.request_deserializer, handler.response_serializer)
