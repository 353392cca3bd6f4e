"""Health and metrics: for the operator's own network, without authentication."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from ...web import HealthCheck, edge_middleware, health_routes, public
from ..services import SERVICES, Services


@public
async def metrics(request: web.Request) -> web.Response:
    headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
    return web.Response(body=request.app[SERVICES].metrics.render(), headers=headers)


def internal_app(services: Services, checks: Sequence[HealthCheck]) -> web.Application:
    app = web.Application(middlewares=[edge_middleware])
    app[SERVICES] = services
    app.add_routes(health_routes("storage-proxy", checks))
    app.router.add_get("/metrics", metrics)
    return app
