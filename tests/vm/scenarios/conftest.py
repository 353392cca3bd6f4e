"""One S3 server, one agent and podman on this machine; what a machine cannot give is skipped with the reason."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import pytest_asyncio

from agent_plugin.kernel import entries_below, unmount
from storage_proxy.core.secrets import Secret, write_private
from storage_proxy.core.wire import S3Credential
from storage_proxy.embedded.weed import WeedConfig, WeedIdentity, WeedPorts, WeedServer
from storage_proxy.s3 import Endpoint, S3Client
from tests.conftest import S3Server, make_credential
from tests.t4_agent.podman import podman_in

from .host import ABILITIES, PLACE, SLOWNESS, Host, HostNode, make_service, until

BUCKET = "scenarios"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(ability, why): the machine must have this ability")
    config.addinivalue_line("markers", "agent(**settings): settings of [agent] for this scenario")


@pytest.fixture(autouse=True)
def able(request: pytest.FixtureRequest) -> None:
    for mark in request.node.iter_markers("needs"):
        if mark.args[0] not in ABILITIES:
            pytest.skip(f"this machine has no {mark.args[0]}: {mark.args[1]}")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """SeaweedFS with its data on the disk: after a power cut the same server, ports and keys come back."""
    PLACE.mkdir(mode=0o700, parents=True, exist_ok=True)
    admin, ports = _known_server(PLACE / "s3.json")
    config = WeedConfig(
        dir=PLACE / "weed", ports=ports, identities=(WeedIdentity("admin", admin),), log_file=PLACE / "weed.log"
    )
    server = WeedServer(config)
    with asyncio.Runner() as runner:
        runner.run(server.start(deadline=60 * SLOWNESS))
        try:
            endpoint = Endpoint(server.endpoint_url)
            runner.run(_fill(endpoint, admin))
            assert server.pid is not None
            yield S3Server(endpoint, admin, admin, BUCKET, server.pid)
        finally:
            runner.run(server.stop())


def _known_server(path: Path) -> tuple[S3Credential, WeedPorts]:
    if not path.exists():
        admin, ports = make_credential(), WeedPorts.pick_free()
        known = {"access": admin.access_key, "secret": admin.secret_key.reveal(), "ports": asdict(ports)}
        write_private(path, json.dumps(known).encode())
    known = json.loads(path.read_text())
    return S3Credential(access_key=known["access"], secret_key=Secret(known["secret"])), WeedPorts(**known["ports"])


async def _fill(endpoint: Endpoint, admin: S3Credential) -> None:
    async with S3Client(endpoint, admin) as s3:
        await s3.create_bucket(BUCKET)
        for prefix in ("data/", "other/"):
            await s3.put(BUCKET, prefix, b"", content_type="application/x-directory")
            await s3.put(BUCKET, f"{prefix}hello.txt", f"hello from {prefix}".encode())


@pytest.fixture
def node(s3_server: S3Server) -> HostNode:
    return HostNode(s3_server.endpoint.url, s3_server.admin, PLACE / "node")


@pytest_asyncio.fixture
async def host(request: pytest.FixtureRequest, node: HostNode) -> AsyncIterator[Host]:
    """Everything runs; at the end nothing is left, and the agent's log is shown if the scenario failed."""
    settings = {name: value for mark in request.node.iter_markers("agent") for name, value in mark.kwargs.items()}
    service = make_service(node, **settings)
    place = node.place / "podman"
    place.mkdir()
    made: Host | None = None
    try:
        async with podman_in(place) as podman:
            code, output = await podman.run("exit 7")
            assert code == 7, f"podman does not work here: {output}"
            made = Host(node, service, await service.start(), podman, BUCKET)
            yield made
            for reader in made.readers:
                await podman.remove(reader.name)
        for item in await made.agent.attachments():
            await made.agent.detach_session(item.session_id)
        await until(lambda: node.residue() == {}, f"nothing is left: {node.residue()}")
    finally:
        if made is not None:
            await made.agent.close()
        await service.close()
        print(f"--- the agent's log\n{_tail(service.log)}")
        _wipe(node)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-12_000:] if log.exists() else ""


def _wipe(node: HostNode) -> None:
    """Whatever a failed scenario left, so that the next one fails for reasons of its own."""
    for pid in node.processes():
        os.kill(pid, 9)
    for place in (node.runtime, node.place):
        while entries := entries_below(place):
            unmount(Path(entries[-1].mount_point), lazy=True)
    for place in (node.place, node.state, node.runtime):
        shutil.rmtree(place, ignore_errors=True)
