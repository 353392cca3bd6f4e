"""What mount processes cost, compared with what the kernel tells by other means."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from agent_plugin.resources import Resources, Totals, measure
from agent_plugin.supervisor import ProcessID

from .node import Node

pytestmark = [pytest.mark.root, pytest.mark.asyncio]

MIB = 1024 * 1024


async def test_figures_of_a_process_are_those_of_the_kernel() -> None:
    """A program that holds 32 MiB, three threads and five files, and has read and written one MiB."""
    text = (
        "import os, sys, threading, time\n"
        "memory = bytearray(32 * 2**20)\n"
        "files = [open('/dev/null') for _ in range(5)]\n"
        "[threading.Thread(target=sys.stdin.read, daemon=True).start() for _ in range(2)]\n"
        "zero, null = os.open('/dev/zero', os.O_RDONLY), os.open('/dev/null', os.O_WRONLY)\n"
        "os.write(null, os.read(zero, 2**20))\n"
        "while time.process_time() < 0.2: pass\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", text, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        assert await child.stdout.readline() == b"ready\n"
        identity = ProcessID.of(child.pid)
        assert identity is not None
        usage = measure(identity)
        assert usage is not None
        assert 32 * MIB <= usage.rss < 128 * MIB
        assert usage.pss is not None
        assert 32 * MIB <= usage.pss <= usage.rss + MIB
        assert usage.threads == 3
        assert usage.fds == len(list(Path(f"/proc/{child.pid}/fd").iterdir()))
        assert 0.1 <= usage.cpu_seconds < 20
        assert usage.read is not None
        assert usage.read >= MIB
        assert usage.written is not None
        assert usage.written >= MIB
        assert usage.disk_read is not None
        again = measure(identity, pss=7, again=False)
        assert again is not None
        assert again.pss == 7, "the dear figure is kept until its turn comes"
        assert measure(ProcessID(child.pid, identity.started + 1)) is None, "another process with the same pid"
    finally:
        child.kill()
        await child.wait()
    assert measure(identity) is None


async def test_every_mount_is_measured_and_those_that_are_gone_are_forgotten(node: Node, folder: str) -> None:
    async with node.manager() as (agent, manager):
        resources = Resources(manager.mounts)
        first = await agent.attach(node.grant(node.request(folder, "data")))
        second = await agent.attach(node.grant(node.request(folder, "other")))
        before = {spec.mount_key: 0.0 for spec in (first, second)}
        await resources.sample()
        for spec in (first, second):
            usage = resources.of(spec.mount_key)
            assert usage is not None
            assert usage.pss is not None
            assert usage.pss <= usage.rss
            assert usage.process.pid in node.processes()
            before[spec.mount_key] = float(usage.read or 0)
        totals = resources.totals()
        assert totals.processes == 2
        parts = [resources.of(spec.mount_key) for spec in (first, second)]
        assert totals == Totals.of([part for part in parts if part is not None])
        (Path(first.source) / "new.bin").write_bytes(os.urandom(MIB))
        await resources.sample()
        used, idle = resources.of(first.mount_key), resources.of(second.mount_key)
        assert used is not None
        assert idle is not None
        assert (used.read or 0) - before[first.mount_key] >= MIB, "what a session writes, the process reads"
        assert (idle.read or 0) - before[second.mount_key] < MIB
        await agent.detach_session(first.session_id)
        await resources.sample()
        assert resources.of(first.mount_key) is None
        assert resources.totals().processes == 1


async def test_the_memory_of_all_is_not_counted_twice(node: Node, folder: str) -> None:
    """PSS adds up where RSS does not: the program's own pages are shared."""
    async with node.manager() as (agent, manager):
        resources = Resources(manager.mounts)
        for number in range(4):
            await agent.attach(node.grant(node.request(folder, "data", credential_id=f"c{number}")))
        for _ in range(5):
            await resources.sample()
        totals = resources.totals()
        assert totals.processes == 4
        assert 0 < totals.pss < totals.rss
