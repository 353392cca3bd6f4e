"""The agent is stopped, killed and upgraded while a container reads: no read fails, no mount process ends."""

from __future__ import annotations

import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from .host import UNIT, AgentUnit, Host, command, systemctl

pytestmark = [pytest.mark.asyncio]

SOURCE = Path("/opt/mooring/src")


async def test_restart_under_load(host: Host) -> None:
    spec = await host.attach()
    reader = await host.reader(spec)
    mounts = host.node.processes()
    for _ in range(2):
        await host.restart()
        await reader.reads_well()
    assert host.node.processes() == mounts, "the mount process lives on"
    assert reader.is_the_same()
    good, failed = reader.counts()
    print(f"2 restarts: {good} good reads, {failed} failed")
    assert failed == 0
    assert [item.session_id for item in await host.agent.attachments()] == [spec.session_id]


async def test_killed_under_load(host: Host) -> None:
    spec = await host.attach()
    reader = await host.reader(spec)
    mounts = host.node.processes()
    await host.agent.close()
    await host.service.kill()
    if isinstance(host.service, AgentUnit):
        host.agent = await host.service.started_again()
    else:
        host.agent = await host.service.start()
    await reader.reads_well()
    assert host.node.processes() == mounts, "the mount process lives on"
    assert reader.counts()[1] == 0
    assert await host.agent.detach_session(spec.session_id) == 1, "the new agent knows the session"


@pytest_asyncio.fixture
async def put_back() -> AsyncIterator[None]:
    yield
    code, output = await command("bash", str(SOURCE / "tests/vm/provision.sh"), seconds=600)
    assert code == 0, output


@pytest.mark.needs("systemd", "provision.sh restarts the unit")
@pytest.mark.usefixtures("put_back")
async def test_upgrade_under_load(host: Host, tmp_path: Path) -> None:
    """A newer tree is provisioned over a host at work, as an operator does it."""
    spec = await host.attach()
    reader = await host.reader(spec)
    mounts = host.node.processes()
    newer = tmp_path / "newer"
    shutil.copytree(SOURCE, newer, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (newer / "pyproject.toml", newer / "storage_proxy" / "__init__.py"):
        path.write_text(re.sub(r'(?m)^((?:__version__|version) = )"[^"]+"', r'\1"9.9.9"', path.read_text()))
    await host.agent.close()
    code, output = await command("bash", str(newer / "tests/vm/provision.sh"), seconds=600)
    assert code == 0, output
    assert isinstance(host.service, AgentUnit)
    host.agent = await host.service.answering()
    assert (await host.agent.status()).version == "9.9.9"
    await reader.reads_well()
    assert host.node.processes() == mounts, "the mount process lives on"
    assert reader.is_the_same()
    good, failed = reader.counts()
    print(f"upgrade: {good} good reads, {failed} failed")
    assert failed == 0


@pytest.mark.needs("systemd", "it is about the unit")
async def test_a_stopped_unit_leaves_sessions_alone(host: Host) -> None:
    """`systemctl stop` ends the agent, not the mounts of running sessions (KillMode=process)."""
    spec = await host.attach()
    reader = await host.reader(spec)
    await host.agent.close()
    await systemctl("stop", UNIT)
    await reader.reads_well(further=10)
    assert len(host.node.processes()) == 1
    host.agent = await host.service.start()
    assert reader.counts()[1] == 0
