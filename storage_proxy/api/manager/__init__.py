"""The API for managers: Backend.AI's wire, with additive fields. Every request carries the secret of its manager."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from ...core.errors import AccessError
from ...web import HealthCheck, Principal, authenticated, edge_middleware, health_routes
from ..services import SERVICES, Services
from . import credentials, files, folders, storages, volumes

AUTH_HEADER = "X-BackendAI-Storage-Auth-Token"


async def authenticate(request: web.Request) -> Principal:
    """Compares with every secret, always all of them, each in constant time."""
    given = request.headers.get(AUTH_HEADER)
    if not given:
        raise AccessError(
            "The request has no manager secret.",
            hint=f"Send it in the header {AUTH_HEADER}.",
            title="Forbidden (missing auth token)",
        )
    matches = [secret.equals(given) for secret in request.app[SERVICES].manager_secrets]
    if not any(matches):
        raise AccessError(
            "The manager secret is not accepted.",
            hint="Give both sides the same secret.",
            title="Forbidden (invalid auth token)",
        )
    return Principal(f"manager {matches.index(True) + 1}", frozenset({"manager"}))


def manager_app(services: Services, checks: Sequence[HealthCheck]) -> web.Application:
    app = web.Application(
        middlewares=[services.metrics.middleware("manager"), edge_middleware, authenticated(authenticate)]
    )
    app[SERVICES] = services
    for routes in (volumes.routes, folders.routes, files.routes, credentials.routes, storages.routes):
        app.add_routes(routes)
    app.add_routes(health_routes("storage-proxy", checks))
    app.on_shutdown.append(_end_streams)
    return app


async def _end_streams(app: web.Application) -> None:
    """Streams would hold the shutdown up until its deadline."""
    nodes = app[SERVICES].storages
    if nodes is not None:
        await nodes.end_streams()
