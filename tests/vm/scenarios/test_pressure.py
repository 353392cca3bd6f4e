"""Many mounts, too little memory, full file systems: the node says no in time, and who works already goes on."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage_proxy.core.errors import MooringError

from .host import Host, until

pytestmark = [pytest.mark.asyncio]

MANY = 100
CGROUPS = Path("/sys/fs/cgroup")


async def test_a_hundred_mounts(host: Host) -> None:
    gate = asyncio.Semaphore(4)

    async def one(number: int) -> str:
        async with gate:
            spec = await host.attach(host.node.request(host.folder, "data", credential_id=f"key-{number}"))
            return spec.session_id

    sessions = await asyncio.gather(*map(one, range(MANY)))
    assert len(host.node.processes()) == MANY
    reader = await host.reader(await host.attach(host.node.request(host.folder, "data", credential_id="key-0")))
    (pid,) = [item.pid for item in await host.agent.mounts() if len(item.sessions) == 2]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: len(host.node.processes()) == MANY and pid not in host.node.processes(), "repaired among many")
    await reader.reads_well()
    await asyncio.gather(*(host.agent.detach_session(session) for session in sessions))
    await until(lambda: len(host.node.processes()) == 1, "all but the reader's are gone", 120)


async def test_a_hundred_sessions_share_one_mount(host: Host) -> None:
    request = host.node.request(host.folder, "data")
    specs = await asyncio.gather(*(host.attach(request) for _ in range(MANY)))
    assert len(host.node.processes()) == 1
    assert len({spec.source for spec in specs}) == MANY
    (pid,) = host.node.processes()
    os.kill(pid, signal.SIGKILL)
    await until(lambda: host.node.processes() not in ([], [pid]), "another mount process runs")
    readers = [await host.reader(spec) for spec in (specs[0], specs[-1])]
    for reader in readers:
        assert reader.is_the_same()
    await asyncio.gather(*(host.agent.detach_session(spec.session_id) for spec in specs))


@pytest.mark.agent(mount_memory_limit="256MiB")
async def test_a_mount_process_beyond_its_memory_is_replaced(host: Host) -> None:
    spec = await host.attach()
    reader = await host.reader(spec)
    (pid,) = host.node.processes()
    group = group_of(pid)
    assert group != group_of(os.getpid()), "it has a control group of its own"
    limit = group / "memory.max"
    assert limit.read_text().strip() == str(256 * 1024**2)
    limit.write_text("1M")  # less than it holds: the kernel ends it
    await until(lambda: host.node.processes() not in ([], [pid]), "another mount process runs")
    await reader.reads_well()
    assert reader.is_the_same()
    (other,) = host.node.processes()
    assert (group_of(other) / "memory.max").read_text().strip() == str(256 * 1024**2)


async def test_run_is_full(host: Host) -> None:
    """/run belongs to everybody. The agent has a tmpfs of its own below it, so a full one stops nobody."""
    reader = await host.reader(await host.attach())
    with full(Path("/run")):
        spec = await host.attach(host.node.request(host.folder, "other"))
        await reader.reads_well()
        assert await host.agent.detach_session(spec.session_id) == 1
    await reader.reads_well()
    assert reader.counts()[1] == 0


async def test_the_base_is_full(host: Host) -> None:
    """The agent's own tmpfs is full: attaching fails with the reason and leaves nothing; later it works again."""
    reader = await host.reader(await host.attach())
    before = host.node.residue()
    with full(host.node.runtime), full(host.node.runtime / "creds"):
        with pytest.raises(MooringError) as caught:
            await host.attach(host.node.request(host.folder, "other"))
        assert "space" in str(caught.value).lower(), caught.value
        await until(lambda: host.node.residue() == before, "the failed attach left nothing")
        await reader.reads_well()
    await host.attach(host.node.request(host.folder, "other"))
    assert reader.counts()[1] == 0


@contextmanager
def full(place: Path) -> Iterator[None]:
    """Fills a file system to the last byte and the last page."""
    filler = place / "filler"
    with filler.open("wb") as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    os.write(file.fileno(), b"\0" * size)
            except OSError:
                continue
    try:
        yield
    finally:
        filler.unlink(missing_ok=True)


def group_of(pid: int) -> Path:
    """The control group (version 2) of a process."""
    for line in (Path("/proc") / str(pid) / "cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return CGROUPS / line[3:].lstrip("/")
    raise AssertionError("no control groups of version 2")
