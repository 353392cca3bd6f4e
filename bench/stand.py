"""What the mount benchmarks measure: a real S3 server, a node with an agent process, containers. Nothing stands in."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent_plugin.drivers import MountPlan
from storage_proxy.client.agent import AgentClient
from storage_proxy.core.secrets import Secret
from storage_proxy.core.wire import BindSpec, MountRequest, S3Credential
from storage_proxy.embedded.weed import WeedConfig, WeedIdentity, WeedPorts, WeedServer
from storage_proxy.s3 import Endpoint, S3Client
from tests.t4_agent.node import AgentProcess, Node, new_session, skip_reason
from tests.t4_agent.podman import Podman, missing_programs, podman_in, podman_trouble

BUCKET = "bench-mounts"
FILE = "hello.txt"
CONTENT = b"hello from the benchmark\n"
_PATIENCE = 300.0


@dataclass
class Stand:
    """`folder(n)` is a directory of one bucket with one small file: one mount key each."""

    node: Node
    endpoint: str
    credential: S3Credential
    agent_id: str = field(default_factory=lambda: f"bench-{secrets.token_hex(4)}")
    podman: Podman | None = None

    def request(self, number: int, **changes: Any) -> MountRequest:
        return self.node.request(BUCKET, folder(number), **changes)

    def plan(self, number: int) -> MountPlan:
        """What the agent would mount, for those who mount it without the agent."""
        return MountPlan.of(self.request(number), "s3fs")

    def grant(self, request: MountRequest, session: str | None = None) -> str:
        return self.node.grant(request, session, audience=f"agent:{self.agent_id}", lifetime=3600.0)

    async def attach(self, client: AgentClient, number: int) -> BindSpec:
        return await client.attach(self.grant(self.request(number), new_session()))

    @asynccontextmanager
    async def agent(self, **settings: Any) -> AsyncIterator[AgentRun]:
        """`mooring agent serve` as a process; its mounts outlive it, and whoever uses it detaches what it attached."""
        values = {"id": self.agent_id, "stop_mounts_on_exit": False, "grace_period": 45.0, **settings}
        run = AgentRun(AgentProcess(self.node, **values), self.node.socket)
        await run.start()
        try:
            yield run
        finally:
            await run.close()


@dataclass
class AgentRun:
    """One agent, possibly restarted in between."""

    process: AgentProcess
    socket: Path
    _client: AgentClient | None = None
    _read: int = 0

    @property
    def client(self) -> AgentClient:
        assert self._client is not None
        return self._client

    async def start(self) -> None:
        if self._client is not None:
            await self._client.close()
        self._read = self.process.log.stat().st_size if self.process.log.exists() else 0
        await (await self.process.start()).close()
        # A benchmark may ask for more than a busy machine gives; late answers are figures too.
        self._client = AgentClient(self.socket, timeout=_PATIENCE)

    async def close(self) -> None:
        if self._client is not None:
            for session in {item.session_id for item in await self._client.attachments()}:
                await self._client.detach_session(session)
            await self._client.gc()
            await self._client.close()
            await self.process.terminate()

    def logged(self, message: str) -> list[dict[str, Any]]:
        """The log records with this message since the last start or the last `forget_log`."""
        with self.process.log.open("rb") as log:
            log.seek(self._read)
            lines = log.read().decode(errors="replace").splitlines()
        records = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and message in (record.get("event"), record.get("message")):
                records.append(record)
        return records

    def forget_log(self) -> None:
        self._read = self.process.log.stat().st_size


def folder(number: int) -> str:
    return f"folder-{number:04}"


@asynccontextmanager
async def stand(folders: int, *, containers: bool) -> AsyncIterator[Stand]:
    """Raises `SystemExit` with the reason where nothing can be mounted, or no container runs."""
    if reason := skip_reason() or (missing_programs() if containers else None):
        raise SystemExit(reason)
    admin = S3Credential(access_key=f"BENCH{secrets.token_hex(8).upper()}", secret_key=Secret.generate())
    async with AsyncExitStack() as stack:
        node = Node("", admin)
        stack.callback(node.destroy)
        server = WeedServer(
            WeedConfig(
                dir=node.place / "weed",
                ports=WeedPorts.pick_free(),
                identities=(WeedIdentity("admin", admin),),
                log_file=node.place / "weed.log",
            )
        )
        await server.start(deadline=60)
        stack.push_async_callback(server.stop)
        node.endpoint = server.endpoint_url
        await _fill(Endpoint(server.endpoint_url), admin, folders)
        made = Stand(node, server.endpoint_url, admin)
        if containers:
            place = node.place / "podman"
            place.mkdir()
            made.podman = await stack.enter_async_context(podman_in(place))
            if reason := await podman_trouble(made.podman):
                raise SystemExit(reason)
        yield made


async def _fill(endpoint: Endpoint, credential: S3Credential, folders: int) -> None:
    async with S3Client(endpoint, credential) as s3:
        await s3.create_bucket(BUCKET)
        for first in range(0, folders, 20):
            async with asyncio.TaskGroup() as tasks:
                for number in range(first, min(first + 20, folders)):
                    tasks.create_task(s3.put(BUCKET, f"{folder(number)}/{FILE}", CONTENT))


def machine() -> dict[str, object]:
    """What a figure depends on, as far as it can be read here."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"cpus": os.cpu_count(), "model": model, "memory_gib": round(pages / 2**30, 1), "kernel": os.uname().release}


def load() -> float:
    """The load average of the last minute: above the number of processors, others waited too."""
    return round(os.getloadavg()[0], 2)


def spread(values: Sequence[float], digits: int = 1) -> dict[str, float | None]:
    """Median, 95th percentile and worst of some measurements; None each if there are none."""
    if not values:
        return {"median": None, "p95": None, "worst": None}
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    p95 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]
    return {"median": round(median, digits), "p95": round(p95, digits), "worst": round(ordered[-1], digits)}
