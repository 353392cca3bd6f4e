"""Routes of agents, for agents and admins."""

from __future__ import annotations

from aiohttp import web

from storage_proxy.client.manager import NodeFolderRequest, PageQuery, RegisterAgentRequest
from storage_proxy.core.ids import parse_agent_id, parse_session_id
from storage_proxy.web import json_answer, read_json, read_query, require

from ..services import Agents, NodeFolders
from .auth import caller


class AgentHandlers:
    def __init__(self, agents: Agents, node_folders: NodeFolders) -> None:
        self._agents = agents
        self._node_folders = node_folders

    def routes(self) -> list[web.RouteDef]:
        return [
            web.put("/v1/agents/{agent}", self.register),
            web.get("/v1/agents", self.page),
            web.post("/v1/agents/{agent}/folders", self.grant_folder),
            web.get("/v1/agents/{agent}/folders", self.folders),
            web.delete("/v1/agents/{agent}/folders/{session}", self.end_folder),
        ]

    @require("agent")
    async def register(self, request: web.Request) -> web.Response:
        agent_id = parse_agent_id(request.match_info["agent"])
        body = await read_json(request, RegisterAgentRequest)
        return json_answer(await self._agents.register(caller(request), agent_id, body))

    @require("agent")
    async def page(self, request: web.Request) -> web.Response:
        return json_answer(await self._agents.page(read_query(request, PageQuery)))

    @require("agent")
    async def grant_folder(self, request: web.Request) -> web.Response:
        agent_id = parse_agent_id(request.match_info["agent"])
        body = await read_json(request, NodeFolderRequest)
        return json_answer(await self._node_folders.grant(caller(request), agent_id, body), status=201)

    @require("agent")
    async def folders(self, request: web.Request) -> web.Response:
        agent_id = parse_agent_id(request.match_info["agent"])
        return json_answer(await self._node_folders.page(caller(request), agent_id, read_query(request, PageQuery)))

    @require("agent")
    async def end_folder(self, request: web.Request) -> web.Response:
        agent_id = parse_agent_id(request.match_info["agent"])
        session_id = parse_session_id(request.match_info["session"])
        await self._node_folders.end(caller(request), agent_id, session_id)
        return web.Response(status=204)
