"""Routes of credentials. Keys go in and never come out."""

from __future__ import annotations

from aiohttp import web

from storage_proxy.client.manager import CreateCredentialRequest, PageQuery
from storage_proxy.web import json_answer, read_json, read_query, require

from ..services import Credentials
from .auth import caller


class CredentialHandlers:
    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/credentials", self.create),
            web.get("/v1/credentials", self.page),
            web.delete("/v1/credentials/{credential}", self.delete),
        ]

    @require("user")
    async def create(self, request: web.Request) -> web.Response:
        body = await read_json(request, CreateCredentialRequest)
        return json_answer(await self._credentials.create(caller(request), body), status=201)

    @require("user")
    async def page(self, request: web.Request) -> web.Response:
        return json_answer(await self._credentials.page(caller(request), read_query(request, PageQuery)))

    @require("user")
    async def delete(self, request: web.Request) -> web.Response:
        await self._credentials.delete(caller(request), request.match_info["credential"])
        return web.Response(status=204)
