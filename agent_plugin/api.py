"""The local HTTP API of the agent, on a unix socket. Handlers parse, call the manager, render.

Only the configured users get in (`peers`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime

from aiohttp import web
from pydantic import Field

from storage_proxy import __version__
from storage_proxy.client.agent import (
    AgentIdentity,
    AgentStatus,
    AttachmentInfo,
    AttachmentsAnswer,
    AttachRequest,
    DetachAnswer,
    GcAnswer,
    GcRequest,
    MountInfo,
    MountsAnswer,
    RenewAnswer,
)
from storage_proxy.core.errors import InvalidIdentifier
from storage_proxy.core.ids import SessionID, parse_session_id
from storage_proxy.core.wire import Ownership, Wire
from storage_proxy.web import (
    HealthCheck,
    authenticated,
    edge_middleware,
    health_routes,
    json_answer,
    read_json,
    require,
)

from .attachments import NODE, Attachments
from .drivers import DriverInfo
from .journal import AttachmentRecord, MountRecord
from .metrics import AgentMetrics, metrics_route
from .peers import LOCAL, peer_authenticator
from .renewal import Renewals
from .status import StatusPublisher

_HEX = frozenset("0123456789abcdef")


class DriverStatus(Wire):
    """A driver of this node. `lists_bucket`: see `drivers.DriverInfo`; whoever issues credentials must know it."""

    name: str
    available: bool
    version: str = ""
    lists_bucket: bool = False
    error: str | None = None


class RedisStatus(Wire):
    """Whether this node is reported to Redis, when that last got through, and what is wrong now."""

    configured: bool
    told_at: datetime | None = None
    error: str | None = None

    @classmethod
    def of(cls, publisher: StatusPublisher | None) -> RedisStatus:
        if publisher is None:
            return cls(configured=False)
        told = publisher.last_success
        return cls(configured=True, told_at=None if told is None else _time(told), error=publisher.last_error)


class NodeStatus(AgentStatus):
    """The whole status; a client may know the base only. `draining`: the node refuses new attachments;
    `draining_mounts` of it do in any case."""

    pid: int
    uptime_seconds: float
    mounts_by_state: dict[str, int] = {}
    max_mounts: int
    drivers: list[DriverStatus] = []
    draining: bool = False
    draining_mounts: int = 0
    redis: RedisStatus


class MountDetail(MountInfo):
    """A mount with all that is known of it here."""

    volume: str
    endpoint: str
    ownership: Ownership
    credential_id: str = Field(description="Name of the credential, not the credential.")
    credential_expires_at: datetime | None = None


class AgentApi:
    """The handlers. `drivers` looks at the drivers, `warnings` says what an operator should look at; without a
    `publisher` nothing is told to Redis."""

    def __init__(
        self,
        *,
        agent_id: str,
        public_key: str,
        attachments: Attachments,
        renewals: Renewals,
        max_mounts: int,
        pid: int,
        drivers: Callable[[], Sequence[DriverStatus]],
        warnings: Callable[[], list[str]],
        publisher: StatusPublisher | None,
    ) -> None:
        self._identity = AgentIdentity(agent_id=agent_id, public_key=public_key)
        self._attachments = attachments
        self._renewals = renewals
        self._max_mounts = max_mounts
        self._pid = pid
        self._drivers = drivers
        self._warnings = warnings
        self._publisher = publisher
        self._started = time.monotonic()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/status", self.status),
            web.get("/v1/identity", self.identity),
            web.post("/v1/attachments", self.attach),
            web.get("/v1/attachments", self.list_attachments),
            web.delete("/v1/attachments/{session}/{folder}", self.detach),
            web.post("/v1/attachments/{session}/{folder}/renew", self.renew),
            web.delete("/v1/sessions/{session}", self.detach_session),
            web.get("/v1/mounts", self.list_mounts),
            web.post("/v1/mounts/gc", self.collect),
        ]

    @require(LOCAL)
    async def status(self, _: web.Request) -> web.Response:
        mounts = self._attachments.mounts()
        by_state: dict[str, int] = {}
        for record, _items in mounts:
            by_state[record.state.value] = by_state.get(record.state.value, 0) + 1
        drivers = list(self._drivers())
        warnings = self._warnings()
        warnings += [driver.error for driver in drivers if driver.error]
        return json_answer(
            NodeStatus(
                agent_id=self._identity.agent_id,
                version=__version__,
                status="degraded" if warnings else "ok",
                mounts=len(mounts),
                attachments=sum(len(items) for _, items in mounts),
                warnings=warnings,
                pid=self._pid,
                uptime_seconds=round(time.monotonic() - self._started, 1),
                mounts_by_state=by_state,
                max_mounts=self._max_mounts,
                drivers=drivers,
                draining=self._attachments.draining,
                draining_mounts=len(self._attachments.drains - {NODE}),
                redis=RedisStatus.of(self._publisher),
            )
        )

    @require(LOCAL)
    async def identity(self, _: web.Request) -> web.Response:
        return json_answer(self._identity)

    @require(LOCAL)
    async def attach(self, request: web.Request) -> web.Response:
        body = await read_json(request, AttachRequest)
        return json_answer(await self._attachments.attach(body.grant), status=201)

    @require(LOCAL)
    async def list_attachments(self, _: web.Request) -> web.Response:
        return json_answer(
            AttachmentsAnswer(
                attachments=[
                    AttachmentInfo(
                        session_id=item.session,
                        vfid=str(item.vfid),
                        mount_key=item.key,
                        mode=plan.mode,
                        target=item.target,
                        source=self._attachments.spec(item, plan).source,
                        since=_time(item.since),
                    )
                    for item, plan in self._attachments.attachments()
                ]
            )
        )

    @require(LOCAL)
    async def detach_session(self, request: web.Request) -> web.Response:
        session = parse_session_id(request.match_info["session"])
        return json_answer(DetachAnswer(detached=await self._attachments.detach_session(session)))

    @require(LOCAL)
    async def detach(self, request: web.Request) -> web.Response:
        session, folder = _named(request)
        return json_answer(DetachAnswer(detached=await self._attachments.detach(session, folder)))

    @require(LOCAL)
    async def renew(self, request: web.Request) -> web.Response:
        session, folder = _named(request)
        body = await read_json(request, AttachRequest)
        record = await self._renewals.push(session, folder, body.grant)
        ends = None if record.credential_expires is None else _time(record.credential_expires)
        return json_answer(RenewAnswer(mount_key=record.key, credential_expires_at=ends))

    @require(LOCAL)
    async def list_mounts(self, _: web.Request) -> web.Response:
        return json_answer(
            MountsAnswer(mounts=[self._detail(record, items) for record, items in self._attachments.mounts()])
        )

    @require(LOCAL)
    async def collect(self, request: web.Request) -> web.Response:
        body = await read_json(request, GcRequest)
        return json_answer(GcAnswer(drained=await self._attachments.collect(body.grace)))

    def _detail(self, record: MountRecord, items: Sequence[AttachmentRecord]) -> MountDetail:
        plan, entry = record.plan, self._attachments.entry(record.key)
        return MountDetail(
            key=record.key,
            state=record.state,
            since=_time(record.since),
            driver=plan.driver,
            pid=record.process.pid if record.process else None,
            bucket=plan.location.bucket,
            prefix=plan.location.prefix,
            mode=plan.mode,
            sessions=sorted({item.session for item in items}),
            last_error=record.last_error,
            trouble=entry.trouble if entry else None,
            unresponsive=entry.unresponsive if entry else None,
            attachments=len(items),
            repairs=record.repairs,
            volume=plan.volume,
            endpoint=plan.location.endpoint,
            ownership=plan.ownership,
            credential_id=plan.credential_id,
            credential_expires_at=None if record.credential_expires is None else _time(record.credential_expires),
        )


def _named(request: web.Request) -> tuple[SessionID, str]:
    """Session and folder of an attachment, from the address."""
    folder = request.match_info["folder"].lower()
    if len(folder) != 32 or not _HEX.issuperset(folder):
        raise InvalidIdentifier("The folder is not named by 32 hex digits.", hint="Take the part after the slash.")
    return parse_session_id(request.match_info["session"]), folder


def make_app(
    api: AgentApi, allowed_uids: Collection[int], checks: Sequence[HealthCheck], metrics: AgentMetrics
) -> web.Application:
    app = web.Application(
        middlewares=[metrics.middleware(), edge_middleware, authenticated(peer_authenticator(allowed_uids))]
    )
    app.add_routes(api.routes())
    app.add_routes(health_routes("agent", checks))
    app.add_routes([metrics_route(metrics, local=True)])
    return app


def driver_status(info: DriverInfo) -> DriverStatus:
    return DriverStatus(name=info.name, available=True, version=info.version, lists_bucket=info.lists_bucket)


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
