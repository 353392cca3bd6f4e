"""Agents register the key that credentials for them are sealed to."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError as RowExists

from storage_proxy.client.manager import Agent, AgentsPage, PageQuery, RegisterAgentRequest, is_uuid
from storage_proxy.core.crypto import seal
from storage_proxy.core.errors import Forbidden, InvalidRequest, RecordNotFound, UsageError
from storage_proxy.core.logs import get_logger
from storage_proxy.core.secrets import Secret
from storage_proxy.db import Database

from ..models import AgentRow
from .caller import Caller, Role
from .paging import decode_cursor, encode_cursor

log = get_logger(__name__)


class Agents:
    """Use cases about agents; the routes admit only roles agent and admin."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def register(self, caller: Caller, agent_id: str, request: RegisterAgentRequest) -> Agent:
        """Idempotent. A token whose subject is an agent's id registers that agent only; one whose subject is a UUID any
        that is new. A changed key is taken only from who registered the agent first, or from an admin, because
        whoever owns the key reads the credentials of every later session on that agent."""
        if caller.role is Role.AGENT and not is_uuid(caller.subject) and caller.subject != agent_id:
            raise Forbidden(f"This token is for agent {caller.subject!r}.", hint="Use the token of this agent.")
        _check_key(request.public_key)
        try:
            return await self._put(caller, agent_id, request.public_key)
        except RowExists:  # two registrations at once: the second one finds the row now
            return await self._put(caller, agent_id, request.public_key)

    async def _put(self, caller: Caller, agent_id: str, public_key: str) -> Agent:
        async with self._db.session() as session:
            row = await session.get(AgentRow, agent_id, with_for_update=True)
            if row is None:
                row = AgentRow(id=agent_id, public_key=public_key, registered_by=caller.subject)
                session.add(row)
            elif row.public_key != public_key:
                if caller.role is not Role.ADMIN and row.registered_by != caller.subject:
                    raise Forbidden(
                        f"Agent {agent_id!r} was registered by another subject with another key.",
                        hint="Use the token that registered it, or ask an admin to register the new key.",
                    )
                row.public_key = public_key
                log.info("agent key changed", agent_id=agent_id, subject=caller.subject)
            await session.flush()
            return _shown(row)

    async def page(self, query: PageQuery) -> AgentsPage:
        statement = select(AgentRow).order_by(AgentRow.id).limit(query.limit + 1)
        if query.cursor:
            statement = statement.where(AgentRow.id > decode_cursor(query.cursor, 1)[0])
        async with self._db.session() as session:
            rows = (await session.scalars(statement)).all()
        more = len(rows) > query.limit
        items = [_shown(row) for row in rows[: query.limit]]
        return AgentsPage(items=items, next_cursor=encode_cursor([items[-1].agent_id]) if more else None)

    async def check_own(self, caller: Caller, agent_id: str) -> None:
        """Raises `Forbidden` unless the caller is an admin, this agent, or who registered it. An agent that has not
        registered belongs to nobody yet.
        """
        if caller.role is Role.ADMIN or (caller.role is Role.AGENT and caller.subject == agent_id):
            return
        async with self._db.session() as session:
            owner = await session.scalar(select(AgentRow.registered_by).where(AgentRow.id == agent_id))
        if caller.role is not Role.AGENT or owner is None or owner != caller.subject:
            raise Forbidden(
                f"This token is not for agent {agent_id!r}.", hint="Use the token that registered the agent."
            )

    async def public_key(self, agent_id: str) -> str:
        """Raises `RecordNotFound` if no such agent has registered."""
        async with self._db.session() as session:
            key = await session.scalar(select(AgentRow.public_key).where(AgentRow.id == agent_id))
        if key is None:
            raise RecordNotFound(
                f"Agent {agent_id!r} has not registered here.",
                hint="Start it with [manager] url in its configuration, or name another agent.",
            )
        return key


def _check_key(public_key: str) -> None:
    try:
        seal(Secret("probe"), public_key, "probe")
    except (UsageError, ValueError):  # ValueError: a point of low order, which shares no secret
        raise InvalidRequest(
            "The public key is not a usable X25519 key.",
            hint="Send what GET /v1/identity of the agent answers.",
            detail={"public_key": "not a usable X25519 key"},
        ) from None


def _shown(row: AgentRow) -> Agent:
    return Agent(agent_id=row.id, public_key=row.public_key, created_at=row.created_at, updated_at=row.updated_at)
