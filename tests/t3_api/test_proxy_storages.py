"""What the proxy tells of nodes and their mounts: real reports in a real Redis, read over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from datetime import datetime
from pathlib import Path

import pytest
import pytest_asyncio
import redis.asyncio as redis

from agent_plugin.resources import Usage
from storage_proxy.client import ProxyClient
from storage_proxy.client.storages import EventsLost, FeedItem, MountEvent, MountsWanted, NodeState, SourceChanged
from storage_proxy.cluster.feed import EventFeed
from storage_proxy.core import noticeboard
from storage_proxy.core.errors import InvalidRequest, NotFound, ServiceUnavailable, Unsupported
from storage_proxy.core.secrets import Secret
from storage_proxy.core.wire import MountState
from storage_proxy.s3 import S3Client
from tests.conftest import S3Server
from tests.redis_server import RedisServer, running_redis

from .proxy_stand import ProxyStand, proxy_config, running, until
from .reporting_node import PROCESS, reporting

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[RedisServer]:
    async with running_redis(tmp_path) as server:
        yield server


@pytest_asyncio.fixture
async def stand(
    s3_server: S3Server, s3: S3Client, bucket: str, tmp_path: Path, server: RedisServer
) -> AsyncIterator[ProxyStand]:
    config, secrets = proxy_config(
        tmp_path / "proxy",
        endpoint=s3_server.endpoint.url,
        bucket=bucket,
        credential=s3_server.admin,
        redis_url=server.url,
    )
    async with running(config, secrets, s3, bucket) as stand:
        yield stand


@pytest_asyncio.fixture
async def proxy(stand: ProxyStand) -> AsyncIterator[ProxyClient]:
    async with ProxyClient(stand.manager_url, Secret(stand.secret)) as client:
        yield client


@pytest_asyncio.fixture
async def board(server: RedisServer) -> AsyncIterator[redis.Redis]:
    async with redis.Redis.from_url(server.url, decode_responses=True, protocol=2) as client:
        yield client


# --- status -----------------------------------------------------------------------------------------------------------


async def test_volumes_nodes_and_mounts_are_summed(proxy: ProxyClient, server: RedisServer) -> None:
    nothing = await proxy.storage_status()
    assert (nothing.nodes, nothing.mounts) == ([], [])
    assert [(v.name, v.mounts, v.nodes) for v in nothing.volumes] == [("minio", 0, 0)], "not mounted is told too"
    async with reporting(server, "node-1") as one, reporting(server, "node-2") as two:
        one.told.add("minio", "models", "s-1", "s-2")
        one.told.add("minio", "data", "s-1", state=MountState.FAILED, error="the key is wrong")
        one.told.add("elsewhere", "other", "s-9")
        one.told.said.append("1 mount has failed.")
        two.told.draining = True
        plan = two.told.add("minio", "models", "s-3")
        two.told.usages[plan.key] = Usage(PROCESS, time.time(), rss=9_000_000, threads=5, cpu_seconds=0.25, fds=11)

        async def told() -> bool:
            return (await proxy.storage_status(mounts=MountsWanted.NONE)).volumes[0].mounts == 3

        await until(told)
        status = await proxy.storage_status()
        (volume,) = status.volumes
        assert (volume.nodes, volume.attachments, volume.stale_mounts) == (2, 4, 0)
        assert volume.by_state == {"failed": 1, "live": 2}
        assert [(n.agent_id, n.state, n.stale, n.mounts) for n in status.nodes] == [
            ("node-1", NodeState.RUNNING, False, 2),
            ("node-2", NodeState.RUNNING, False, 1),
        ]
        assert set(status.nodes[0].volumes) == {"minio"}, "volumes of another type are none of its business"
        assert status.nodes[0].warnings == ["1 mount has failed."]
        assert [node.draining for node in status.nodes] == [False, True]
        assert 0 <= status.nodes[0].heartbeat_age_seconds < 5
        assert (status.stale, status.error, status.age_seconds, status.unreadable) == (False, None, 0.0, 0)
        failed, *rest = status.mounts
        assert (failed.bucket, failed.agent_id, failed.state, failed.last_error) == (
            "data",
            "node-1",
            "failed",
            "the key is wrong",
        )
        assert (failed.driver, failed.pid, failed.sessions, failed.stale) == ("s3fs", 4711, ["s-1"], False)
        assert [(mount.agent_id, mount.sessions) for mount in rest] == [("node-1", ["s-1", "s-2"]), ("node-2", ["s-3"])]
        assert (rest[0].usage, rest[0].trouble) == (None, None)
        usage = rest[1].usage
        assert usage is not None
        assert (usage.rss, usage.threads, usage.cpu_seconds, usage.fds, usage.pss) == (9_000_000, 5, 0.25, 11, None)
        assert [m.key for m in (await proxy.storage_status(mounts=MountsWanted.TROUBLED)).mounts] == [failed.key]
        two.told.entries[plan.key].trouble = "S3 refuses the key."

        async def troubled() -> bool:
            found = (await proxy.storage_status(mounts=MountsWanted.TROUBLED)).mounts
            return [mount.trouble for mount in found] == [None, "S3 refuses the key."]

        await until(troubled)
        assert (await proxy.storage_status(mounts=MountsWanted.NONE)).mounts == []


async def test_one_node_with_its_attachments(proxy: ProxyClient, server: RedisServer) -> None:
    async with reporting(server, "node-1") as one, reporting(server, "node-2") as two:
        plan = one.told.add("minio", "models", "s-1", "s-2")
        two.told.add("minio", "models", "s-3")

        async def told() -> bool:
            return len((await proxy.storage_node("node-1")).attachments) == 2

        with pytest.raises(NotFound, match="'node-3'"):
            await proxy.storage_node("node-3")
        await until(told)
        answer = await proxy.storage_node("node-1")
        assert (answer.node.agent_id, [mount.key for mount in answer.mounts]) == ("node-1", [plan.key])
        assert [(a.session_id, a.mount_key, a.target, a.state) for a in answer.attachments] == [
            ("s-1", plan.key, "/data", "bound"),
            ("s-2", plan.key, "/data", "bound"),
        ]


@pytest.mark.semantics(18)
async def test_a_node_that_vanished_is_shown_as_away(proxy: ProxyClient, server: RedisServer) -> None:
    async with reporting(server, "node-1") as one, reporting(server, "node-2") as two:
        for node in (one, two):
            node.told.add("minio", "models", "s-1")

        async def told() -> bool:
            return (await proxy.storage_status()).volumes[0].mounts == 2

        await until(told)
        await one.vanish()

        async def away() -> bool:
            return (await proxy.storage_status()).nodes[0].state is NodeState.AWAY

        await until(away)
        status = await proxy.storage_status()
        gone, there = status.nodes
        assert (gone.stale, there.stale, there.state) == (True, False, NodeState.RUNNING)
        assert gone.heartbeat_age_seconds > gone.heartbeat_interval_seconds
        assert gone.mounts == 1, "what it had is remembered"
        (volume,) = status.volumes
        assert (volume.mounts, volume.nodes, volume.stale_mounts) == (1, 1, 1)
        assert (await proxy.storage_node("node-1")).node.stale


async def test_a_node_that_stopped_in_order_says_so(proxy: ProxyClient, server: RedisServer) -> None:
    async with reporting(server, "node-1", mounts_stay=False) as one:
        one.told.add("minio", "models", "s-1")

        async def told() -> bool:
            return (await proxy.storage_status()).volumes[0].mounts == 1

        await until(told)
        await one.stop()
        status = await proxy.storage_status()
        assert [(n.state, n.mounts) for n in status.nodes] == [(NodeState.STOPPED, 0)]
        assert status.mounts == []


async def test_a_wrong_clock_makes_no_node_stale(proxy: ProxyClient, server: RedisServer, board: redis.Redis) -> None:
    """The age of a report is measured by the clock of Redis alone."""
    async with reporting(server, "node-1", heartbeat=30, ttl=60) as node:
        name = noticeboard.agent(node.agent_id)

        async def told() -> bool:
            return bool(await board.exists(name))

        await until(told)
        left = await board.pttl(name)
        await board.hset(name, "heartbeat", datetime(2001, 1, 1).astimezone().isoformat())
        assert await board.pttl(name) <= left
        (found,) = (await proxy.storage_status()).nodes
        assert (found.state, found.heartbeat.year) == (NodeState.RUNNING, 2001)


async def test_reports_that_cannot_be_read_hide_nothing_else(
    proxy: ProxyClient, server: RedisServer, board: redis.Redis
) -> None:
    async with reporting(server, "node-1", heartbeat=30, ttl=60) as node:
        node.told.add("minio", "models", "s-1")

        async def told() -> bool:
            return (await proxy.storage_status()).volumes[0].mounts == 1

        await until(told)
        await board.zadd(noticeboard.AGENTS, {"strange": 1, "forgotten": 1})
        await board.hset(noticeboard.agent("strange"), mapping={"agent_id": "strange", "volumes": "[["})
        await board.sadd(noticeboard.mounts("node-1", "minio"), "strange", "forgotten")
        await board.hset(noticeboard.mount("node-1", "strange"), mapping={"sessions": "[]", "state": "live"})
        status = await proxy.storage_status()
        assert (len(status.nodes), len(status.mounts), status.unreadable) == (1, 1, 2)


@pytest.mark.expects_log("Redis does not answer")
async def test_redis_goes_and_comes_back(proxy: ProxyClient, server: RedisServer) -> None:
    async with reporting(server, "node-1") as node:
        node.told.add("minio", "models", "s-1")

        async def told() -> bool:
            return (await proxy.storage_status()).volumes[0].mounts == 1

        await until(told)
        fresh = await proxy.storage_status()
        await server.kill()
        kept = await proxy.storage_status()
        assert (kept.stale, kept.as_of, len(kept.mounts)) == (True, fresh.as_of, 1)
        assert kept.error is not None
        assert 0 < kept.age_seconds < 10
        assert kept.nodes[0].heartbeat_age_seconds >= fresh.nodes[0].heartbeat_age_seconds
        with pytest.raises(ServiceUnavailable, match="What the nodes do is not known"):
            await proxy.storage_node("node-1")
        await server.start()

        async def back() -> bool:
            now = await proxy.storage_status()
            return not now.stale and now.volumes[0].mounts == 1

        await until(back)


@pytest.mark.semantics(9)
async def test_who_may_ask_and_for_what(stand: ProxyStand, proxy: ProxyClient) -> None:
    for path in ("status", "status/node-1", "events"):
        for secret in (None, "wrong"):
            assert (await stand.call("GET", f"/storages/minio/{path}", secret=secret)).status == 403
        assert (await stand.call("GET", f"/storages/nothing/{path}")).status == 404
    assert (await stand.call("GET", "/storages/minio/status?mounts=some")).status == 400
    assert (await stand.call("GET", "/storages/minio/status/..%2Fx")).status == 400
    with pytest.raises(InvalidRequest):
        await anext(proxy.storage_events(after="yesterday"))


async def test_without_redis_it_says_so(s3_server: S3Server, s3: S3Client, bucket: str, tmp_path: Path) -> None:
    config, secrets = proxy_config(
        tmp_path / "proxy", endpoint=s3_server.endpoint.url, bucket=bucket, credential=s3_server.admin
    )
    async with (
        running(config, secrets, s3, bucket) as stand,
        ProxyClient(stand.manager_url, Secret(stand.secret)) as proxy,
    ):
        with pytest.raises(Unsupported, match="does not know what the nodes do"):
            await proxy.storage_status()


# --- events -----------------------------------------------------------------------------------------------------------


class Stream:
    """Listens in the background, so that nothing is missed between two looks."""

    def __init__(self, events: AsyncGenerator[FeedItem, None]) -> None:
        self.items: list[FeedItem] = []
        self._task = asyncio.create_task(self._follow(events))

    async def _follow(self, events: AsyncGenerator[FeedItem, None]) -> None:
        async with aclosing(events):
            async for item in events:
                self.items.append(item)

    @property
    def events(self) -> list[MountEvent]:
        return [item for item in self.items if isinstance(item, MountEvent)]

    @property
    def ended(self) -> bool:
        return self._task.done()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def until(self, count: int) -> list[MountEvent]:
        async def there() -> bool:
            return len(self.events) >= count

        await until(there)
        return self.events


async def listening(stand: ProxyStand, count: int = 1) -> None:
    """Waits until so many listeners are served."""
    storages = stand.proxy.services.storages
    assert storages is not None

    async def there() -> bool:
        return storages.listening >= count

    await until(there)


async def nobody_listens(stand: ProxyStand) -> bool:
    storages = stand.proxy.services.storages
    return storages is not None and storages.listening == 0


async def test_events_of_all_nodes_in_order(proxy: ProxyClient, stand: ProxyStand, server: RedisServer) -> None:
    async with reporting(server, "node-1") as one, reporting(server, "node-2") as two:
        stream = Stream(proxy.storage_events())
        await listening(stand)
        plan = one.told.add("minio", "models", "s-1")
        one.told.add("elsewhere", "other", "s-1")
        one.told.happens(plan, MountState.LIVE, MountState.DEAD, "it was killed")
        dead = (await stream.until(2))[-1]
        two.told.add("minio", "models", "s-2")
        events = await stream.until(3)
        assert [(e.agent_id, e.kind, e.old, e.new, e.error) for e in events] == [
            ("node-1", "state", "staging", "live", None),
            ("node-1", "state", "live", "dead", "it was killed"),
            ("node-2", "state", "staging", "live", None),
        ]
        assert (dead.key, dead.bucket, dead.volume) == (plan.key, "models", "minio")
        assert [event.number for event in events[:2]] == [1, 3], "number 2 concerns another type"
        await stream.close()
        late = Stream(proxy.storage_events(after=events[0].id))
        assert await late.until(2) == events[1:], "who comes back goes on where it was"
        await late.close()
        everything = Stream(proxy.storage_events(after="0"))
        assert await everything.until(3) == events
        await everything.close()


async def test_a_quiet_stream_shows_that_it_lives(
    stand: ProxyStand, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage_proxy.api.manager.storages.HEARTBEAT_SECONDS", 0.05)
    headers = {"X-BackendAI-Storage-Auth-Token": stand.secret}
    async with stand.http.get(f"{stand.manager_url}/storages/minio/events", headers=headers) as answer:
        assert (answer.status, answer.content_type) == (200, "text/event-stream")
        lines = [await answer.content.readline() for _ in range(5)]
    assert lines == [b": events follow\n", b"\n", b": heartbeat\n", b"\n", b": heartbeat\n"]


@pytest.mark.expects_log("Redis does not answer")
async def test_listeners_outlive_redis(proxy: ProxyClient, stand: ProxyStand, server: RedisServer) -> None:
    async with reporting(server, "node-1") as node:
        stream = Stream(proxy.storage_events())
        await listening(stand)
        await server.kill()

        async def told() -> bool:
            return SourceChanged(available=False) in stream.items

        await until(told)
        async with aclosing(proxy.storage_events()) as other:
            assert await anext(other) == SourceChanged(available=False), "who comes now is told too"
        plan = node.told.add("minio", "models", "s-1")
        await server.start()
        (event,) = await stream.until(1)
        assert event.key == plan.key
        assert SourceChanged(available=True) in stream.items
        await stream.close()
        await until(lambda: nobody_listens(stand))
        await server.kill()
        with pytest.raises(ServiceUnavailable, match="no events"):
            await anext(proxy.storage_events())


async def test_a_stopping_proxy_ends_streams_at_once(
    s3_server: S3Server, s3: S3Client, bucket: str, tmp_path: Path, server: RedisServer
) -> None:
    config, secrets = proxy_config(
        tmp_path / "other",
        endpoint=s3_server.endpoint.url,
        bucket=bucket,
        credential=s3_server.admin,
        redis_url=server.url,
    )
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        stand = await stack.enter_async_context(running(config, secrets, s3, bucket))
        async with ProxyClient(stand.manager_url, Secret(stand.secret)) as proxy:
            stream = Stream(proxy.storage_events())
            await listening(stand)
            begun = loop.time()
            await stack.aclose()
            assert loop.time() - begun < 1.5, "below the time that requests under way are given"

            async def ended() -> bool:
                return stream.ended

            await until(ended)


async def add_events(board: redis.Redis, count: int, first: int = 0) -> list[str]:
    return [
        await board.xadd(
            noticeboard.EVENTS,
            {"at": "2026-01-01T00:00:00+00:00", "agent_id": "node-1", "kind": "state", "number": str(first + number)},
        )
        for number in range(count)
    ]


async def test_a_slow_listener_catches_up(board: redis.Redis) -> None:
    """Its queue holds two events, the stream all of them: nothing is lost, nothing comes twice."""
    feed = EventFeed(board, queue=2)
    async with feed.listen() as listener:
        ids = await add_events(board, 2000)
        await until(lambda: _passed(feed, ids[-1]))
        ids += await add_events(board, 3)
        seen: list[FeedItem] = []
        while len(seen) < len(ids):
            seen += await listener.next(5)
        assert [item.id for item in seen if isinstance(item, MountEvent)] == ids
        ids = await add_events(board, 1)
        assert [item.id for item in await listener.next(5) if isinstance(item, MountEvent)] == ids
    await feed.close()


async def test_a_slow_listener_is_told_what_it_lost(board: redis.Redis) -> None:
    feed = EventFeed(board, queue=2)
    await add_events(board, 1)
    async with feed.listen() as listener:
        ids = await add_events(board, 10)
        await until(lambda: _passed(feed, ids[-1]))
        await board.xtrim(noticeboard.EVENTS, maxlen=4, approximate=False)
        lost, *rest = await listener.next(5)
        assert lost == EventsLost(count=6)
        assert [item.id for item in rest if isinstance(item, MountEvent)] == ids[6:]
    async with feed.listen(ids[0]) as listener:
        lost, *rest = await listener.next(5)
        assert lost == EventsLost(count=None), "it was not here: nobody counted"
        assert len(rest) == 4
    async with feed.listen(ids[6]) as listener:
        assert [item.id for item in await listener.next(5) if isinstance(item, MountEvent)] == ids[7:]
    await feed.close()


async def _passed(feed: EventFeed, name: str) -> bool:
    return feed.tip == name
