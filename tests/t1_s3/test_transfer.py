"""Large objects up and down: bytes, hashes, memory, and what is left when something goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import tracemalloc
from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage_proxy.core.errors import (
    FileNotFound,
    IntegrityError,
    InvalidRequest,
    LimitExceeded,
    S3AccessDenied,
    S3PreconditionFailed,
    S3Unavailable,
)
from storage_proxy.s3 import S3Client, download_ranges, plan_part_size, upload_stream
from storage_proxy.s3.transfer import MAX_OBJECT, MAX_PARTS, MIN_PART

from ..conftest import S3Server
from ..fakes.fault_proxy import ALWAYS, Fault, FaultProxy

MIB = 1024 * 1024
PART = MIN_PART


def body_of(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


async def stream_of(body: bytes, piece: int = 300_007) -> AsyncIterator[bytes]:
    for start in range(0, len(body), piece):
        yield body[start : start + piece]


async def read_back(
    client: S3Client, bucket: str, key: str, *, part_size: int = 8 * MIB, concurrency: int = 4
) -> bytes:
    size = (await client.head(bucket, key)).size
    chunks = download_ranges(client, bucket, key, length=size, part_size=part_size, concurrency=concurrency)
    return b"".join([chunk async for chunk in chunks])


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 3 * PART, 3 * PART + 17])
@pytest.mark.parametrize("known", [True, False])
async def test_upload_and_download(s3: S3Client, bucket: str, size: int, known: bool) -> None:
    body = body_of(size)
    seen: list[int] = []
    done = await upload_stream(
        s3,
        bucket,
        "dir/file +%.bin",
        stream_of(body),
        size=size if known else None,
        part_size=PART,
        concurrency=2,
        metadata={"mtime": "1700000000"},
        content_type="application/x-test",
        progress=seen.append,
        expect_sha256=hashlib.sha256(body).hexdigest(),
    )
    assert (done.size, done.sha256) == (size, hashlib.sha256(body).hexdigest())
    assert done.parts == (0 if size <= PART else -(-size // PART))
    assert seen == sorted(seen)
    assert seen[-1] == size
    info = await s3.head(bucket, "dir/file +%.bin")
    assert (info.size, info.etag, info.content_type) == (size, done.etag, "application/x-test")
    assert info.metadata["mtime"] == "1700000000"
    for options in ({"part_size": MIB, "concurrency": 3}, {"part_size": 100 * MIB, "concurrency": 1}):
        assert await read_back(s3, bucket, "dir/file +%.bin", **options) == body
    assert await s3.list_multipart_uploads(bucket) == []


@pytest.mark.asyncio
async def test_any_range(s3: S3Client, bucket: str) -> None:
    body = body_of(100_000)
    await s3.put(bucket, "key", body)
    for start, length in ((0, 1), (99_999, 1), (5, 50_000), (33_333, 66_667), (7, 0)):
        got = b"".join(
            [c async for c in download_ranges(s3, bucket, "key", start=start, length=length, part_size=7_001)]
        )
        assert got == body[start : start + length]
    with pytest.raises((InvalidRequest, IntegrityError)):
        _ = [c async for c in download_ranges(s3, bucket, "key", start=90_000, length=10_001, part_size=20_000)]
    with pytest.raises(FileNotFound):
        _ = [c async for c in download_ranges(s3, bucket, "none", length=1)]
    async with await s3.get(bucket, "key", start=10, end=19) as stream:
        assert (stream.content_length, stream.content_range, stream.info.size) == (10, (10, 19, 100_000), 100_000)
        assert await stream.read() == body[10:20]


@pytest.mark.asyncio
async def test_a_file_that_changes_while_it_is_read(s3: S3Client, bucket: str) -> None:
    await s3.put(bucket, "key", body_of(4 * MIB))

    async def read_and_replace() -> None:
        async for _ in download_ranges(s3, bucket, "key", length=4 * MIB, part_size=MIB, concurrency=1):
            await s3.put(bucket, "key", body_of(4 * MIB, seed=2))

    with pytest.raises(S3PreconditionFailed):
        await read_and_replace()
    old = (await s3.head(bucket, "key")).etag
    await s3.put(bucket, "key", body_of(4 * MIB, seed=3))
    with pytest.raises(S3PreconditionFailed):
        _ = [c async for c in download_ranges(s3, bucket, "key", length=4 * MIB, if_match=old)]


@pytest.mark.expects_log("stamina.retry_scheduled")
@pytest.mark.asyncio
async def test_a_broken_body_is_continued(shaky: S3Client, faults: FaultProxy, bucket: str) -> None:
    body = body_of(3 * MIB)
    await shaky.put(bucket, "key", body)
    faults.add(Fault(method="GET", cut=400_000))
    faults.add(Fault(method="GET", status=503, code="SlowDown"))
    faults.add(Fault(method="GET", cut=200_000))
    assert await read_back(shaky, bucket, "key", part_size=MIB, concurrency=2) == body


@pytest.mark.expects_log("stamina.retry_scheduled")
@pytest.mark.asyncio
async def test_parts_that_fail_once(shaky: S3Client, faults: FaultProxy, bucket: str) -> None:
    body = body_of(4 * PART)
    faults.add(Fault(method="PUT", contains="partNumber=2", status=503, code="SlowDown"))
    faults.add(Fault(method="PUT", contains="partNumber=3", reset=True, after_server=True))
    done = await upload_stream(shaky, bucket, "key", stream_of(body), size=len(body), part_size=PART)
    assert done.parts == 4
    assert await read_back(shaky, bucket, "key") == body


@pytest.mark.expects_log("stamina.retry_scheduled")
@pytest.mark.asyncio
async def test_a_part_that_fails_for_good(shaky: S3Client, s3: S3Client, faults: FaultProxy, bucket: str) -> None:
    faults.add(Fault(method="PUT", contains="partNumber=2", times=ALWAYS, status=503, code="SlowDown"))
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield bytes(MIB)

    with pytest.raises(S3Unavailable):
        await upload_stream(shaky, bucket, "key", endless(), size=None, part_size=PART, concurrency=2)
    assert await s3.list_multipart_uploads(bucket) == []
    assert (await s3.list_page(bucket)).objects == []


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [100, 2 * PART + 5])
async def test_other_bytes_than_promised(s3: S3Client, bucket: str, size: int) -> None:
    body = body_of(size)
    wrong = hashlib.sha256(b"other").hexdigest()
    for arguments in ({"size": size, "expect_sha256": wrong}, {"size": size + 1}, {"size": size - 1}):
        with pytest.raises(IntegrityError):
            await upload_stream(s3, bucket, "key", stream_of(body), part_size=PART, **arguments)
    assert (await s3.list_page(bucket)).objects == []
    assert await s3.list_multipart_uploads(bucket) == []
    with pytest.raises(IntegrityError):  # and the server checks a hash it is given
        await s3.put(bucket, "key", body, sha256=wrong)
    assert (await s3.list_page(bucket)).objects == []


@pytest.mark.asyncio
async def test_a_source_that_fails(s3: S3Client, bucket: str) -> None:
    async def source() -> AsyncIterator[bytes]:
        yield bytes(2 * PART + 1)
        raise ConnectionResetError("the client went away")

    with pytest.raises(ConnectionResetError):
        await upload_stream(s3, bucket, "key", source(), size=None, part_size=PART)
    assert await s3.list_multipart_uploads(bucket) == []
    assert (await s3.list_page(bucket)).objects == []


@pytest.mark.asyncio
@pytest.mark.parametrize("moment", ["POST uploads", "PUT partNumber=1", "PUT partNumber=3", "POST uploadId"])
async def test_cancelled_at_any_moment(
    shaky: S3Client, s3: S3Client, faults: FaultProxy, bucket: str, moment: str
) -> None:
    """Each request in turn is made slow, and the upload is cancelled while that one is under way."""
    method, contains = moment.split()
    slow = faults.add(Fault(method=method, contains=contains, delay=0.3))
    body = body_of(3 * PART)
    task = asyncio.create_task(upload_stream(shaky, bucket, "key", stream_of(body), size=len(body), part_size=PART))
    async with asyncio.timeout(10):
        while not slow.hits:  # noqa: ASYNC110 - the relay has no event for it
            await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await s3.list_multipart_uploads(bucket) == []
    objects = (await s3.list_page(bucket)).objects
    # Once the completion is on its way, the server may have published the whole object; never a part of it.
    assert objects == [] or (contains == "uploadId" and objects[0].size == len(body))


@pytest.mark.asyncio
async def test_leaving_a_download_early(s3: S3Client, bucket: str) -> None:
    await s3.put(bucket, "key", body_of(4 * MIB))
    before = len(asyncio.all_tasks())
    async with contextlib.aclosing(
        download_ranges(s3, bucket, "key", length=4 * MIB, part_size=MIB, concurrency=4)
    ) as chunks:
        async for _ in chunks:
            break
    assert len(asyncio.all_tasks()) == before


@pytest.mark.asyncio
async def test_memory_is_bounded(s3: S3Client, bucket: str) -> None:
    """64 MiB with parts of 5 MiB, two at a time: three buffers, not twelve."""
    piece = body_of(256 * 1024)
    count = 256

    async def source() -> AsyncIterator[bytes]:
        for _ in range(count):
            yield piece

    await s3.list_multipart_uploads(bucket)  # loads the service model before the measurement
    tracemalloc.start()
    try:
        done = await upload_stream(s3, bucket, "key", source(), size=count * len(piece), part_size=PART, concurrency=2)
        peak_up = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        got = hashlib.sha256()
        async for chunk in download_ranges(s3, bucket, "key", length=done.size, part_size=PART, concurrency=2):
            got.update(chunk)
        peak_down = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert got.hexdigest() == done.sha256
    assert peak_up < 3 * PART + 4 * MIB
    assert peak_down < 2 * PART + 12 * MIB


@pytest.mark.asyncio
async def test_no_right_to_write(s3_server: S3Server) -> None:
    async with S3Client(s3_server.endpoint, s3_server.limited) as client:
        for size in (10, 2 * PART):
            with pytest.raises(S3AccessDenied):
                await upload_stream(
                    client, s3_server.limited_bucket, "key", stream_of(bytes(size)), size=size, part_size=PART
                )


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.none() | st.integers(0, MAX_OBJECT), st.integers(1, 512 * MIB))
def test_part_sizes_are_legal(size: int | None, preferred: int) -> None:
    part = plan_part_size(size, preferred)
    assert part >= max(MIN_PART, preferred)
    assert part <= 5 * 1024 * MIB
    if size is not None:
        assert -(-size // part) <= MAX_PARTS


def test_the_largest_object() -> None:
    assert plan_part_size(10 * MIB) == 8 * MIB
    with pytest.raises(LimitExceeded):
        plan_part_size(MAX_OBJECT + 1)
