"""The error tree. Each class says who is at fault and whether trying again can help.

`code` is the stable machine-readable name that travels on the wire, in OpenAI-shaped bodies and
in metrics. `retryable` means: the same request may succeed on another worker or a little later.
"""

from __future__ import annotations

from collections.abc import Mapping


class BatonError(Exception):
    """Base of every error that baton raises on purpose."""

    code = "internal_error"
    retryable = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(BatonError):
    """The client's request is malformed or asks for something that can never be served."""

    code = "invalid_request_error"

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class ModelNotFound(InvalidRequest):
    """The request names a model that this cluster does not serve."""

    code = "model_not_found"


class ModelLoadError(BatonError):
    """A model directory is missing, incomplete, truncated or contradicts itself."""

    code = "model_load_error"


class ConfigError(BatonError):
    """A flag, environment variable or configuration file is wrong."""

    code = "config_error"


class Unauthenticated(BatonError):
    """The caller did not present the cluster token."""

    code = "unauthenticated"


class InvalidApiKey(Unauthenticated):
    """The client sent no API key, or one that is unknown, revoked or too old."""

    code = "invalid_api_key"


class PermissionDenied(BatonError):
    """The API key is good, but its tenant may not do this."""

    code = "permission_denied"

    def __init__(self, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class LayoutMismatch(BatonError):
    """Two processes hold KV blocks of different layouts; the message names both."""

    code = "layout_mismatch"


class ProtocolMismatch(BatonError):
    """Two processes are of versions that do not understand each other; the message names both."""

    code = "protocol_mismatch"


class Overloaded(BatonError):
    """A queue or pool bound was reached before any work was spent; retry later."""

    code = "overloaded"
    retryable = True

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(Overloaded):
    """The tenant has used up what it is allowed; its next requests are let in later."""

    code = "rate_limit_exceeded"


class NoWorker(BatonError):
    """No live worker can take the request now."""

    code = "no_worker"
    retryable = True


class WorkerLost(BatonError):
    """A worker died or stopped answering while it held the request."""

    code = "worker_lost"
    retryable = True


class WorkerMoved(BatonError):
    """The worker takes another role: the answer goes on at another one."""

    code = "worker_moved"
    retryable = True


class PoisonRequest(BatonError):
    """Workers died, one after the other, while they computed for the request: it is not tried on
    more of them."""

    code = "poison_request"


class PeerGone(BatonError):
    """The other end of a stream has gone or cannot be reached."""

    code = "peer_gone"
    retryable = True


class StaleAttempt(BatonError):
    """A message named an attempt or an incarnation that is no longer current."""

    code = "stale_attempt"


class TakenOver(BatonError):
    """The client came back on another connection, at this conductor or another one: its answer goes
    on there."""

    code = "taken_over"


class UnknownAttempt(BatonError):
    """The worker does not have the attempt (any more): its answer has to be computed again."""

    code = "unknown_attempt"
    retryable = True


class LeaseExpired(BatonError):
    """Published KV was not renewed in time; whatever was read under the lease is void."""

    code = "lease_expired"
    retryable = True


class TransportError(BatonError):
    """A KV transfer failed or could not be started."""

    code = "transport_error"
    retryable = True


class DigestMismatch(TransportError):
    """Bytes that were read differ from the bytes that were published."""

    code = "digest_mismatch"


class RegistryUnavailable(BatonError):
    """The registry that conductors share cannot be reached; serving goes on with what is known."""

    code = "registry_unavailable"
    retryable = True


class DeadlineExceeded(BatonError):
    """The request's deadline passed."""

    code = "deadline_exceeded"


class Cancelled(BatonError):
    """The client or an operator cancelled the request."""

    code = "cancelled"


class InternalError(BatonError):
    """A bug: an invariant did not hold."""

    code = "internal_error"


def _by_code() -> dict[str, type[BatonError]]:
    kinds = [kind for kind in globals().values() if isinstance(kind, type)]
    return {kind.code: kind for kind in kinds if issubclass(kind, BatonError)}


BY_CODE: Mapping[str, type[BatonError]] = _by_code()
"""What the other side of a connection raised is raised here, too."""
