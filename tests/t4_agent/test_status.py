"""What the agent tells Redis, and that it never waits for it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path

import pytest
import pytest_asyncio
import redis.asyncio as redis

from storage_proxy.cluster.board import Noticeboard
from storage_proxy.core import noticeboard
from storage_proxy.core.wire import MountState
from tests.redis_server import RedisServer, free_port, running_redis

from .node import AGENT_ID, Node, new_session, until_async

pytestmark = [pytest.mark.root, pytest.mark.asyncio]


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[RedisServer]:
    async with running_redis(tmp_path) as server:
        yield server


@pytest_asyncio.fixture
async def client(server: RedisServer) -> AsyncIterator[redis.Redis]:
    async with redis.Redis.from_url(server.url, decode_responses=True) as made:
        yield made


def settings(server: RedisServer) -> dict[str, object]:
    return {"url": server.url, "heartbeat": 0.3, "ttl": 5.0, "retention": 60.0}


@pytest.mark.semantics(5)
async def test_every_key_says_what_is_and_ends_by_itself(
    node: Node, folder: str, server: RedisServer, client: redis.Redis
) -> None:
    async with node.agent(redis=settings(server)) as agent:
        session = new_session()
        request = node.request(folder, "data")
        spec = await agent.attach(node.grant(request, session))
        mount_name = f"mooring:mount:{AGENT_ID}:{spec.mount_key}"
        attachment_name = f"mooring:attachment:{AGENT_ID}:{session}:{request.vfid.partition('/')[2]}"

        async def live() -> bool:
            return [await client.hget(name, "state") for name in (mount_name, attachment_name)] == ["live", "bound"]

        await until_async(live, "the mount is reported")
        mount = await client.hgetall(mount_name)
        assert (mount["bucket"], mount["prefix"], mount["volume"], mount["mode"]) == (folder, "data/", "minio", "rw")
        assert mount["pid"] == str(node.processes()[0])
        assert json.loads(mount["sessions"]) == [session]
        agent_name = f"mooring:agent:{AGENT_ID}"
        assert (await client.hgetall(agent_name))["mounts"] == "1"
        assert await client.smembers(f"mooring:mounts:{AGENT_ID}:minio") == {spec.mount_key}
        (member,) = await client.smembers(f"mooring:attachments:{AGENT_ID}:minio")
        assert f"mooring:attachment:{AGENT_ID}:{member}" == attachment_name
        names = set(await client.keys("mooring:*"))
        assert len(names) == 7
        for name in names - {"mooring:agents", "mooring:events", agent_name}:
            assert 0 < await client.pttl(name) <= 5000
        assert 5000 < await client.pttl(agent_name) <= 60_000, "a node that went away is seen to be away"
        assert await client.zrange("mooring:agents", 0, -1) == [AGENT_ID]
        before = await client.hget(agent_name, "heartbeat")
        # And it is what the proxy reads.
        view = await Noticeboard(client, ["minio"]).node(AGENT_ID)
        assert (view.unreadable, [item.key for item in view.mounts]) == (0, [spec.mount_key])
        assert [(item.session_id, item.state) for item in view.attachments] == [(session, "bound")]
        assert (view.nodes[0].state, view.nodes[0].by_state, view.mounts[0].state) == ("running", {"live": 1}, "live")

        async def renewed() -> bool:
            return str(await client.hget(agent_name, "heartbeat")) > before

        await until_async(renewed, "the heartbeat goes on")
        await client.delete(mount_name)
        await until_async(live, "what Redis lost is told again")
        hashes = [await client.hgetall(name) for name in names if await client.type(name) == "hash"]
        everything = json.dumps([*hashes, await client.xrange("mooring:events")])
        assert node.credential.secret_key.reveal() not in everything
        assert node.credential.access_key not in everything
        await agent.detach_session(session)

        async def gone() -> bool:
            return not await client.exists(mount_name, attachment_name)

        await until_async(gone, "what is gone vanishes at once")
    assert set(await client.keys("mooring:*")) == {"mooring:agents", "mooring:events", agent_name}
    assert (await client.hgetall(agent_name))["state"] == "stopped", "it says that it went in order"


async def test_transitions_are_told_in_order(node: Node, folder: str, server: RedisServer, client: redis.Redis) -> None:
    async with node.agent(redis=settings(server)) as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        await agent.detach_session(spec.session_id)
    events = [fields for _, fields in await client.xrange(noticeboard.EVENTS)]
    assert [(event["old"], event["new"]) for event in events] == [
        ("absent", "staging"),
        ("staging", "live"),
        ("live", "absent"),
    ]
    assert {(event["key"], event["volume"], event["kind"]) for event in events} == {(spec.mount_key, "minio", "state")}
    assert [event["number"] for event in events] == ["1", "2", "3"]


async def test_mounts_that_stay_are_not_withdrawn(
    node: Node, folder: str, server: RedisServer, client: redis.Redis
) -> None:
    """An agent that is upgraded leaves its mounts to the next one; nobody who looks sees them go."""
    async with node.agent(redis=settings(server), stop_mounts_on_exit=False) as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
    name = f"mooring:mount:{AGENT_ID}:{spec.mount_key}"
    left = await client.hgetall(f"mooring:agent:{AGENT_ID}")
    assert (left["state"], left["mounts"]) == ("stopped", "1")
    assert await client.hget(name, "state") == "live"
    async with node.agent(redis=settings(server), stop_mounts_on_exit=False) as agent:

        async def taken_over() -> bool:
            now = await client.hgetall(f"mooring:agent:{AGENT_ID}")
            assert await client.exists(name)
            return now["state"] == "running" and now["boot"] != left["boot"] and now["mounts"] == "1"

        await until_async(taken_over, "the next agent reports it")
        await agent.detach_session(spec.session_id)


async def test_mounting_works_without_redis(node: Node, folder: str) -> None:
    async with node.agent(redis={"url": f"redis://127.0.0.1:{free_port()}/0", "heartbeat": 0.1, "ttl": 5}) as agent:
        begun = time.monotonic()
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        assert (Path(spec.source) / "hello.txt").exists()
        await agent.detach_session(spec.session_id)
        assert time.monotonic() - begun < 10.0
        assert node.residue() == {}

        async def told() -> bool:
            content = json.loads(await agent.call("GET", "/v1/status"))
            return "onnect" in str(content["redis"]["error"])

        await until_async(told, "the status says that Redis is away")


async def test_it_catches_up(node: Node, folder: str, server: RedisServer) -> None:
    await server.kill()
    async with node.agent(redis=settings(server)) as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        await server.start()
        async with redis.Redis.from_url(server.url, decode_responses=True) as client:

            async def told() -> bool:
                return await client.hget(f"mooring:mount:{AGENT_ID}:{spec.mount_key}", "state") == "live"

            await until_async(told, "the state arrives when Redis is back")
            events = [fields["new"] for _, fields in await client.xrange(noticeboard.EVENTS)]
            assert events == ["staging", "live"], "and what happened meanwhile"


@pytest.mark.expects_log("mount process ended")
async def test_a_death_and_its_repair_are_told(
    node: Node, folder: str, server: RedisServer, client: redis.Redis
) -> None:
    async with node.agent(redis=settings(server)) as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        os.kill(node.processes()[0], 9)

        async def repaired() -> bool:
            return any(fields["kind"] == "repaired" for _, fields in await client.xrange(noticeboard.EVENTS))

        await until_async(repaired, "the repair is told")
        events = [fields for _, fields in await client.xrange(noticeboard.EVENTS)]
        (death,) = [fields for fields in events if fields.get("new") == MountState.DEAD]
        assert (death["key"], death["old"]) == (spec.mount_key, "live")
        assert "ended" in death["error"]
        assert json.loads(events[-1]["detail"])["repairs"] == 1
        assert await client.hget(f"mooring:mount:{AGENT_ID}:{spec.mount_key}", "state") == "live"


@pytest.mark.expects_log("mount process ended")
@pytest.mark.expects_log("could not be repaired yet")
@pytest.mark.expects_log("not repaired any more")
@pytest.mark.expects_log("stamina.retry_scheduled")
async def test_the_worst_mount_speaks_for_its_volume(
    node: Node, folder: str, server: RedisServer, client: redis.Redis
) -> None:
    """One of two mounts is dead for good: its key is not accepted any more."""
    async with node.agent(redis=settings(server), repair_attempts=1) as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        (pid,) = node.processes()
        await agent.attach(node.grant(node.request(folder, "other")))

        async def told(state: MountState) -> bool:
            volumes = json.loads(str(await client.hget(f"mooring:agent:{AGENT_ID}", "volumes") or "{}"))
            volume = volumes.get("minio")  # the report from before the attach has none
            return volume is not None and volume["worst_state"] == state and sum(volume["by_state"].values()) == 2

        await until_async(lambda: told(MountState.LIVE), "both live")
        credential = node.runtime / "creds" / spec.mount_key
        credential.write_text("AWSAccessKeyId=WRONG\nAWSSecretKey=wrong\n")
        os.kill(pid, signal.SIGKILL)
        await until_async(lambda: told(MountState.FAILED), "the failed one is told", 30.0)
        volume = json.loads(str(await client.hget(f"mooring:agent:{AGENT_ID}", "volumes")))["minio"]
        assert volume["by_state"] == {"failed": 1, "live": 1}
        assert "does not accept this credential" in volume["last_error"]
        assert datetime.fromisoformat(volume["worst_since"]).tzinfo is not None
