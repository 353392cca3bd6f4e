"""The mount process hangs: who waits on it is freed, and another one takes its place."""

from __future__ import annotations

import os
import signal

import pytest

from .host import Host, until

pytestmark = [pytest.mark.asyncio]


async def test_stopped_under_a_reader(host: Host) -> None:
    spec = await host.attach()
    reader = await host.reader(spec)
    (pid,) = host.node.processes()
    os.kill(pid, signal.SIGSTOP)
    await until(lambda: pid not in host.node.processes(), "the one that hangs is gone", 120)
    await reader.reads_well()
    assert reader.is_the_same()
    assert len(host.node.processes()) == 1


async def test_other_sessions_do_not_notice(host: Host) -> None:
    spec = await host.attach()
    (pid,) = host.node.processes()
    reader = await host.reader(spec)
    other = await host.reader(await host.attach(host.node.request(host.folder, "data", credential_id="other")))
    os.kill(pid, signal.SIGSTOP)
    await until(lambda: pid not in host.node.processes(), "the one that hangs is gone", 120)
    await reader.reads_well()
    await other.reads_well()
    assert other.counts()[1] == 0, "the other session's reads all succeeded"
