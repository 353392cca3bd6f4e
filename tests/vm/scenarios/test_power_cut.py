"""The power fails under load; the same disk is booted again. The runner cuts it between the two tests."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys

import pytest

from storage_proxy.core.errors import TokenInvalid
from tests.conftest import S3Server
from tests.t4_agent.podman import Podman

from .host import PLACE, AgentUnit, HostNode, command, make_service, running_host, until
from .load import ACKNOWLEDGED
from .server import BUCKET

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.needs("power-cut", "it cannot be killed and booted again with the same disk"),
]

_LOG = PLACE / "load.log"


def acknowledged() -> list[str]:
    """Grants that the agent said yes to, in order. The last line may be torn: its write was under way."""
    lines = ACKNOWLEDGED.read_text().splitlines() if ACKNOWLEDGED.exists() else []
    return [json.loads(line)["grant"] for line in lines if line.endswith("}")]


async def test_before() -> None:
    """Leaves a load behind that attaches, detaches and reads without pause."""
    PLACE.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _LOG.open("wb") as output:
        load = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.vm.scenarios.load"),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def busy() -> bool:
        assert load.returncode is None, _LOG.read_text()
        return len(acknowledged()) >= 20

    await until(busy, "twenty attaches", 120)


async def test_after(s3_server: S3Server, podman: Podman) -> None:
    node = HostNode(s3_server.endpoint.url, s3_server.admin, PLACE / "node")
    used = acknowledged()
    assert len(used) >= 20
    await _is_whole(node)
    service = make_service(node)
    if isinstance(service, AgentUnit):
        code, output = await command("systemctl", "is-enabled", "mooring-agent.service")
        assert code == 0, output
        agent = await service.answering()  # the unit started with the machine
    else:
        agent = await service.start()
    try:
        assert await agent.attachments() == []
        assert await agent.mounts() == []
        await until(lambda: node.residue() == {}, f"nothing of the time before is left: {node.residue()}")
        for grant in (used[0], used[-1]):
            with pytest.raises(TokenInvalid):
                await agent.attach(grant)
    finally:
        await agent.close()
        await service.close()
    await _is_whole(node)
    again = HostNode(s3_server.endpoint.url, s3_server.admin, PLACE / "node")
    async with running_host(again, podman, BUCKET) as host:
        reader = await host.reader(await host.attach())
        assert reader.is_the_same()


async def _is_whole(node: HostNode) -> None:
    """The journal is a sound database, whatever was being written."""
    db = sqlite3.connect(node.state / "journal.sqlite")
    try:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    finally:
        db.close()
