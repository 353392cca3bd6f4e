"""Large objects up and down: parts in parallel, memory bounded, hashed on the way, nothing left behind on errors.

Sizes are bytes. Memory is `(concurrency + 1) * part_size` for an upload (one buffer being filled, the rest on their
way; the buffers are reused) and `concurrency * part_size` for a download.

Bodies are hashed once. A single PUT is signed with the SHA-256 that is known by then, so the server checks the bytes;
parts are sent with an unsigned payload over TLS and on loopback, where hashing them again for the signature would cost
four fifths of the sender's CPU (measured: 0.6 against 2.3 CPU-seconds per GiB), and with a signed one over plain HTTP
to another machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import stamina

from ..core.errors import IntegrityError, InvalidRequest, LimitExceeded, S3Unavailable
from .client import S3Client
from .objects import PartInfo

T = TypeVar("T")

MIB = 1024 * 1024
# Limits of S3: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
MIN_PART = 5 * MIB
MAX_PART = 5 * 1024 * MIB
MAX_PARTS = 10_000
MAX_OBJECT = MAX_PART * MAX_PARTS
DEFAULT_PART = 8 * MIB
# A stream of unknown length doubles its part size this often, so that 10,000 parts hold 484 GiB and not 78.
_GROW_EVERY = 2000


@dataclass(frozen=True, slots=True)
class Uploaded:
    """What was published. `sha256` in hex over the whole body; `parts` is 0 for a single PUT."""

    size: int
    sha256: str
    etag: str
    parts: int


def plan_part_size(size: int | None, preferred: int = DEFAULT_PART) -> int:
    """At least 5 MiB, and so that `size` needs at most 10,000 parts, in whole MiB. Raises LimitExceeded over 48.8
    TiB.
    """
    if size is not None and size > MAX_OBJECT:
        raise LimitExceeded(f"An object of {size} bytes is larger than S3 can hold.", hint="Split the file.")
    needed = -(-(size or 0) // MAX_PARTS)
    return max(MIN_PART, preferred, -(-needed // MIB) * MIB)


async def upload_stream(
    client: S3Client,
    bucket: str,
    key: str,
    source: AsyncIterator[bytes],
    *,
    size: int | None,
    part_size: int | None = None,
    concurrency: int = 4,
    metadata: Mapping[str, str] | None = None,
    content_type: str | None = None,
    progress: Callable[[int], None] | None = None,
    expect_sha256: str | None = None,
) -> Uploaded:
    """Publishes `source` as one object, atomically: readers see the old object or the whole new one.

    What fits one part (or is empty) goes in a single PUT. `progress` gets the number of bytes stored so far. `size`, if
    known, and `expect_sha256` (hex) are checked before anything is published: IntegrityError. On any error and when
    cancelled the multipart upload is aborted, also when the cancel hits while it is being created.
    """
    upload = _Upload(client, bucket, key, size, part_size, concurrency, metadata, content_type, progress)
    return await upload.run(source, expect_sha256.lower() if expect_sha256 else None)


class _Upload:
    """One run of `upload_stream`."""

    def __init__(
        self,
        client: S3Client,
        bucket: str,
        key: str,
        size: int | None,
        part_size: int | None,
        concurrency: int,
        metadata: Mapping[str, str] | None,
        content_type: str | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._client, self._bucket, self._key = client, bucket, key
        self._size = size
        self._base_part = plan_part_size(size, part_size or DEFAULT_PART)
        self._concurrency = concurrency
        self._metadata, self._content_type = metadata, content_type
        self._progress = progress or (lambda _: None)
        self._hash = hashlib.sha256()
        self._received = 0
        self._stored = 0
        self._upload_id: str | None = None
        self._parts: list[PartInfo] = []
        # Empty at first; a buffer is made when none is free, and comes back when its part is stored.
        self._buffers: list[bytearray] = []
        self._slots = asyncio.Semaphore(concurrency)

    async def run(self, source: AsyncIterator[bytes], expected: str | None) -> Uploaded:
        try:
            async with asyncio.TaskGroup() as group:
                last = await self._read(source, group, expected)
            if self._upload_id is None:
                info = await self._client.put(
                    self._bucket,
                    self._key,
                    last,
                    metadata=self._metadata,
                    content_type=self._content_type,
                    sha256=self._hash.hexdigest(),
                )
                self._progress(len(last))
            else:
                info = await self._client.complete_multipart(self._bucket, self._key, self._upload_id, self._parts)
        except BaseException as err:
            if self._upload_id is not None:
                await _settle(self._client.abort_multipart(self._bucket, self._key, self._upload_id))
            if isinstance(err, BaseExceptionGroup):
                raise _first(err) from None
            raise
        return Uploaded(self._received, self._hash.hexdigest(), info.etag, len(self._parts))

    async def _read(self, source: AsyncIterator[bytes], group: asyncio.TaskGroup, expected: str | None) -> memoryview:
        """Cuts the source into parts and starts their uploads. Returns the last piece if it is to be PUT on its own."""
        number = 1
        buffer = self._take(number)
        filled = 0
        async for chunk in source:
            view = memoryview(chunk)
            while view:
                # A full buffer is only sent when more comes, so a body of exactly one part is a single PUT.
                if filled == len(buffer):
                    await self._send(group, number, buffer, filled)
                    number += 1
                    buffer, filled = self._take(number), 0
                take = min(len(view), len(buffer) - filled)
                buffer[filled : filled + take] = view[:take]
                filled += take
                self._received += take
                view = view[take:]
            if self._size is not None and self._received > self._size:
                break
        await self._hash_in_thread(memoryview(buffer)[:filled])
        self._check(expected)
        if self._upload_id is None:
            return memoryview(buffer)[:filled]
        await self._send(group, number, buffer, filled, hashed=True)
        return memoryview(b"")

    def _check(self, expected: str | None) -> None:
        if self._size is not None and self._received != self._size:
            more = "more than" if self._received > self._size else f"{self._received} of"
            raise IntegrityError(
                f"The source of {self._key!r} gave {more} the declared {self._size} bytes.",
                hint="Nothing was published; send the whole file again.",
                detail={"declared": self._size, "received": self._received},
            )
        if expected is not None and self._hash.hexdigest() != expected:
            raise IntegrityError(
                f"The source of {self._key!r} has another SHA-256 than was promised.",
                hint="Nothing was published; compare the file with its source and send it again.",
                detail={"expected_sha256": expected, "received_sha256": self._hash.hexdigest()},
            )

    def _take(self, number: int) -> bytearray:
        """A buffer of the size of part `number`."""
        size = self._base_part if self._size is not None else self._base_part << ((number - 1) // _GROW_EVERY)
        if number > MAX_PARTS or size > MAX_PART:
            raise LimitExceeded(
                f"{self._key!r} is larger than {MAX_PARTS} parts can hold.", hint="Declare its size before the upload."
            )
        while self._buffers:
            buffer = self._buffers.pop()
            if len(buffer) == size:
                return buffer
        return bytearray(size)

    async def _send(
        self, group: asyncio.TaskGroup, number: int, buffer: bytearray, filled: int, *, hashed: bool = False
    ) -> None:
        if self._upload_id is None:
            await self._begin()
        if not hashed:
            await self._hash_in_thread(memoryview(buffer)[:filled])
        await self._slots.acquire()
        group.create_task(self._store(number, buffer, filled), name=f"upload part {number}")

    async def _hash_in_thread(self, view: memoryview) -> None:
        # hashlib lets go of the GIL, so other transfers go on meanwhile; a small rest is not worth the switch.
        if len(view) > 256 * 1024:
            await asyncio.to_thread(self._hash.update, view)
        else:
            self._hash.update(view)

    async def _begin(self) -> None:
        """Creates the multipart upload. A cancel waits for the answer: an id that nobody knows could not be aborted."""
        task = asyncio.create_task(
            self._client.create_multipart(
                self._bucket, self._key, metadata=self._metadata, content_type=self._content_type
            )
        )
        try:
            self._upload_id = await asyncio.shield(task)
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):
                self._upload_id = await _wait(task)
            raise

    async def _store(self, number: int, buffer: bytearray, filled: int) -> None:
        try:
            assert self._upload_id is not None  # noqa: S101 - `_send` began it
            with memoryview(buffer)[:filled] as view:
                part = await self._client.upload_part(self._bucket, self._key, self._upload_id, number, view)
            self._parts.append(part)
            self._stored += filled
            self._buffers.append(buffer)
            self._progress(self._stored)
        finally:
            self._slots.release()


@dataclass(slots=True)
class _Range:
    """A range on its way: its chunks, then None, or the error that ended it."""

    chunks: asyncio.Queue[bytes | Exception | None] = field(default_factory=asyncio.Queue)
    task: asyncio.Task[None] | None = None


async def download_ranges(
    client: S3Client,
    bucket: str,
    key: str,
    *,
    length: int,
    start: int = 0,
    part_size: int = DEFAULT_PART,
    concurrency: int = 4,
    if_match: str | None = None,
) -> AsyncGenerator[bytes, None]:
    """The `length` bytes from `start`, in order, fetched as ranges of `part_size`, `concurrency` at a time.

    All ranges are of one version: that of ETag `if_match`, or of the object as it is now. S3PreconditionFailed if it is
    replaced meanwhile. A range whose body breaks off is continued where it broke. Bytes of the first range are yielded
    as they arrive. Close the generator (`contextlib.aclosing`) when leaving early.
    """
    if start < 0 or length < 0 or part_size < 1 or concurrency < 1:
        raise InvalidRequest("A download range has a negative start or length, or no part size.")
    if length == 0:
        return
    etag = if_match if if_match is not None else (await client.head(bucket, key)).etag
    end = start + length
    window: deque[_Range] = deque()
    following = start
    try:
        while following < end or window:
            while following < end and len(window) < concurrency:
                first, following = following, min(following + part_size, end)
                item = _Range()
                item.task = asyncio.create_task(_fetch(client, bucket, key, first, following - 1, etag, item))
                window.append(item)
            while (chunk := await window[0].chunks.get()) is not None:
                if isinstance(chunk, Exception):
                    raise chunk
                yield chunk
            window.popleft()
    finally:
        tasks = [item.task for item in window if item.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await _settle(asyncio.wait(tasks))


async def _fetch(client: S3Client, bucket: str, key: str, first: int, last: int, etag: str, item: _Range) -> None:
    """Fills `item`; every error ends up in it."""
    position = first
    try:
        async for attempt in stamina.retry_context(
            on=S3Unavailable, attempts=client.endpoint.attempts, timeout=None, wait_initial=0.1, wait_max=2.0
        ):
            with attempt:
                async with await client.get(bucket, key, start=position, end=last, if_match=etag) as stream:
                    async for chunk in stream.chunks():
                        position += len(chunk)
                        item.chunks.put_nowait(chunk)
                if position != last + 1:
                    raise IntegrityError(f"s3://{bucket}/{key} is shorter than byte {last}.")
    except Exception as err:
        item.chunks.put_nowait(err)
    else:
        item.chunks.put_nowait(None)


async def _wait(task: asyncio.Task[T]) -> T:
    """The result of `task`, waited for even if the caller is cancelled meanwhile (again)."""
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    return task.result()


async def _settle(work: Coroutine[Any, Any, object]) -> None:
    """Clean-up that runs to its end; its own failure must not hide the error that made it necessary."""
    with contextlib.suppress(Exception):
        await _wait(asyncio.ensure_future(work))


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that began it: a TaskGroup cancels the others."""
    for err in group.exceptions:
        return _first(err) if isinstance(err, BaseExceptionGroup) else err
    return group
