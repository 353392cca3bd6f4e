"""`Noticeboard`: reads what agents wrote (`core.noticeboard`), and remembers it for when Redis is away."""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

import redis.asyncio as redis
from pydantic import ValidationError
from redis.exceptions import RedisError

from ..client.storages import AttachmentStatus, MountStatus, MountsWanted, NodeState, NodeStatus, VolumeCount
from ..core import noticeboard
from ..core.errors import ServiceUnavailable
from ..core.logs import get_logger

log = get_logger(__name__)

R = TypeVar("R", NodeStatus, MountStatus)

READ_SECONDS = 10.0  # some ten thousand mounts
_CHUNK = 200  # keys in one round trip: the loop stays free between two
_COPIES = 64  # answers remembered

Hash = Mapping[str, str]
_What = tuple[str | None, MountsWanted]


@dataclass(frozen=True, slots=True)
class View:
    """What was read, and when: `read_at` by the monotonic clock, `as_of` by the wall's."""

    nodes: list[NodeStatus] = field(default_factory=list)
    mounts: list[MountStatus] = field(default_factory=list)
    attachments: list[AttachmentStatus] = field(default_factory=list)
    unreadable: int = 0
    read_at: float = field(default_factory=time.monotonic)
    as_of: datetime = field(default_factory=lambda: datetime.now(UTC))
    error: str | None = None

    @property
    def age(self) -> float:
        """Seconds since it was true; 0 for what was just read."""
        return time.monotonic() - self.read_at if self.error is not None else 0.0


class Noticeboard:
    """Reads for the given volumes. Callers that ask for the same at the same time share one reading."""

    def __init__(self, client: redis.Redis, volumes: Iterable[str]) -> None:
        self._client: Any = client  # redis-py types its answers for both protocols at once
        self._volumes = sorted(volumes)
        self._copies: OrderedDict[_What, View] = OrderedDict()
        self._running: dict[_What, asyncio.Task[View]] = {}

    async def nodes(self, mounts: MountsWanted) -> View:
        """All nodes, with the mounts that are wanted; without attachments. When Redis does not answer, the last view.

        Raises `ServiceUnavailable` if there is none.
        """
        return await self._read(None, mounts)

    async def node(self, agent_id: str) -> View:
        """One node with mounts and attachments; no node in the view if nothing is known of it. Raises as `nodes`."""
        return await self._read(agent_id, MountsWanted.ALL)

    async def close(self) -> None:
        for task in list(self._running.values()):
            task.cancel()

    async def _read(self, agent_id: str | None, mounts: MountsWanted) -> View:
        what = (agent_id, mounts)
        task = self._running.get(what)
        if task is None:
            task = self._running[what] = asyncio.create_task(self._fetch(agent_id, mounts), name="read noticeboard")
            task.add_done_callback(lambda done: self._ended(what, done))
        try:
            view = await asyncio.shield(task)
        except (RedisError, OSError, TimeoutError) as err:
            reason = f"Redis does not answer ({type(err).__name__})."
            copy = self._copies.get(what)
            if copy is None:
                raise ServiceUnavailable(
                    f"{reason} What the nodes do is not known here.", hint="Mounts do not depend on it. Start Redis."
                ) from None
            age = time.monotonic() - copy.read_at
            return View(
                nodes=[_older(node, age) for node in copy.nodes],
                mounts=[_older(mount, age) for mount in copy.mounts],
                attachments=copy.attachments,
                unreadable=copy.unreadable,
                read_at=copy.read_at,
                as_of=copy.as_of,
                error=reason,
            )
        self._copies[what] = view
        self._copies.move_to_end(what)
        while len(self._copies) > _COPIES:
            self._copies.popitem(last=False)
        return view

    def _ended(self, what: _What, task: asyncio.Task[View]) -> None:
        self._running.pop(what, None)
        if not task.cancelled():
            task.exception()  # looked at, also if every caller has gone

    async def _fetch(self, agent_id: str | None, mounts: MountsWanted) -> View:
        async with asyncio.timeout(READ_SECONDS):
            view = View()
            ids = [agent_id] if agent_id is not None else await self._client.zrange(noticeboard.AGENTS, 0, -1)
            unreadable = 0
            for name, (fields, rest) in zip(ids, await self._hashes_with_rest(ids), strict=True):
                if not fields:
                    continue
                node = _node(fields, rest, self._volumes)
                if node is None:
                    unreadable += 1
                    log.info("the report of a node cannot be read", agent_id=name)
                else:
                    view.nodes.append(node)
            if mounts is not MountsWanted.NONE:
                unreadable += await self._add_mounts(view, mounts)
            if agent_id is not None:
                unreadable += await self._add_attachments(view)
            return View(view.nodes, view.mounts, view.attachments, unreadable)

    async def _hashes_with_rest(self, ids: Sequence[str]) -> list[tuple[Hash, int]]:
        """Per agent its hash, and how many milliseconds that has to live."""
        found: list[tuple[Hash, int]] = []
        for part in _chunks(ids):
            async with self._client.pipeline(transaction=True) as pipe:
                for agent_id in part:
                    pipe.hgetall(noticeboard.agent(agent_id))
                    pipe.pttl(noticeboard.agent(agent_id))
                answers = await pipe.execute()
            found += zip(answers[::2], answers[1::2], strict=True)
        return found

    async def _add_mounts(self, view: View, mounts: MountsWanted) -> int:
        nodes = {node.agent_id: node for node in view.nodes}
        # Of a node that reports it is known which of its mounts are troubled; of one that does not, all are.
        whole = [node for node in view.nodes if mounts is MountsWanted.ALL or node.stale]
        places = [(node.agent_id, volume) for node in whole for volume in node.volumes]
        keys = await self._members([noticeboard.mounts(agent_id, volume) for agent_id, volume in places])
        found = [(agent_id, key) for (agent_id, _), members in zip(places, keys, strict=True) for key in members]
        if mounts is MountsWanted.TROUBLED:
            found += [
                (node.agent_id, key)
                for node in view.nodes
                if not node.stale
                for count in node.volumes.values()
                for key in count.troubled
            ]
        names = [(agent_id, noticeboard.mount(agent_id, key)) for agent_id, key in found]
        unreadable = 0
        for (agent_id, name), fields in zip(names, await self._hashes([name for _, name in names]), strict=True):
            if not fields:
                continue  # gone since its key was read
            mount = _mount(fields, nodes[agent_id])
            if mount is None:
                unreadable += 1
                log.info("the report of a mount cannot be read", name=name)
            else:
                view.mounts.append(mount)
        view.mounts.sort(key=lambda mount: (mount.volume, mount.agent_id, mount.bucket, mount.prefix, mount.key))
        return unreadable

    async def _add_attachments(self, view: View) -> int:
        places = [(node.agent_id, volume) for node in view.nodes for volume in node.volumes]
        members = await self._members([noticeboard.attachments(agent_id, volume) for agent_id, volume in places])
        names = [
            noticeboard.attachment(agent_id, member)
            for (agent_id, _), found in zip(places, members, strict=True)
            for member in found
        ]
        unreadable = 0
        for fields in filter(None, await self._hashes(names)):
            try:
                view.attachments.append(AttachmentStatus.model_validate(fields))
            except ValidationError:
                unreadable += 1
        view.attachments.sort(key=lambda item: (item.session_id, item.target))
        return unreadable

    async def _members(self, names: Sequence[str]) -> list[set[str]]:
        found: list[set[str]] = []
        for part in _chunks(names):
            async with self._client.pipeline(transaction=False) as pipe:
                for name in part:
                    pipe.smembers(name)
                found += await pipe.execute()
        return found

    async def _hashes(self, names: Sequence[str]) -> list[Hash]:
        found: list[Hash] = []
        for part in _chunks(names):
            async with self._client.pipeline(transaction=False) as pipe:
                for name in part:
                    pipe.hgetall(name)
                found += await pipe.execute()
        return found


def _chunks(names: Sequence[str]) -> Iterable[Sequence[str]]:
    return (names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK))


def _node(fields: Hash, rest_ms: int, volumes: Collection[str]) -> NodeStatus | None:
    """None if the hash is not understood. Of its volumes only the given ones count."""
    try:
        heartbeat = datetime.fromisoformat(fields["heartbeat"])
        age = _age(heartbeat, float(fields["retention"]), rest_ms)
        stale = age > float(fields["stale_after"])
        counts = {name: VolumeCount.model_validate(count) for name, count in json.loads(fields["volumes"]).items()}
        stopped = fields["state"] == noticeboard.AgentState.STOPPED
        return NodeStatus(
            agent_id=fields["agent_id"],
            state=NodeState.STOPPED if stopped else NodeState.AWAY if stale else NodeState.RUNNING,
            stale=stale,
            heartbeat=heartbeat,
            heartbeat_age_seconds=round(age, 3),
            heartbeat_interval_seconds=float(fields["heartbeat_interval"]),
            version=fields.get("version", ""),
            pid=int(fields["pid"]),
            started=datetime.fromisoformat(fields["started"]),
            draining=fields.get("draining") == "1",
            warnings=json.loads(fields["warnings"]),
            volumes=counts,
        ).only(volumes)
    except (KeyError, ValueError, TypeError, AttributeError):  # ValidationError is a ValueError
        return None


def _age(heartbeat: datetime, retention: float, rest_ms: int) -> float:
    """Seconds since the report, by the clock of Redis: what is gone of the time to live. By the clocks of the node and
    of this machine only if somebody took the time to live away."""
    if rest_ms >= 0:
        return max(0.0, retention - rest_ms / 1000)
    return max(0.0, (datetime.now(UTC) - heartbeat).total_seconds())


def _mount(fields: Hash, node: NodeStatus) -> MountStatus | None:
    """Written in the same transaction as the report of its node, so it has its age."""
    try:
        told = {name: value for name, value in fields.items() if value != ""}
        return MountStatus.model_validate(
            {
                **told,
                "usage": told if "measured_at" in told else None,
                "sessions": json.loads(fields["sessions"]),
                "heartbeat": node.heartbeat,
                "heartbeat_age_seconds": node.heartbeat_age_seconds,
                "stale": node.stale,
            }
        )
    except (KeyError, ValueError):
        return None


def _older(report: R, seconds: float) -> R:
    """The same report, later. Whether its node has gone away meanwhile could not be asked."""
    return report.model_copy(update={"heartbeat_age_seconds": round(report.heartbeat_age_seconds + seconds, 3)})
