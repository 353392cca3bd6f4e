from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

import pytest_asyncio

from storage_proxy.s3 import S3Client

from ..conftest import S3Server
from ..fakes.fault_proxy import FaultProxy


@pytest_asyncio.fixture
async def faults(s3_server: S3Server) -> AsyncIterator[FaultProxy]:
    """The real server, behind a relay that misbehaves on command."""
    async with FaultProxy(s3_server.endpoint.url) as proxy:
        yield proxy


@pytest_asyncio.fixture
async def shaky(s3_server: S3Server, faults: FaultProxy) -> AsyncIterator[S3Client]:
    """A client that goes through the relay."""
    endpoint = dataclasses.replace(s3_server.endpoint, url=faults.url)
    async with S3Client(endpoint, s3_server.admin) as client:
        yield client
