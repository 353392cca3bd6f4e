"""One S3 server, one agent and podman on this machine; what a machine cannot give is skipped with the reason."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from storage_proxy.s3 import Endpoint
from tests.conftest import S3Server
from tests.t4_agent.podman import Podman, podman_trouble

from . import server
from .host import ABILITIES, PLACE, SLOWNESS, Host, HostNode, running_host


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
    with asyncio.Runner() as runner:
        weed = runner.run(server.start())
        try:
            assert weed.pid is not None
            yield S3Server(Endpoint(weed.endpoint_url), server.admin(), server.admin(), server.BUCKET, weed.pid)
        finally:
            runner.run(weed.stop())


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    """One for all: each of its commands takes seconds on an emulated machine."""
    place = PLACE / "podman"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(mode=0o700, parents=True)
    with asyncio.Runner() as runner:
        made = Podman(place, seconds=60 * SLOWNESS)
        trouble = runner.run(podman_trouble(made))
        assert trouble is None, trouble
        yield made
        runner.run(made("rm", "--all", "--force", "--time", "0"))


@pytest.fixture
def node(s3_server: S3Server) -> HostNode:
    return HostNode(s3_server.endpoint.url, s3_server.admin, PLACE / "node")


@pytest_asyncio.fixture
async def host(request: pytest.FixtureRequest, node: HostNode, podman: Podman) -> AsyncIterator[Host]:
    settings = {name: value for mark in request.node.iter_markers("agent") for name, value in mark.kwargs.items()}
    async with running_host(node, podman, server.BUCKET, **settings) as made:
        yield made
