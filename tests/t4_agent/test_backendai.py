"""An unmodified Backend.AI agent on this node: it binds, by path and with default propagation, what nobody mounted yet.

The kernel's automounter, s3fs, podman, a manager extension with its own database, and the agent as a process of its own
are all real; the storage proxy behind the manager extension is not asked for anything that a mount needs.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import pytest
import pytest_asyncio
import redis.asyncio as redis

from agent_plugin.config import AgentConfig
from agent_plugin.containers.backendai.kernels import parse_broadcast, parse_entry
from agent_plugin.containers.backendai.places import FolderPlace, valid_name
from agent_plugin.kernel import autofs, entries_below
from storage_proxy.client.manager import Folder
from storage_proxy.core.ids import VFolderID
from storage_proxy.s3 import S3Client
from tests.conftest import S3Server
from tests.fakes.fake_proxy import FakeProxy
from tests.redis_server import RedisServer, running_redis
from tests.t3_api.manager_stack import ADMIN, Stack
from tests.t3_api.manager_stack import running as manager_running

from .node import AGENT_ID, AgentProcess, Node, processes_with, until, until_async
from .podman import Podman


pytestmark = [pytest.mark.root, pytest.mark.asyncio]


class RootNode(Node):
    """A node whose agent serves the volume `minio` at `place/vfroot`."""

    manager: Stack
    extra: dict[str, Any]

    @property
    def root(self) -> Path:
        return self.place / "vfroot"

    def config(self, **agent: Any) -> AgentConfig:
        section = agent.pop("backend_ai", {})
        data = super().config(**{"stop_mounts_on_exit": False, **agent}).model_dump(
            mode="json", by_alias=True, exclude_none=True
        )
        token = self.place / "manager.token"
        token.touch(mode=0o600)
        token.write_text(self.manager.token(AGENT_ID, "agent"))
        data["manager"] = {"url": self.manager.url, "token-file": str(token)}
        data["grants"] = {"public-key-files": [str(self.place / "manager" / "state" / "grant.pub")]}
        data["backend-ai"] = {"root": {"minio": {"path": str(self.root)}}, **section}
        return AgentConfig.model_validate(data)

    def path(self, folder: Folder) -> Path:
        return FolderPlace.of_vfid("minio", VFolderID.parse(folder.vfid)).below(self.root)

    def shown(self) -> list[str]:
        """Mounted folders below the root, without the automounter's own points."""
        return [entry.mount_point for entry in entries_below(self.root) if entry.is_fuse]

    def residue(self) -> dict[str, object]:
        found = super().residue()
        if self.shown():
            found["shown"] = self.shown()
        return found


@dataclass
class Stand:
    node: RootNode
    manager: Stack
    agent: AgentProcess
    data: Folder  # s3://BUCKET/data/, rw, uid 1000
    other: Folder  # s3://BUCKET/other/, read-only

    async def sessions(self) -> list[str]:
        """What the manager extension thinks this node has."""
        from sqlalchemy import select

        from manager_ext.models import SessionRow

        async with self.manager.db.session() as session:
            return list((await session.scalars(select(SessionRow.id))).all())


@pytest_asyncio.fixture
async def stand(s3_server: S3Server, folder: str, request: pytest.FixtureRequest) -> AsyncIterator[Stand]:
    if reason := autofs.available():
        pytest.skip(reason)
    node = RootNode(s3_server.endpoint.url, s3_server.admin)
    proxy = FakeProxy()
    keys = s3_server.admin
    proxy.known_keys[keys.access_key] = keys.secret_key.reveal()
    proxy.buckets.add(folder)
    place = node.place / "manager"
    place.mkdir()
    opened = {"node-wide": {"minio": {"agents": [AGENT_ID]}}}
    try:
        async with manager_running(place, proxy, f"sqlite:///{place}/manager.db", settings=opened) as manager:
            node.manager = manager
            async with manager.client(ADMIN, "admin") as admin:
                bound = {
                    name: await admin.bind_folder(
                        name,
                        "minio",
                        folder,
                        prefix=f"{name}/",
                        read_only=name == "other",
                        access_key=keys.access_key,
                        secret_key=keys.secret_key,
                        endpoint=node.endpoint,
                    )
                    for name in ("data", "other")
                }
            agent = AgentProcess(node, **getattr(request, "param", {}))
            try:
                async with await agent.start():
                    yield Stand(node, manager, agent, bound["data"], bound["other"])
            finally:
                await agent.close()
    finally:
        node.destroy()


async def look(*arguments: str | Path, seconds: float = 20.0) -> tuple[int, str]:
    """Runs a program; every look-up of it is one that the kernel asks the agent about."""
    process = await asyncio.create_subprocess_exec(
        *(str(argument) for argument in arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "LC_ALL": "C"},
    )
    async with asyncio.timeout(seconds):
        output, _ = await process.communicate()
    return process.returncode or 0, output.decode(errors="replace")


# --- look-ups ---------------------------------------------------------------------------------------------------------


async def test_a_folder_is_mounted_when_it_is_looked_up(stand: Stand, folder: str, s3: S3Client) -> None:
    node = stand.node
    assert node.shown() == []
    assert await stand.sessions() == []
    path = node.path(stand.data)
    assert await look("cat", path / "hello.txt") == (0, "hello from data/")
    assert node.shown() == [str(path)]
    code, output = await look("sh", "-c", f"echo new > {path}/new.txt; stat -c '%u %g' {path}/new.txt")
    assert (code, output) == (0, "0 0\n") or (code, output) == (0, "1000 1000\n")
    async with await s3.get(folder, "data/new.txt") as stream:
        assert await stream.read() == b"new\n"
    code, output = await look("touch", node.path(stand.other) / "no")
    assert code != 0
    assert "Read-only" in output
    assert len(node.processes()) == 2
