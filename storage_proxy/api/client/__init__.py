"""The API for clients: an untrusted network, a token for every request, any origin (a token is not a cookie)."""

from __future__ import annotations

from aiohttp import web

from ... import __version__
from ...web import authenticated, edge_middleware, json_answer, public
from ..services import SERVICES, Services
from ..tokens import authenticate
from . import download, upload

_TUS_HEADERS = "Tus-Resumable, Upload-Length, Upload-Metadata, Upload-Offset, Upload-Checksum, Content-Type"
CORS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "*",
    "Access-Control-Allow-Headers": f"{_TUS_HEADERS}, Range, If-Range",
    "Access-Control-Expose-Headers": f"{_TUS_HEADERS}, ETag, Content-Range, Content-Disposition, X-Request-ID",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the token is in the URL
}


@public
async def status(_: web.Request) -> web.Response:
    return json_answer({"status": "ok", "type": "client-facing", "storage-proxy": __version__})


async def _add_cors(_: web.Request, response: web.StreamResponse) -> None:
    for name, value in CORS.items():
        response.headers.setdefault(name, value)


def client_app(services: Services) -> web.Application:
    app = web.Application(
        middlewares=[services.metrics.middleware("client"), edge_middleware, authenticated(authenticate)]
    )
    app[SERVICES] = services
    app.on_response_prepare.append(_add_cors)
    app.router.add_get("/", status)
    for routes in (download.routes, upload.routes):
        app.add_routes(routes)
    return app
