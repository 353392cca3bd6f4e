"""The mount process is killed under a container that reads: the container goes on reading, never restarted."""

from __future__ import annotations

import os
import signal

import pytest

from .host import Host, until

pytestmark = [pytest.mark.asyncio, pytest.mark.expects_log("mount process ended")]


async def test_kill_three_times(host: Host) -> None:
    spec = await host.attach()
    reader = await host.reader(spec)
    for _ in range(3):
        (pid,) = host.node.processes()
        os.kill(pid, signal.SIGKILL)
        await until(lambda gone=pid: host.node.processes() not in ([], [gone]), "another mount process runs")
        await reader.reads_well()
    assert reader.is_the_same()
    good, failed = reader.counts()
    print(f"3 kills: {good} good reads, {failed} failed")
    code, output = await host.podman.execute(
        reader.name, "echo new >/data/new.txt && cat /data/new.txt; rm /data/new.txt"
    )
    assert (code, output) == (0, "new\n"), "it is writable as before"


async def test_two_containers_on_one_mount(host: Host) -> None:
    request = host.node.request(host.folder, "data")
    readers = [await host.reader(await host.attach(request)) for _ in range(2)]
    (pid,) = host.node.processes()
    os.kill(pid, signal.SIGKILL)
    for reader in readers:
        await reader.reads_well()
        assert reader.is_the_same()


async def test_a_container_without_propagation(host: Host) -> None:
    """Its bind is private: what happens on the host does not reach it, so it must be mended from inside."""
    spec = await host.attach()
    reader = await host.reader(spec, mount=f"type=bind,source={spec.source},target=/data,bind-propagation=rprivate")
    (pid,) = host.node.processes()
    os.kill(pid, signal.SIGKILL)
    await reader.reads_well()
    assert reader.is_the_same()
