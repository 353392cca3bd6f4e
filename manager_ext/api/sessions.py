"""Routes of sessions."""

from __future__ import annotations

from aiohttp import web

from storage_proxy.client.manager import CreateSessionRequest
from storage_proxy.core.ids import parse_session_id
from storage_proxy.web import json_answer, read_json, require

from ..services import Sessions
from .auth import caller


class SessionHandlers:
    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def routes(self) -> list[web.RouteDef]:
        one = "/v1/sessions/{session}"
        return [
            web.post("/v1/sessions", self.create),
            web.get(one, self.get),
            web.delete(one, self.delete),
            web.post("/v1/sessions/{session}/mounts/{folder}/grant", self.renew),
        ]

    @require("user")
    async def create(self, request: web.Request) -> web.Response:
        body = await read_json(request, CreateSessionRequest)
        return json_answer(await self._sessions.create(caller(request), body), status=201)

    @require("user")
    async def get(self, request: web.Request) -> web.Response:
        session_id = parse_session_id(request.match_info["session"])
        return json_answer(await self._sessions.get(caller(request), session_id))

    @require("user")
    async def delete(self, request: web.Request) -> web.Response:
        session_id = parse_session_id(request.match_info["session"])
        await self._sessions.delete(caller(request), session_id)
        return web.Response(status=204)

    @require("grant")
    async def renew(self, request: web.Request) -> web.Response:
        session_id = parse_session_id(request.match_info["session"])
        return json_answer(await self._sessions.renew(caller(request), session_id, request.match_info["folder"]))
