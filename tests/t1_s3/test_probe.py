"""The capability probe: it tells the truth about a real server and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from storage_proxy.core.errors import BucketNotFound, S3AccessDenied, S3BadCredential
from storage_proxy.s3 import S3Client, probe

from ..conftest import S3Server, make_credential
from ..fakes.fault_proxy import ALWAYS, Fault, FaultProxy


@pytest.mark.asyncio
async def test_the_embedded_server(s3: S3Client, bucket: str) -> None:
    found = await probe(s3, bucket)
    assert found.missing_core == []
    assert found.conditional_put
    assert found.checksum
    assert found.iam
    assert found.sts
    assert abs(found.clock_skew) < 3
    assert (await s3.list_page(bucket)).objects == []
    assert await s3.list_multipart_uploads(bucket) == []
    assert found.as_dict()["put_get"] is True


@pytest.mark.asyncio
async def test_a_poor_server(s3: S3Client, shaky: S3Client, faults: FaultProxy, bucket: str) -> None:
    """One without multipart uploads, batch delete and IAM."""
    for method, contains in (("POST", "uploads"), ("POST", "?delete")):
        faults.add(Fault(method=method, contains=contains, times=ALWAYS, status=501, code="NotImplemented"))
    found = await probe(shaky, bucket)
    assert found.missing_core == ["multipart", "delete_many"]
    assert "multipart" in found.notes
    assert (await s3.list_page(bucket)).objects == []


@pytest.mark.asyncio
async def test_a_credential_that_may_only_read(s3_server: S3Server) -> None:
    async with S3Client(s3_server.endpoint, s3_server.limited) as client:
        found = await probe(client, s3_server.limited_bucket)
        assert found.signature
        assert "put_get" in found.missing_core
        assert not found.iam
        with pytest.raises((S3AccessDenied, BucketNotFound)):
            await probe(client, "no-such-bucket")
    async with S3Client(s3_server.endpoint, make_credential()) as client:
        with pytest.raises(S3BadCredential):
            await probe(client, s3_server.limited_bucket)


@pytest.mark.asyncio
async def test_a_cancelled_probe_cleans_up(s3: S3Client, shaky: S3Client, faults: FaultProxy, bucket: str) -> None:
    slow = faults.add(Fault(method="PUT", contains="partNumber=2", delay=5))
    task = asyncio.create_task(probe(shaky, bucket))
    async with asyncio.timeout(15):
        while not slow.hits:  # noqa: ASYNC110 - the relay has no event for it
            await asyncio.sleep(0.01)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert (await s3.list_page(bucket)).objects == []
    assert await s3.list_multipart_uploads(bucket) == []
