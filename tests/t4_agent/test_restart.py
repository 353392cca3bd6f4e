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
from storage_proxy.client.agent import AgentClient
from storage_proxy.core.wire import MountState

from .node import AgentProcess, Node, new_session, until, until_async
from .podman import Podman

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


@pytest.mark.semantics(16)
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
        assert mount.pid is not None
        os.kill(mount.pid, signal.SIGKILL)

        async def repaired() -> bool:
            return [(again.state, again.pid == mount.pid) for again in await agent.mounts()] == [
                (MountState.LIVE, False)
            ]

        await until_async(repaired, "an adopted process is watched as well")
        assert (Path(spec.source) / "hello.txt").exists()
        await agent.detach_session(spec.session_id)
        await agent.gc()
        assert node.residue() == {}


async def gone(node: Node, pid: int) -> None:
    await until(lambda: pid not in node.processes(), "it is gone")


async def live_again(agent: AgentClient) -> None:
    async def alive() -> bool:
        return {mount.state for mount in await agent.mounts()} == {MountState.LIVE}

    await until_async(alive, "every mount lives", 20.0)


@pytest.mark.semantics(12)
@pytest.mark.semantics(14)
async def test_what_died_while_the_agent_was_away_is_repaired(
    node: Node, folder: str, lasting: AgentProcess, podman: Podman
) -> None:
    """One mount process is dead, one bind taken away, one file planted; the containers never stop, and one of them is
    not reached by propagation."""
    async with await lasting.start() as agent:
        dead = await agent.attach(node.grant(node.request(folder, "data")))
        alive = await agent.attach(node.grant(node.request(folder, "other", target="/other")))
        pids = {mount.prefix: mount.pid for mount in await agent.mounts()}
        name = await podman.start(dead, alive)
        careless = await podman.start(options=(f"--mount=type=bind,source={dead.source},target=/data",))
    await lasting.kill()
    pid = pids["data/"]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: len(node.processes()) == 1, "it is gone")
    assert (await podman.execute(name, "cat /data/hello.txt"))[0] != 0
    unmount(Path(alive.source))  # its bind is lost, its mount is well
    stray = node.runtime / "creds" / "0123456789abcdef"
    stray.write_text("left by somebody")
    async with await lasting.start() as agent:
        await live_again(agent)
        assert len(await agent.attachments()) == 2
        assert pids["other/"] in node.processes()
        assert not stray.exists()
        assert await podman.execute(name, "cat /data/hello.txt /other/hello.txt") == (
            0,
            "hello from data/hello from other/",
        )
        await until(lambda: (Path(alive.source) / "hello.txt").exists(), "the bind is made again")

        async def mended() -> bool:
            return await podman.execute(careless, "cat /data/hello.txt") == (0, "hello from data/")

        await until_async(mended, "the other container reads as well")
        for spec in (dead, alive):
            await agent.detach_session(spec.session_id)
        for each in (name, careless):
            await podman.remove(each)
        await agent.gc()
        assert node.residue() == {}


async def test_killed_in_the_middle_of_a_repair(node: Node, folder: str, lasting: AgentProcess) -> None:
    """Whatever step it had come to, its successor finishes the repair; what it had begun is not left over."""
    async with await lasting.start() as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        for wait in (0.0, 0.02, 0.04, 0.08):
            (pid,) = node.processes()
            os.kill(pid, signal.SIGKILL)
            await gone(node, pid)
            if wait:
                await until(lambda: bool(node.staged()), "the repair has begun")
                await asyncio.sleep(wait)
            await lasting.kill()
            async with await lasting.start() as successor:
                await live_again(successor)
                assert (Path(spec.source) / "hello.txt").read_text() == "hello from data/"
                await until(lambda: len(node.processes()) == 1, "one process")
                assert node.staged() == []
                await until(lambda: len(node.scratch()) == 1, "one scratch folder")
        await lasting.kill()
    async with await lasting.start() as agent:
        assert await agent.detach_session(spec.session_id) == 1
        await agent.gc()
        assert node.residue() == {}


async def test_a_host_that_was_started_anew(node: Node, folder: str, lasting: AgentProcess) -> None:
    """/run is empty, containers and processes are gone: the journal tells of promises that nobody holds any more."""
    async with await lasting.start() as agent:
        await agent.attach(node.grant(node.request(folder, "data")))
    await lasting.kill()
    for pid in node.processes():
        os.kill(pid, signal.SIGKILL)
    for entry in reversed(entries_below(node.runtime)):
        unmount(Path(entry.mount_point), lazy=True)
    async with await lasting.start() as agent:
        assert await agent.attachments() == []
        assert await agent.mounts() == []
        assert node.residue() == {}
        await agent.attach(node.grant(node.request(folder, "data"), "the-next"))
        await agent.detach_session("the-next")
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
