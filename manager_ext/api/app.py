"""The application: every route with its policy, behind one authentication middleware."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web

from storage_proxy.web import HealthCheck, authenticated, check_policies, edge_middleware, health_routes

from ..services import Agents, Credentials, Folders, NodeFolders, Sessions
from .agents import AgentHandlers
from .auth import TokenAuth
from .credentials import CredentialHandlers
from .folders import FolderHandlers
from .sessions import SessionHandlers


@dataclass(frozen=True, slots=True)
class Services:
    """The use cases that the routes call."""

    folders: Folders
    credentials: Credentials
    agents: Agents
    sessions: Sessions
    node_folders: NodeFolders


def build_app(services: Services, auth: TokenAuth, checks: Sequence[HealthCheck] = ()) -> web.Application:
    app = web.Application(middlewares=[edge_middleware, authenticated(auth)])
    app.add_routes(FolderHandlers(services.folders).routes())
    app.add_routes(CredentialHandlers(services.credentials).routes())
    app.add_routes(AgentHandlers(services.agents, services.node_folders).routes())
    app.add_routes(SessionHandlers(services.sessions).routes())
    app.add_routes(health_routes("manager-ext", checks))
    check_policies(app)
    return app
