"""One authentication middleware, deny by default.

Each route handler declares its policy with `@public` or `@require("name")`. A handler without one is never served: the
application refuses to start (`check_policies`). An `Authenticator` turns a request into a `Principal` or raises; the
principal must hold the policy's name as a scope.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web
from aiohttp.typedefs import Middleware

from ..core.errors import Forbidden

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
F = TypeVar("F", bound=Callable[..., Awaitable[web.StreamResponse]])

_POLICY = "__mooring_policy__"


@dataclass(frozen=True, slots=True)
class Policy:
    """What a route asks for: nothing (`public`) or a scope."""

    scope: str | None


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling, as the authenticator found out."""

    name: str
    scopes: frozenset[str]
    data: Mapping[str, Any] = field(default_factory=dict)  # Any: claims, by authenticator


Authenticator = Callable[[web.Request], Awaitable[Principal]]

PRINCIPAL: web.RequestKey[Principal] = web.RequestKey("principal", Principal)


def public(handler: F) -> F:
    """The route is open to everybody who reaches the port."""
    setattr(handler, _POLICY, Policy(None))
    return handler


def require(scope: str) -> Callable[[F], F]:
    """The route needs a principal with `scope`."""

    def mark(handler: F) -> F:
        setattr(handler, _POLICY, Policy(scope))
        return handler

    return mark


def policy_of(handler: object) -> Policy | None:
    return getattr(handler, _POLICY, None)


def check_policies(app: web.Application) -> None:
    """Raises RuntimeError for a route without a policy; called before an application is served."""
    for route in app.router.routes():
        if policy_of(route.handler) is None:
            raise RuntimeError(f"route {route.method} {route.resource} declares no access policy")


def authenticated(authenticator: Authenticator) -> Middleware:
    """The middleware. Unmatched routes pass through to aiohttp's 404 and 405, which tell nothing."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.match_info.http_exception is not None:
            return await handler(request)
        policy = policy_of(request.match_info.handler)
        if policy is None:
            raise Forbidden("This route declares no access policy.")
        if policy.scope is None:
            return await handler(request)
        principal = await authenticator(request)
        if policy.scope not in principal.scopes:
            raise Forbidden(f"{principal.name} may not do this.", hint=f"It needs the scope {policy.scope!r}.")
        request[PRINCIPAL] = principal
        return await handler(request)

    return middleware
