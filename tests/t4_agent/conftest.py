"""A real node on a real S3 server: real s3fs processes, real mounts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from storage_proxy.s3 import S3Client
from tests.conftest import S3Server

from .node import Node, skip_reason
from .podman import Podman, missing_programs, podman_in, podman_trouble


@pytest.fixture(autouse=True)
def may_mount(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("root") and (reason := skip_reason()):
        pytest.skip(reason)


@pytest.fixture
def node(s3_server: S3Server) -> Iterator[Node]:
    made = Node(s3_server.endpoint.url, s3_server.admin)
    yield made
    made.destroy()


@pytest_asyncio.fixture
async def podman(node: Node) -> AsyncIterator[Podman]:
    """A podman whose containers end before the node does."""
    if reason := missing_programs():
        pytest.skip(reason)
    place = node.place / "podman"
    place.mkdir()
    async with podman_in(place) as made:
        if reason := await podman_trouble(made):
            pytest.skip(reason)
        yield made


@pytest_asyncio.fixture
async def bucket(s3: S3Client) -> AsyncIterator[str]:
    """An empty bucket, the same for all tests here: each bucket of the server takes volumes that it has few of."""
    name = "t4-agent"
    await s3.create_bucket(name)
    await _empty(s3, name)
    yield name
    await _empty(s3, name)


async def _empty(s3: S3Client, name: str) -> None:
    async for page in s3.list(name):
        await s3.delete_many(name, [item.key for item in page.objects])


@pytest_asyncio.fixture
async def folder(s3: S3Client, bucket: str) -> AsyncIterator[str]:
    """A bucket with two directories, `data/` and `other/`, and a file in each."""
    for prefix in ("data/", "other/"):
        await s3.put(bucket, prefix, b"", content_type="application/x-directory")
        await s3.put(bucket, f"{prefix}hello.txt", f"hello from {prefix}".encode())
    yield bucket
