"""The agent killed and started again: with and without keeping mounts."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from agent_plugin.kernel import entries_below, unmount
from storage_proxy.core.wire import MountState

from .node import AgentProcess, Node, new_session, until, until_async

pytestmark = [pytest.mark.root, pytest.mark.asyncio]


@pytest_asyncio.fixture
async def embedded(node: Node) -> AsyncIterator[AgentProcess]:
    """As `mooring up` runs it: nothing is kept."""
    process = AgentProcess(node)
    yield process
    await process.close()


@pytest_asyncio.fixture
async def lasting(node: Node) -> AsyncIterator[AgentProcess]:
    """As a node runs it: mounts outlive the agent."""
    process = AgentProcess(node, stop_mounts_on_exit=False, grace_period=30.0)
    yield process
    await process.close()


async def test_sigterm_leaves_nothing(node: Node, folder: str, embedded: AgentProcess) -> None:
    async with await embedded.start() as agent:
        await agent.attach(node.grant(node.request(folder, "data")))
    assert await embedded.terminate() == 0
    assert node.residue() == {}
    assert not node.runtime.exists()
    assert not node.runtime.with_name("run.lock").exists()


@pytest.mark.semantics(12)
async def test_after_a_kill_everything_is_cleaned(node: Node, folder: str, embedded: AgentProcess) -> None:
    async with await embedded.start() as agent:
        for prefix in ("data", "other"):
            await agent.attach(node.grant(node.request(folder, prefix)))
    pids = node.processes()
    await embedded.kill()
    assert sorted(node.processes()) == sorted(pids), "mount processes do not die with the agent"
    os.kill(pids[0], signal.SIGKILL)  # one of the mounts is dead by now
    await until(lambda: len(node.processes()) == 1, "it is gone")
    async with await embedded.start() as agent:
        assert await agent.mounts() == []
        assert await agent.attachments() == []
        assert node.residue() == {}
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        assert (Path(spec.source) / "hello.txt").read_text() == "hello from data/"
    assert await embedded.terminate() == 0
    assert node.residue() == {}


async def test_killed_while_it_mounts(node: Node, folder: str, embedded: AgentProcess) -> None:
    """The journal knows the start before it happens; what it knows not (the pid) the command line tells."""
    async with await embedded.start() as agent:
        attach = asyncio.create_task(agent.attach(node.grant(node.request(folder, "data"))))
        await until(lambda: bool(node.processes()), "the mount process starts")
        await embedded.kill()
        await asyncio.gather(attach, return_exceptions=True)
    db = sqlite3.connect(node.place / "state" / "journal.sqlite")
    db.execute("UPDATE mounts SET pid = NULL, started = NULL")
    db.commit()
    db.close()
    async with await embedded.start() as agent:
        assert node.residue() == {}
        assert await agent.mounts() == []


async def test_a_recorded_pid_that_is_another_process_now_is_left_alone(
    node: Node, folder: str, embedded: AgentProcess
) -> None:
    async with await embedded.start() as agent:
        await agent.attach(node.grant(node.request(folder, "data")))
    await embedded.kill()
    innocent = await asyncio.create_subprocess_exec("sleep", "60")
    db = sqlite3.connect(node.place / "state" / "journal.sqlite")
    db.execute("UPDATE mounts SET pid = ?", (innocent.pid,))
    db.commit()
    db.close()
    async with await embedded.start():
        assert node.residue() == {}
        assert innocent.returncode is None
    innocent.kill()
    await innocent.wait()


async def test_living_mounts_are_taken_over(node: Node, folder: str, lasting: AgentProcess) -> None:
    session = new_session()
    request = node.request(folder, "data")
    async with await lasting.start() as agent:
        spec = await agent.attach(node.grant(request, session))
        drained = await agent.attach(node.grant(node.request(folder, "other")))
        await agent.detach_session(drained.session_id)
    pids = node.processes()
    held = (Path(spec.source) / "hello.txt").open()
    await lasting.kill()
    assert held.read() == "hello from data/"
    async with await lasting.start() as agent:
        assert node.processes() == pids
        states = {mount.prefix: mount.state for mount in await agent.mounts()}
        assert states == {"data/": MountState.LIVE, "other/": MountState.DRAINING}
        assert (Path(spec.source) / "hello.txt").read_text() == "hello from data/"
        assert await agent.attach(node.grant(request, session)) == spec
        held.close()
        assert await agent.detach_session(session) == 1
        assert await agent.gc() == 2
        assert node.residue() == {}
    assert await lasting.terminate() == 0


async def test_a_stop_keeps_mounts_for_the_next_agent(node: Node, folder: str, lasting: AgentProcess) -> None:
    async with await lasting.start() as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
    assert await lasting.terminate() == 0
    assert (Path(spec.source) / "hello.txt").exists()
    async with await lasting.start() as agent:
        (mount,) = await agent.mounts()
        assert mount.state is MountState.LIVE
        (pid,) = node.processes()
        os.kill(pid, signal.SIGKILL)

        async def dead() -> bool:
            return (await agent.mounts())[0].state is MountState.DEAD

        await until_async(dead, "an adopted process is watched as well", 2.0)
        await agent.detach_session(spec.session_id)
        assert node.residue() == {}


@pytest.mark.semantics(12)
async def test_what_is_not_wholly_alive_is_removed(node: Node, folder: str, lasting: AgentProcess) -> None:
    async with await lasting.start() as agent:
        dead = await agent.attach(node.grant(node.request(folder, "data")))
        alive = await agent.attach(node.grant(node.request(folder, "other")))
        pids = {mount.prefix: mount.pid for mount in await agent.mounts()}
    await lasting.kill()
    pid = pids["data/"]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: len(node.processes()) == 1, "it is gone")
    unmount(Path(alive.source))  # its bind is lost, its mount is well
    stray = node.runtime / "creds" / "0123456789abcdef"
    stray.write_text("left by somebody")
    async with await lasting.start() as agent:
        assert [item.session_id for item in await agent.attachments()] == [alive.session_id]
        assert (Path(alive.source) / "hello.txt").read_text() == "hello from other/"
        assert not Path(dead.source).exists()
        assert not stray.exists()
        assert len(node.credentials()) == 1
        await agent.detach_session(alive.session_id)
        await agent.gc()
        assert node.residue() == {}


async def test_mounts_without_a_journal_are_removed(node: Node, folder: str, lasting: AgentProcess) -> None:
    async with await lasting.start() as agent:
        await agent.attach(node.grant(node.request(folder, "data")))
    await lasting.kill()
    for path in (node.place / "state").glob("journal.sqlite*"):
        path.unlink()
    async with await lasting.start() as agent:
        assert await agent.mounts() == []
        assert node.residue() == {}
    await lasting.terminate()
    for entry in reversed(entries_below(node.runtime)):
        unmount(Path(entry.mount_point))
