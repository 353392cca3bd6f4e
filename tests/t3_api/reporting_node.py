"""A node that only reports: the agent's real publisher, told of mounts that nobody made."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

from agent_plugin.attachments import Attachments
from agent_plugin.config import RedisSection
from agent_plugin.drivers import MountPlan
from agent_plugin.eventlog import EventLog
from agent_plugin.events import Event, EventKind
from agent_plugin.journal import AttachmentRecord, AttachmentState, MountRecord
from agent_plugin.keys import Entry
from agent_plugin.resources import Usage
from agent_plugin.status import StatusPublisher
from agent_plugin.supervisor import ProcessID
from storage_proxy.core.ids import AccessMode, MountKey, QuotaScopeID, SessionID, VFolderID
from storage_proxy.core.wire import Location, MountState
from tests.redis_server import RedisServer

PROCESS = ProcessID(4711, 1)
SCOPE = QuotaScopeID.parse(f"user:{uuid.UUID(int=9)}")


@dataclass
class Reported:
    """What the publisher asks an agent for."""

    found: list[tuple[MountRecord, list[AttachmentRecord]]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    listeners: list[Callable[[Event], None]] = field(default_factory=list)
    draining: bool = False
    usages: dict[MountKey, Usage] = field(default_factory=dict)
    entries: dict[MountKey, Entry] = field(default_factory=dict)

    def mounts(self) -> list[tuple[MountRecord, list[AttachmentRecord]]]:
        return self.found

    def warnings(self) -> list[str]:
        return self.said

    def entry(self, key: MountKey) -> Entry | None:
        return self.entries.get(key)

    def listen(self, listener: Callable[[Event], None]) -> None:
        self.listeners.append(listener)

    def add(
        self, volume: str, bucket: str, *sessions: str, state: MountState = MountState.LIVE, error: str | None = None
    ) -> MountPlan:
        """One mount with an attachment for each session."""
        plan = MountPlan(
            key=MountKey(uuid.uuid4().hex),
            driver="s3fs",
            volume=volume,
            location=Location(endpoint="http://127.0.0.1:9", bucket=bucket),
            mode=AccessMode.READ_WRITE,
            credential_id="admin",
        )
        record = MountRecord(plan, state, time.time(), "0" * 32, PROCESS, "0:99", error)
        items = [
            AttachmentRecord(
                session=SessionID(session),
                vfid=VFolderID.new(SCOPE),
                key=plan.key,
                target="/data",
                state=AttachmentState.BOUND,
                since=time.time(),
                grant_id=uuid.uuid4().hex,
            )
            for session in sessions
        ]
        self.found.append((record, items))
        self.entries[plan.key] = Entry(record=record)
        self.happens(plan, MountState.STAGING, state, error)
        return plan

    def happens(self, plan: MountPlan, old: MountState, new: MountState, error: str | None = None) -> None:
        for listener in self.listeners:
            listener(Event(time.time(), EventKind.STATE, plan.key, plan, old, new, error))


@dataclass
class ReportingNode:
    agent_id: str
    told: Reported
    publisher: StatusPublisher
    task: asyncio.Task[None]

    async def stop(self) -> None:
        """In order."""
        self.task.cancel()
        await asyncio.wait([self.task])

    async def vanish(self) -> None:
        """As `kill -9` does: no word is said."""

        async def silence(_: object) -> None: ...

        self.publisher.take_leave = silence  # type: ignore[method-assign]
        await self.stop()


@asynccontextmanager
async def reporting(
    server: RedisServer, agent_id: str, *, heartbeat: float = 0.2, ttl: float = 1.0, mounts_stay: bool = True
) -> AsyncIterator[ReportingNode]:
    told = Reported()
    config = RedisSection(url=server.url, heartbeat=heartbeat, ttl=ttl, retention=60)
    log = EventLog(agent_id)
    told.listen(log.note)
    publisher = StatusPublisher(config, cast("Attachments", told), log, told.usages.get, mounts_stay=mounts_stay)
    node = ReportingNode(agent_id, told, publisher, asyncio.create_task(publisher.run()))
    try:
        yield node
    finally:
        await node.stop()
