"""`/` is shared under systemd and private elsewhere: repairs reach running containers in both worlds."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from agent_plugin.kernel import Propagation, set_propagation, top_at
from tests.t4_agent.podman import Podman

from .host import ABILITIES, UNIT, Host, HostNode, command, running_host, systemctl, take_down
from .server import BUCKET

pytestmark = [pytest.mark.asyncio, pytest.mark.expects_log("mount process ended")]


@pytest_asyncio.fixture(params=["shared", "private"])
async def foreign(request: pytest.FixtureRequest, node: HostNode, podman: Podman) -> AsyncIterator[Host]:
    """An agent that starts on a host whose every mount has this propagation."""
    root = top_at("/")
    assert root is not None
    usual = "shared" if root.is_shared else "private"
    await _without_agent(node)
    await _make(request.param)
    try:
        async with running_host(node, podman, BUCKET) as host:
            yield host
    finally:
        await _without_agent(node)
        await _make(usual)


async def _without_agent(node: HostNode) -> None:
    """The agent's own mounts would change with all others."""
    if "systemd" in ABILITIES:
        await systemctl("stop", UNIT)
    take_down(node.runtime)


async def _make(propagation: str) -> None:
    code, output = await command("mount", f"--make-r{propagation}", "/")
    assert code == 0, output


async def test_repairs_reach_the_container(foreign: Host) -> None:
    base = top_at(foreign.node.runtime)
    root = top_at("/")
    assert base is not None
    assert root is not None
    assert base.is_shared, "the agent makes its base shared by itself"
    assert not {*base.tags} & {*root.tags}, "and of a peer group of its own"
    spec = await foreign.attach()
    bind = top_at(spec.source)
    assert bind is not None
    assert bind.is_shared
    reader = await foreign.reader(spec)
    (pid,) = foreign.node.processes()
    os.kill(pid, signal.SIGKILL)
    await reader.reads_well()
    assert reader.is_the_same()


async def test_a_base_that_somebody_made_private(host: Host) -> None:
    """Session binds have peer groups of their own, so somebody's `mount --make-private` on the base does no harm."""
    set_propagation(Path(host.node.runtime), Propagation.PRIVATE)
    try:
        spec = await host.attach()
        reader = await host.reader(spec)
        (pid,) = host.node.processes()
        os.kill(pid, signal.SIGKILL)
        await reader.reads_well()
    finally:
        set_propagation(Path(host.node.runtime), Propagation.SHARED)
