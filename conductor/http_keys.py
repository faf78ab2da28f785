"""API keys over HTTP: whose a request is, and how its tenant stands, in headers of the answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton.errors import BatonError, PermissionDenied
from conductor.http_errors import error_response
from conductor.tenants.tenancy import Tenancy
from conductor.tenants.tenant import ANYBODY, Tenant

_TENANT = "baton.tenant"  # in the ASGI scope


def tenant_of(request: Request) -> Tenant:
    """Whose the request is; anybody's where no key is needed."""
    tenant: Tenant = request.scope.get(_TENANT, ANYBODY)
    return tenant


def with_key(route: Route, tenancy: Tenancy) -> Route:
    """The same route, for those who have a key."""

    async def guarded(request: Request) -> ASGIApp:
        tenant = tenancy.authenticate(request.headers.get("authorization"))
        request.scope[_TENANT] = tenant
        if tenant.limits.unlimited:
            return await _answer(route, request)
        try:
            response: ASGIApp = await _answer(route, request)
        except BatonError as error:
            response = error_response(error)
        return _with_headers(response, lambda: tenancy.headers(tenant))

    return _like(route, guarded)


def with_admin_key(route: Route, tenancy: Tenancy) -> Route:
    """The same route, for those who have the key of an admin."""

    async def guarded(request: Request) -> ASGIApp:
        if not tenancy.authenticate(request.headers.get("authorization")).admin:
            raise PermissionDenied("this needs the API key of a tenant with `admin: true`")
        return await _answer(route, request)

    return _like(route, guarded)


async def _answer(route: Route, request: Request) -> Response:
    response: Response = await route.endpoint(request)
    return response


def _like(route: Route, endpoint: Callable[[Request], Awaitable[ASGIApp]]) -> Route:
    return Route(route.path, endpoint, methods=sorted(route.methods or ()))


def _with_headers(response: ASGIApp, headers: Callable[[], dict[str, str]]) -> ASGIApp:
    """The headers are asked for when the response begins: what it needed is reserved by then."""

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = ((name.encode(), value.encode()) for name, value in headers().items())
                message["headers"] = [*message["headers"], *more]
            await send(message)

        await response(scope, receive, send_with_headers)

    return respond
