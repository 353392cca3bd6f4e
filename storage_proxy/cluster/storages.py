"""`Storages`: what the nodes do with the volumes of a type. Owns the connection to the agents' Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from ..client.storages import (
    FeedItem,
    MountEvent,
    MountsWanted,
    NodeStatus,
    StorageNodeStatus,
    StorageStatus,
    VolumeStatus,
    sum_states,
)
from ..core.errors import ConfigError, NotFound, ServiceUnavailable
from ..core.ids import AgentID
from ..core.secrets import Secret
from ..volumes import MinioVolume, VolumeRegistry
from .board import Noticeboard
from .feed import EventFeed, Listener

CALL_SECONDS = 3.0


class Storages:
    """Connects at the first call. All methods raise `NotFound` for a type that no volume has, and
    `ServiceUnavailable` when Redis does not answer and nothing is remembered."""

    def __init__(self, url: Secret, volumes: VolumeRegistry) -> None:
        """Raises `ConfigError` for a URL that does not parse."""
        self._volumes = volumes
        try:
            self._client = redis.Redis.from_url(
                url.reveal(),
                socket_connect_timeout=CALL_SECONDS,
                socket_timeout=CALL_SECONDS,
                decode_responses=True,
                protocol=2,  # the answers of every server have the same shape
                retry=Retry(NoBackoff(), 0),  # whoever waits here has a deadline, and asks again
            )
        except ValueError:
            raise ConfigError("The Redis URL does not parse.", hint="Write redis://HOST:PORT/DB.") from None
        self._board = Noticeboard(self._client, [volume.name for volume in volumes])
        self._feed = EventFeed(self._client)

    async def check(self) -> None:
        """Raises `ServiceUnavailable` if Redis does not answer."""
        try:
            async with asyncio.timeout(CALL_SECONDS):
                await self._client.ping()
        except (RedisError, OSError, TimeoutError) as err:
            raise ServiceUnavailable(f"Redis does not answer ({type(err).__name__}).") from None

    @property
    def listening(self) -> int:
        """How many listen to events now."""
        return self._feed.listening

    async def end_streams(self) -> None:
        """Whoever listens is at the end at once."""
        await self._feed.close()

    async def close(self) -> None:
        await self._feed.close()
        await self._board.close()
        await self._client.aclose()

    async def status(self, kind: str, wanted: MountsWanted) -> StorageStatus:
        """All volumes of the type, all nodes, and the mounts that are wanted."""
        volumes = self._of(kind)
        names = {volume.name for volume in volumes}
        view = await self._board.nodes(wanted)
        nodes = [node.only(names) for node in view.nodes]
        return StorageStatus(
            type=kind,
            as_of=view.as_of,
            age_seconds=view.age,
            stale=view.error is not None,
            error=view.error,
            unreadable=view.unreadable,
            volumes=[_summed(volume, nodes) for volume in volumes],
            nodes=nodes,
            mounts=[
                mount
                for mount in view.mounts
                if mount.volume in names and (wanted is MountsWanted.ALL or mount.troubled)
            ],
        )

    async def node(self, kind: str, agent_id: AgentID) -> StorageNodeStatus:
        """One node. Also raises `NotFound` for a node of which nothing is known."""
        names = {volume.name for volume in self._of(kind)}
        view = await self._board.node(agent_id)
        if not view.nodes:
            raise NotFound(
                f"Nothing is known of an agent {agent_id!r}.",
                hint="It never reported to this Redis, or went away longer ago than its last word is kept.",
            )
        return StorageNodeStatus(
            type=kind,
            as_of=view.as_of,
            age_seconds=view.age,
            stale=view.error is not None,
            error=view.error,
            unreadable=view.unreadable,
            node=view.nodes[0].only(names),
            mounts=[mount for mount in view.mounts if mount.volume in names],
            attachments=[item for item in view.attachments if item.volume in names],
        )

    @asynccontextmanager
    async def listen(self, kind: str, after: str | None) -> AsyncIterator[Events]:
        """The events of the volumes of the type, and those of whole nodes. Also raises `InvalidRequest` for an `after`
        that is no id."""
        names = frozenset[str](volume.name for volume in self._of(kind))
        async with self._feed.listen(after) as listener:
            yield Events(listener, names)

    def _of(self, kind: str) -> Sequence[MinioVolume]:
        found = [volume for volume in self._volumes if volume.backend == kind]
        if not found:
            known = ", ".join(sorted({volume.backend for volume in self._volumes}))
            raise NotFound(f"There is no volume of type {kind[:64]!r} here.", hint=f"There are: {known}.")
        return found


class Events:
    """A listener that hears of some volumes only."""

    def __init__(self, listener: Listener, volumes: frozenset[str]) -> None:
        self._listener = listener
        self._volumes = volumes

    @property
    def ended(self) -> bool:
        return self._listener.closed

    async def next(self, seconds: float) -> list[FeedItem]:
        """What is new; an empty list if nothing is after `seconds`, or if `ended`."""
        return [item for item in await self._listener.next(seconds) if self._concerns(item)]

    def _concerns(self, item: FeedItem) -> bool:
        return not isinstance(item, MountEvent) or item.volume is None or item.volume in self._volumes


def _summed(volume: MinioVolume, nodes: Sequence[NodeStatus]) -> VolumeStatus:
    here = [node for node in nodes if volume.name in node.volumes]
    now = [node.volumes[volume.name] for node in here if not node.stale]
    states = sum_states(now)
    return VolumeStatus(
        name=volume.name,
        endpoint=volume.endpoint.url,
        mounts=sum(states.values()),
        by_state=states,
        attachments=sum(count.attachments for count in now),
        nodes=len(now),
        stale_mounts=sum(node.volumes[volume.name].mounts for node in here if node.stale),
    )
