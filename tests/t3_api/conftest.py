"""Fixtures of the API layer: a storage proxy before the real S3 server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from storage_proxy.s3 import S3Client
from tests.conftest import S3Server

from .proxy_stand import ProxyStand, proxy_config, running


@pytest_asyncio.fixture
async def stand(s3_server: S3Server, s3: S3Client, bucket: str, tmp_path: Path) -> AsyncIterator[ProxyStand]:
    """A proxy with one volume, `minio`, on a bucket of its own."""
    config, secrets = proxy_config(
        tmp_path / "proxy", endpoint=s3_server.endpoint.url, bucket=bucket, credential=s3_server.admin
    )
    async with running(config, secrets, s3, bucket) as stand:
        yield stand
