"""Routes of agents, for agents and admins."""

from __future__ import annotations

from aiohttp import web

from storage_proxy.client.manager import PageQuery, RegisterAgentRequest
from storage_proxy.core.ids import parse_agent_id
from storage_proxy.web import json_answer, read_json, read_query, require

from ..services import Agents
from .auth import caller


class AgentHandlers:
    def __init__(self, agents: Agents) -> None:
        self._agents = agents

    def routes(self) -> list[web.RouteDef]:
        return [web.put("/v1/agents/{agent}", self.register), web.get("/v1/agents", self.page)]

    @require("agent")
    async def register(self, request: web.Request) -> web.Response:
        agent_id = parse_agent_id(request.match_info["agent"])
        body = await read_json(request, RegisterAgentRequest)
        return json_answer(await self._agents.register(caller(request), agent_id, body))

    @require("agent")
    async def page(self, request: web.Request) -> web.Response:
        return json_answer(await self._agents.page(read_query(request, PageQuery)))
