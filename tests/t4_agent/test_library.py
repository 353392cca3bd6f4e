"""Mounting from another program: inside it, or through a running agent, by the same calls."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from pathlib import Path

import pytest

from agent_plugin.library import Node as MountNode
from storage_proxy.client.storages import MountEvent
from storage_proxy.core.errors import (
    BucketNotFound,
    ConfigError,
    Conflict,
    MooringError,
    ServiceUnavailable,
    TokenExpired,
)
from storage_proxy.core.wire import MountState

from .node import AGENT_ID, AgentProcess, Node, until

pytestmark = [pytest.mark.root, pytest.mark.asyncio]

ROOT = Path(__file__).resolve().parents[2]

Opener = Callable[[Node], AbstractAsyncContextManager[MountNode]]


@asynccontextmanager
async def embedded(node: Node) -> AsyncIterator[MountNode]:
    async with MountNode.open(node.config()) as opened:
        yield opened


@asynccontextmanager
async def connected(node: Node) -> AsyncIterator[MountNode]:
    async with node.agent(), MountNode.connect(node.socket) as opened:
        yield opened


@pytest.fixture(params=[embedded, connected], ids=lambda way: way.__name__)
def opener(request: pytest.FixtureRequest) -> Opener:
    way: Opener = request.param
    return way


async def test_acquire_and_release(node: Node, folder: str, opener: Opener) -> None:
    async with opener(node) as mounts:
        assert mounts.identity.agent_id == AGENT_ID
        assert mounts.identity.public_key == node.sealing_key.public
        grant = node.grant(node.request(folder, "data"), "session-1")
        spec = await mounts.acquire(grant)
        assert (Path(spec.source) / "hello.txt").read_text() == "hello from data/"
        assert await mounts.acquire(grant) == spec
        second = await mounts.acquire(node.grant(node.request(folder, "other"), "session-1"))
        third = await mounts.acquire(node.grant(node.request(folder, "data"), "session-2"))
        assert {mount.state for mount in await mounts.mounts()} == {MountState.LIVE}
        assert len(await mounts.mounts()) == 2
        await mounts.release(spec)
        await mounts.release(spec)
        assert (Path(second.source) / "hello.txt").exists()
        await mounts.release("session-1")
        await mounts.release("never-was")
        await mounts.release(third)
        assert node.residue() == {}


async def test_errors_are_those_of_the_agent(node: Node, folder: str, opener: Opener) -> None:
    async with opener(node) as mounts:
        with pytest.raises(TokenExpired):
            await mounts.acquire(node.grant(node.request(folder), lifetime=-100.0))
        with pytest.raises(BucketNotFound, match="t4-none"):
            await mounts.acquire(node.grant(node.request("t4-none")))
        with pytest.raises(MooringError, match="not a valid session id"):
            await mounts.release("../../etc")
        assert node.residue() == {}


async def test_events(node: Node, folder: str, opener: Opener) -> None:
    async with opener(node) as mounts, aclosing(mounts.events(since="0")) as events:
        spec = await mounts.acquire(node.grant(node.request(folder, "data")))
        await mounts.release(spec)
        states = []
        async with asyncio.timeout(10):
            async for event in events:
                if isinstance(event, MountEvent) and event.kind == "state":
                    states.append(event.new)
                if states and states[-1] == "absent":
                    break
        assert states == ["staging", "live", "absent"]


async def test_the_program_around_it_stays_as_it_is(node: Node, folder: str) -> None:
    def process_wide() -> tuple[object, ...]:
        mask = os.umask(0o022)
        os.umask(mask)
        root = logging.getLogger()
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)]
        limits = [resource.getrlimit(limit) for limit in (resource.RLIMIT_CORE, resource.RLIMIT_NOFILE)]
        return mask, root.level, list(root.handlers), handlers, limits, os.getpgrp(), Path.cwd(), dict(os.environ)

    before = process_wide()
    tasks = asyncio.all_tasks()
    async with MountNode.open(node.config()) as mounts:
        await mounts.acquire(node.grant(node.request(folder, "data")))
        assert process_wide() == before
    assert process_wide() == before
    assert asyncio.all_tasks() == tasks
    assert node.residue() == {}


async def test_an_error_of_the_program_comes_out_as_it_is(node: Node, folder: str) -> None:
    async def program() -> None:
        async with MountNode.open(node.config()) as mounts:
            await mounts.acquire(node.grant(node.request(folder, "data")))
            raise LookupError("of the program")

    with pytest.raises(LookupError, match="of the program"):
        await program()
    assert node.residue() == {}


async def test_a_program_that_is_cancelled_leaves_nothing(node: Node, folder: str) -> None:
    inside = asyncio.Event()

    async def program() -> None:
        async with MountNode.open(node.config()) as mounts:
            await mounts.acquire(node.grant(node.request(folder, "data")))
            inside.set()
            await asyncio.sleep(3600)

    task = asyncio.create_task(program())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert node.residue() == {}


async def test_two_agents_in_one_place(node: Node, folder: str) -> None:
    async with MountNode.open(node.config()) as mounts:
        spec = await mounts.acquire(node.grant(node.request(folder, "data")))
        with pytest.raises(Conflict, match=r"Another agent \(pid \d+\) uses .* use Node.connect"):
            async with MountNode.open(node.config()):
                pass
        async with MountNode.connect(node.socket) as other:
            await other.release(spec)
        assert node.residue() == {}


async def test_what_cannot_start_says_why(node: Node, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        MountNode.open(tmp_path / "none.toml")
    (node.place / "run").write_text("a file")
    with pytest.raises(ConfigError, match="runtime directory"):
        async with MountNode.open(node.config()):
            pass
    with pytest.raises(ServiceUnavailable, match="nothing listens there"):
        async with MountNode.connect(tmp_path / "none.sock"):
            pass


async def test_before_and_after(node: Node, folder: str) -> None:
    mounts = MountNode.open(node.config())
    with pytest.raises(ServiceUnavailable):
        _ = mounts.identity
    with pytest.raises(ServiceUnavailable, match="does not run"):
        await mounts.acquire("grant")
    async with mounts:
        spec = await mounts.acquire(node.grant(node.request(folder, "data")))
    with pytest.raises(ServiceUnavailable, match="does not run"):
        await mounts.release(spec)


async def test_mounts_that_outlive_the_program(node: Node, folder: str) -> None:
    """What an embedded agent mounted, one of its own takes over."""
    async with MountNode.open(node.config(stop_mounts_on_exit=False)) as mounts:
        spec = await mounts.acquire(node.grant(node.request(folder, "data")))
    assert (Path(spec.source) / "hello.txt").exists()
    process = AgentProcess(node, stop_mounts_on_exit=False)
    try:
        client = await process.start()
        await client.close()
        async with MountNode.connect(node.socket) as mounts:
            assert [mount.state for mount in await mounts.mounts()] == [MountState.LIVE]
            await mounts.release(spec)
        await until(lambda: node.residue() == {}, "nothing is left")
        assert await process.terminate() == 0
    finally:
        await process.close()


async def test_the_documented_program_runs(node: Node, folder: str) -> None:
    """The example of docs/embedding.md, with a stand-in for podman that looks into the folder."""
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "embedding.md").read_text(), flags=re.DOTALL)
    config = node.place / "agent.toml"
    AgentProcess(node)  # writes it
    tools = node.place / "bin"
    tools.mkdir()
    (tools / "podman").write_text('#!/bin/sh\nsource=${3#*source=}\ncat "${source%%,*}/hello.txt"\n')
    (tools / "podman").chmod(0o755)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, str(config), node.grant(node.request(folder, "data"))),
        cwd=ROOT,
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert (process.returncode, output.decode(), errors.decode()) == (0, "hello from data/", "")
    assert node.residue() == {}
