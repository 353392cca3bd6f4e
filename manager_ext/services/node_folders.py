"""Folders for a whole node: what an agent may mount on its own word, without a session of ours.

A Backend.AI agent binds what its own manager allowed; which session that was, and whether its user may, is decided
there and not told to us. So whoever runs that manager is trusted with every folder of the volume on that node, and it
is the operator who says so here, by volume and agent (`[node-wide.VOLUME] agents`). Nobody else gets anything.

What is handed out stands as a session of the owner `node`, with one mount: it holds the folder, its credential is
renewed and revoked like any other.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from sqlalchemy import select

from storage_proxy.client.manager import (
    CreateSessionRequest,
    HeldNodeFolder,
    MountAsked,
    NodeFolder,
    NodeFolderRequest,
    NodeFoldersPage,
    PageQuery,
)
from storage_proxy.core.errors import Forbidden, MooringError, VFolderNotFound
from storage_proxy.core.ids import VFolderID
from storage_proxy.core.logs import get_logger
from storage_proxy.db import Database

from ..config import NodeWideEntry
from ..models import FolderRow, SessionMountRow, SessionRow
from ..models.folders import FolderState
from .agents import Agents
from .caller import Caller
from .paging import decode_cursor, encode_cursor
from .proxies import Proxies
from .sessions import NODE_OWNER, NODE_SESSION_PREFIX, Sessions

log = get_logger(__name__)


class NodeFolders:
    """`permitted`: by volume, as written in the configuration (`volume` or `proxy:volume`)."""

    def __init__(
        self,
        db: Database,
        *,
        agents: Agents,
        proxies: Proxies,
        sessions: Sessions,
        permitted: Mapping[str, NodeWideEntry],
    ) -> None:
        self._db = db
        self._agents = agents
        self._proxies = proxies
        self._sessions = sessions
        self._permitted: dict[tuple[str, str], NodeWideEntry] = {}
        for name, entry in permitted.items():
            proxy, volume = proxies.resolve(name)
            self._permitted[proxy.name, volume] = entry

    async def grant(self, caller: Caller, agent_id: str, request: NodeFolderRequest) -> NodeFolder:
        """Permits the agent to mount one folder, and ends what it was given for this folder before.

        Raises `Forbidden` (not this agent's token; a volume that is not open to it), `VFolderNotFound`,
        `RecordNotFound` (the agent has not registered), and what the storage proxy raises.
        """
        await self._agents.check_own(caller, agent_id)
        proxy, volume, entry = self._opened(agent_id, request.volume)
        folder_id = uuid.UUID(request.folder)
        async with self._db.session() as session:
            folder = await session.get(FolderRow, folder_id)
            if (
                folder is None
                or folder.state is not FolderState.READY
                or (folder.proxy, folder.volume) != (proxy, volume)
                or VFolderID.parse(folder.vfid).scope.hex != request.scope
            ):
                raise VFolderNotFound(
                    f"Volume {request.volume!r} has no folder {request.folder} in the scope {request.scope}.",
                    hint="Create or bind it first.",
                )
            vfid = VFolderID.parse(folder.vfid)
            former = (
                await session.scalars(
                    select(SessionRow.id)
                    .join(SessionMountRow)
                    .where(
                        SessionRow.owner == NODE_OWNER,
                        SessionRow.agent_id == agent_id,
                        SessionMountRow.folder_id == folder_id,
                    )
                )
            ).all()
        plan = await self._sessions.create_for_node(
            CreateSessionRequest(
                session_id=f"{NODE_SESSION_PREFIX}{uuid.uuid4().hex}",
                agent_id=agent_id,
                mounts=[MountAsked(folder=str(folder_id), target=f"/vfroot/{volume}/{vfid.managed_prefix.strip('/')}")],
                uid=entry.uid,
                gid=entry.gid,
                umask=entry.umask,
            )
        )
        # An agent asks only for what it has not mounted, so whatever it got before is not in use any more.
        for session_id in former:
            try:
                await self._sessions.end_for_node(session_id)
            except MooringError as err:  # it stays in state `ending`, and the janitor goes on with it
                log.info("a former grant of a node waits for its end", session_id=session_id, cause=err.message)
        mount = plan.mounts[0]
        log.info("folder granted to a node", agent_id=agent_id, vfid=mount.vfid, session_id=plan.session_id)
        return NodeFolder(
            session_id=plan.session_id,
            vfid=mount.vfid,
            mode=mount.mode,
            grant=mount.grant,
            expires_at=mount.expires_at,
        )

    async def page(self, caller: Caller, agent_id: str, query: PageQuery) -> NodeFoldersPage:
        """What `grant` gave to the agent and was not ended. Raises `Forbidden`."""
        await self._agents.check_own(caller, agent_id)
        statement = (
            select(SessionRow)
            .where(SessionRow.owner == NODE_OWNER, SessionRow.agent_id == agent_id)
            .order_by(SessionRow.id)
            .limit(query.limit + 1)
        )
        if query.cursor:
            statement = statement.where(SessionRow.id > decode_cursor(query.cursor, 1)[0])
        async with self._db.session() as session:
            rows = (await session.scalars(statement)).all()
        items = [
            HeldNodeFolder(
                session_id=row.id, vfid=mount.vfid, volume=mount.volume, mode=mount.mode, created_at=row.created_at
            )
            for row in rows[: query.limit]
            for mount in row.mounts
        ]
        more = len(rows) > query.limit
        return NodeFoldersPage(items=items, next_cursor=encode_cursor([rows[query.limit - 1].id]) if more else None)

    async def end(self, caller: Caller, agent_id: str, session_id: str) -> None:
        """Revokes what `grant` gave. Idempotent: a session that is not there, or is none of this agent's folders,
        counts as ended and nothing happens. Raises `Forbidden`, and what the proxy raises; repeat the call then.
        """
        await self._agents.check_own(caller, agent_id)
        async with self._db.session() as session:
            row = await session.get(SessionRow, session_id)
            if row is None or (row.owner, row.agent_id) != (NODE_OWNER, agent_id):
                return
        await self._sessions.end_for_node(session_id)
        log.info("folder taken back from a node", agent_id=agent_id, session_id=session_id)

    def _opened(self, agent_id: str, host: str) -> tuple[str, str, NodeWideEntry]:
        """Proxy, volume and what was configured for them. One answer for what is unknown and for what is closed."""
        try:
            proxy, volume = self._proxies.resolve(host)
        except MooringError:
            raise self._closed(agent_id, host) from None
        entry = self._permitted.get((proxy.name, volume))
        if entry is None or agent_id not in entry.agents:
            raise self._closed(agent_id, host)
        return proxy.name, volume, entry

    @staticmethod
    def _closed(agent_id: str, host: str) -> Forbidden:
        return Forbidden(
            f"Volume {host!r} is not open to agent {agent_id!r} as a whole.",
            hint=f"An operator adds the agent to [node-wide.{host}] agents in the manager extension's configuration.",
        )
