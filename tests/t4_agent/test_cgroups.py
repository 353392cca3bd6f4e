"""Each mount process has a control group of its own; one that takes more memory than it may is replaced."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from agent_plugin import cgroups
from agent_plugin.cgroups import Cgroups, Directories, Hierarchy, find_hierarchy
from agent_plugin.events import EventKind
from storage_proxy.core.wire import MountState

from .node import Node, new_session, until

pytestmark = [pytest.mark.root, pytest.mark.asyncio]

MIB = 1024 * 1024
TOKEN = "0123456789abcdef"


@pytest.fixture(autouse=True)
def host_has_groups() -> None:
    """Says loudly what this host cannot show."""
    if Path("/run/systemd/system").is_dir():
        return
    place = find_hierarchy()
    if place is None:
        pytest.skip("no hierarchy with the memory controller is mounted")
    parent = place.own.parent if place.nested else place.own
    if not os.access(parent, os.W_OK):
        pytest.skip(f"no control groups can be made below {parent}")


@pytest_asyncio.fixture
async def groups(node: Node) -> AsyncIterator[Cgroups]:
    made = Cgroups(f"test-{os.getpid()}", 48 * MIB)
    if made.problem is not None:
        pytest.skip(made.problem)
    yield made
    await made.close()


async def eater(size: int) -> asyncio.subprocess.Process:
    """A program that takes memory when it is told to."""
    return await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-c",
            f"import sys; sys.stdin.read(1); x = bytearray({size}); print('fine', flush=True); sys.stdin.read()",
        ),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )


def groups_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text()


async def ended(process: asyncio.subprocess.Process) -> int:
    with contextlib.suppress(ConnectionError):
        process.stdin.close()  # type: ignore[union-attr]
    return await process.wait()


async def test_a_process_above_the_limit_is_killed_and_the_reason_is_known(groups: Cgroups) -> None:
    process = await eater(100 * MIB)
    await groups.enter(process.pid, TOKEN)
    assert TOKEN in groups_of(process.pid)
    assert TOKEN not in groups_of(os.getpid())
    assert groups.reason(TOKEN) is None
    assert process.stdin is not None
    process.stdin.write(b"x")
    assert await process.wait() == -9
    assert groups.reason(TOKEN) == "out of memory: its limit is 48.0 MiB (mount-memory-limit)"
    await groups.leave(TOKEN)
    await groups.leave(TOKEN)
    assert str(groups.reason(TOKEN)).startswith("out of memory"), "still known when the group is gone"


async def test_a_process_below_the_limit_lives(groups: Cgroups) -> None:
    process = await eater(8 * MIB)
    await groups.enter(process.pid, TOKEN)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"x")
    assert await process.stdout.readline() == b"fine\n"
    assert await ended(process) == 0
    assert groups.reason(TOKEN) is None
    await groups.leave(TOKEN)


async def test_a_process_that_has_ended_already(groups: Cgroups) -> None:
    process = await eater(1)
    assert await ended(process) == 0
    await groups.enter(process.pid, TOKEN)
    assert groups.problem is None
    await groups.leave(TOKEN)


async def test_groups_that_nobody_knows_are_removed(groups: Cgroups) -> None:
    """A former agent was killed; of its processes one lives on, and one has ended since."""
    if groups.kind == "systemd":
        pytest.skip("systemd removes the groups of ended processes itself")
    living, gone = await eater(1), await eater(1)
    await groups.enter(living.pid, "living")
    await groups.enter(gone.pid, "gone")
    await ended(gone)
    assert await groups.sweep({"living"}) == 1
    assert "living" in groups_of(living.pid)
    await ended(living)
    assert await groups.sweep(()) == 1


async def test_without_the_right_it_is_said_and_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cgroups, "_SYSTEMD", Path("/nonexistent"))
    monkeypatch.setattr(cgroups, "find_hierarchy", lambda: Hierarchy(Path("/proc/1"), 1, nested=False))
    without = Cgroups("no-rights", None)
    assert without.kind == "none"
    assert "no control groups can be made" in str(without.problem)
    assert without.warnings() == []
    assert not caplog.records, "no limit was asked for, so nobody needs to be warned"
    await without.enter(os.getpid(), TOKEN)
    assert without.reason(TOKEN) is None
    await without.leave(TOKEN)
    await without.close()
    monkeypatch.setattr(cgroups, "find_hierarchy", lambda: None)
    assert "no hierarchy" in str(Cgroups("no-memory", None).problem)


@pytest.mark.expects_log("the memory limit of mount processes is not in force")
async def test_a_limit_that_cannot_be_kept_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "_SYSTEMD", Path("/nonexistent"))
    monkeypatch.setattr(cgroups, "find_hierarchy", lambda: None)
    assert "not in force" in Cgroups("no-rights", MIB).warnings()[0]


async def test_version_2_as_the_kernel_documents_it(tmp_path: Path) -> None:
    """The files that are written, on a directory that stands for the hierarchy: hosts with version 1 have no other.

    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
    """
    base = tmp_path / "mooring-node"
    base.mkdir()
    for place in (tmp_path, base):
        (place / "cgroup.subtree_control").write_text("cpu")
    backend = Directories(base, 2)
    backend.enter(4711, TOKEN, 5 * MIB)
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory"
    assert (base / "cgroup.subtree_control").read_text() == "+memory"
    group = base / TOKEN
    assert (group / "memory.max").read_text() == str(5 * MIB)
    assert (group / "cgroup.procs").read_text() == "4711"
    (group / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\noom_group_kill 0\n")
    assert backend.oom_kills(TOKEN) == 1


async def test_a_group_is_beside_the_one_of_the_agent(tmp_path: Path) -> None:
    place = find_hierarchy()
    assert place is not None
    assert (place.own / "cgroup.procs").exists()
    assert str(os.getpid()) in (place.own / "cgroup.procs").read_text().split()


# --- with an agent ----------------------------------------------------------------------------------------------------


async def test_a_mount_process_has_a_group_while_it_lives(node: Node, folder: str) -> None:
    async with node.manager() as (agent, manager):
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        ((record, _),) = manager.mounts()
        (pid,) = node.processes()
        assert record.token in groups_of(pid)
        assert record.token not in groups_of(os.getpid())
        await agent.detach_session(spec.session_id)
        backend = Cgroups(node.config().agent.id, None)._backend
        assert backend is not None
        assert record.token not in backend.tokens()


@pytest.mark.expects_log("mount process ended")
async def test_a_mount_that_takes_too_much_is_repaired_and_says_why(node: Node, folder: str) -> None:
    """Many requests at once need more buffers than the limit allows; the next process has a better time."""
    async with node.manager(mount_memory_limit="2MiB") as (agent, manager):
        deaths: list[str] = []
        repairs: list[object] = []

        def note(event: object) -> None:
            if getattr(event, "new", None) is MountState.DEAD:
                deaths.append(str(getattr(event, "error", None)))
            if getattr(event, "kind", None) is EventKind.REPAIRED:
                repairs.append(event)

        manager.listen(note)
        spec = await agent.attach(node.grant(node.request(folder, "data"), new_session()))
        place = Path(spec.source)
        script = f"for i in $(seq 60); do (head -c 200000 /dev/zero > {place}/f$i; stat {place}/n$i) & done; wait"
        load = await asyncio.create_subprocess_exec("sh", "-c", script, stderr=asyncio.subprocess.DEVNULL)
        await until(lambda: bool(deaths), "the limit is exceeded", 30.0)
        async with asyncio.timeout(60):
            await load.wait()
        await until(lambda: bool(repairs), "it is repaired", 30.0)
        assert "out of memory: its limit is 2.0 MiB" in deaths[0]
