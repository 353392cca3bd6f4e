"""The volume plugin protocol of Docker, which Podman speaks too, on a unix socket of its own.

https://docs.docker.com/engine/extend/plugins_volume/ is the text; what Podman 4.3 does was found by trial: it activates
the plugin before every command, asks `Get` and expects an error before it creates, shows `Err` of an answer with status
500 to the user word by word, waits for five seconds, and drops connections without a word. Handlers parse, call
`Volumes`, render.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Mapping
from datetime import UTC, datetime

from aiohttp import web

from storage_proxy.core.errors import MooringError
from storage_proxy.core.logs import get_logger
from storage_proxy.core.wire import Wire
from storage_proxy.web import authenticated, edge_middleware, read_json, require

from ..peers import LOCAL, peer_authenticator
from .volumes import Volumes, VolumeView

log = get_logger(__name__)

CONTENT_TYPE = "application/vnd.docker.plugins.v1.1+json"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Named(Wire):
    Name: str


class _Creation(_Named):
    Opts: dict[str, str] | None = None


class _Use(_Named):
    """`ID` tells the mounts of one volume apart; Podman sends the same one always, and so could leave it out."""

    ID: str = "none"


class VolumePlugin:
    """The handlers."""

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/Plugin.Activate", self.activate),
            web.post("/VolumeDriver.Capabilities", self.capabilities),
            web.post("/VolumeDriver.Create", self.create),
            web.post("/VolumeDriver.Get", self.get),
            web.post("/VolumeDriver.List", self.list),
            web.post("/VolumeDriver.Mount", self.mount),
            web.post("/VolumeDriver.Path", self.path),
            web.post("/VolumeDriver.Remove", self.remove),
            web.post("/VolumeDriver.Unmount", self.unmount),
        ]

    @require(LOCAL)
    async def activate(self, _: web.Request) -> web.Response:
        return _answer({"Implements": ["VolumeDriver"]})

    @require(LOCAL)
    async def capabilities(self, _: web.Request) -> web.Response:
        return _answer({"Capabilities": {"Scope": "local"}})

    @require(LOCAL)
    async def create(self, request: web.Request) -> web.Response:
        body = await read_json(request, _Creation)
        await self._volumes.create(body.Name, body.Opts or {})
        return _answer({})

    @require(LOCAL)
    async def get(self, request: web.Request) -> web.Response:
        body = await read_json(request, _Named)
        view = self._volumes.get(body.Name)
        return _answer({"Volume": {**_shown(view), "Status": dict(view.status)}})

    @require(LOCAL)
    async def list(self, _: web.Request) -> web.Response:
        return _answer({"Volumes": [_shown(view) for view in self._volumes.all()]})

    @require(LOCAL)
    async def mount(self, request: web.Request) -> web.Response:
        body = await read_json(request, _Use)
        return _answer({"Mountpoint": str(await self._volumes.mount(body.Name, body.ID))})

    @require(LOCAL)
    async def path(self, request: web.Request) -> web.Response:
        body = await read_json(request, _Named)
        return _answer({"Mountpoint": str(self._volumes.get(body.Name).mountpoint or "")})

    @require(LOCAL)
    async def remove(self, request: web.Request) -> web.Response:
        body = await read_json(request, _Named)
        await self._volumes.remove(body.Name)
        return _answer({})

    @require(LOCAL)
    async def unmount(self, request: web.Request) -> web.Response:
        body = await read_json(request, _Use)
        await self._volumes.unmount(body.Name, body.ID)
        return _answer({})


@web.middleware
async def _protocol_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The error answers of this protocol, which knows no problem documents. The status 404 tells an engine that a call
    does not exist; every other error is a 500."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _answer({"Err": f"The volume plugin has no call {request.path[:80]} ({error.reason})."}, error.status)
    except MooringError as error:
        log.log(error.log_level, error.message, error_code=error.code, detail=error.detail, path=request.path)
        return _answer({"Err": str(error)}, 500)
    except (asyncio.CancelledError, ConnectionResetError):
        raise
    except Exception as error:
        log.exception("unexpected error", path=request.path)
        text = f"An unexpected {type(error).__name__} happened in the volume plugin. Look into the log of the agent."
        return _answer({"Err": text}, 500)


def make_plugin_app(volumes: Volumes, allowed_uids: Collection[int]) -> web.Application:
    """The application for the plugin's socket. Only processes of these users are served."""
    who = authenticated(peer_authenticator(allowed_uids, setting="[volume-plugin] allowed-uids"))
    app = web.Application(middlewares=[edge_middleware, _protocol_errors, who])
    app.add_routes(VolumePlugin(volumes).routes())
    return app


def _shown(view: VolumeView) -> dict[str, object]:
    return {
        "Name": view.name,
        "Mountpoint": str(view.mountpoint or ""),
        "CreatedAt": datetime.fromtimestamp(view.created, UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    }


def _answer(body: Mapping[str, object], status: int = 200) -> web.Response:
    # As bytes: with a text there would be a charset behind the type.
    return web.Response(status=status, body=json.dumps(body).encode(), headers={"Content-Type": CONTENT_TYPE})
