"""One file from this machine into a folder: through the proxy (TUS) or by presigned URLs straight into the object
store."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from urllib.parse import urlsplit

from ..core.config import parse_request
from ..core.errors import (
    IntegrityError,
    InternalError,
    MooringError,
    OffsetMismatch,
    S3AccessDenied,
    S3Error,
    S3Unavailable,
    ServiceUnavailable,
    UploadBusy,
)
from ..core.wire import Wire
from .channel import Answer, Body, Broken, Channels, together
from .http import error_from_answer
from .manager import ManagerClient, TransferTicket

TUS_VERSION = "1.0.0"
ATTEMPTS = 7  # in a row without progress: 0.2 s doubling, about 12 s, the time in which a killed proxy is back
FIRST_PAUSE_SECONDS = 0.2
BUSY_SECONDS = 90.0  # the proxy frees an upload of a killed process after 60 s
BUSY_PAUSE_SECONDS = 0.3
PARTS_AT_ONCE = 4
HASH_CHUNK_BYTES = 1024 * 1024

Progress = Callable[[int], None]


class Mode(StrEnum):
    """Which way the bytes go. Presigned needs the object store to be reachable from here."""

    PROXIED = "proxied"
    PRESIGNED = "presigned"


@dataclass(frozen=True, slots=True)
class Uploaded:
    """`sha256` in hex, of the bytes that were read here and sent along for the proxy to compare (mode proxied)."""

    relpath: str
    size: int
    sha256: str


class PresignedPart(Wire):
    number: int
    url: str
    size: int


class PresignedPlan(Wire):
    """Where each part of a file goes: one PUT per part, in any order, before `expires_at`."""

    part_size: int
    parts: list[PresignedPart]
    expires_at: datetime | None = None


class Patience:
    """Counts failures in a row and waits after each; `progressed` starts the count anew."""

    def __init__(self, what: str, url: str) -> None:
        parts = urlsplit(url)
        self._what = f"{what} ({parts.scheme}://{parts.netloc.rpartition('@')[2]})"
        self._failures = 0
        self._busy_since = 0.0

    def progressed(self) -> None:
        self._failures = 0
        self._busy_since = 0.0

    async def after(self, reason: str | MooringError) -> None:
        """Raises the error itself, or `ServiceUnavailable`, once it was too often; else pauses."""
        if isinstance(reason, UploadBusy):
            self._busy_since = self._busy_since or time.monotonic()
            if time.monotonic() - self._busy_since > BUSY_SECONDS:
                raise reason
            await asyncio.sleep(BUSY_PAUSE_SECONDS)
            return
        self._failures += 1
        if self._failures >= ATTEMPTS:
            if isinstance(reason, MooringError):
                raise reason
            raise ServiceUnavailable(
                f"{self._what} failed {self._failures} times in a row: {reason}.",
                hint="Check with `mooring doctor`, then run it again: it goes on where it stopped.",
            )
        pause = FIRST_PAUSE_SECONDS * 2 ** (self._failures - 1)
        await asyncio.sleep(pause * random.uniform(0.8, 1.2))


def with_token(ticket: TransferTicket, below: str = "", **query: str) -> str:
    """The URL of a ticket with its token (a JWT: needs no escaping)."""
    extra = "".join(f"&{name}={value}" for name, value in query.items())
    return f"{ticket.url.rstrip('/')}{below}?token={ticket.token}{extra}"


def store_error(answer: Answer, what: str) -> MooringError:
    """The error of an answer that came from the object store itself (an XML document)."""
    if answer.status in (500, 502, 503, 504):
        return S3Unavailable(f"The object store could not take {what} (status {answer.status}).", hint="Try again.")
    if answer.status in (400, 401, 403):
        return S3AccessDenied(
            f"The object store refused the presigned URL for {what} (status {answer.status}).",
            hint="It may have expired, or the clocks differ; run it again, or use the proxied way.",
        )
    return S3Error(f"The object store answered {what} with status {answer.status}.", hint="Use the proxied way.")


class FileUpload:
    """Sends `size` bytes of the open file `fd` to `folder`/`relpath`. Use once."""

    def __init__(
        self,
        channels: Channels,
        manager: ManagerClient,
        folder: str,
        relpath: str,
        fd: int,
        size: int,
        progress: Progress | None,
    ) -> None:
        self._channels, self._manager = channels, manager
        self._folder, self._relpath = folder, relpath
        self._fd, self._size = fd, size
        self._progress = progress
        self._said = 0

    async def run(self, mode: Mode) -> Uploaded:
        """Raises what the manager extension, the proxy or the object store answered; `IntegrityError` when the file
        changed while it was read; `ServiceUnavailable` when the connection stays broken."""
        before = os.fstat(self._fd)
        if before.st_size != self._size:
            raise self._changed()
        digest = await (self._through_proxy() if mode is Mode.PROXIED else self._presigned())
        after = os.fstat(self._fd)
        if (after.st_size, after.st_mtime_ns) != (self._size, before.st_mtime_ns):
            raise self._changed()
        return Uploaded(self._relpath, self._size, digest.hex())

    def _changed(self) -> IntegrityError:
        return IntegrityError(
            f"{self._relpath} changed while it was uploaded.",
            hint="Wait until nothing writes to it, then upload it again.",
        )

    # --- progress -----------------------------------------------------------------------------------------------------

    def _say(self, total: int) -> None:
        """Reports the way to `total` bytes; negative when a part has to be sent again."""
        if self._progress is not None and total != self._said:
            self._progress(total - self._said)
        self._said = total

    def _advance(self, count: int) -> None:
        self._say(min(self._said + count, self._size))

    # --- through the proxy --------------------------------------------------------------------------------------------

    async def _through_proxy(self) -> bytes:
        # The checksum goes into the head of the finishing PATCH, so it must be known before: one pass over the file,
        # which the next pass then finds in the page cache.
        async with together() as group:
            hashing = group.create_task(self._hash())
            asking = group.create_task(self._manager.request_upload(self._folder, self._relpath, self._size))
        digest, ticket = hashing.result(), asking.result()
        url = with_token(ticket)
        patience = Patience(f"Uploading {self._relpath}", url)
        offset = 0
        while True:
            self._say(offset)
            try:
                answer = await self._patch(url, offset, digest)
                if answer.status in (200, 204):
                    reached = _offset_of(answer)
                    if reached >= self._size:
                        self._say(self._size)
                        return digest
                    reason: str | MooringError = "the proxy took only a part"
                else:
                    reason = error_from_answer(answer.status, answer.content, "storage proxy")
                    if not (reason.temporary or isinstance(reason, (OffsetMismatch, UploadBusy))):
                        raise reason
            except Broken as err:
                reason = err.reason
            reached = await self._ask_offset(url, patience, reason)
            if reached > offset:
                patience.progressed()
            offset = reached

    async def _patch(self, url: str, offset: int, digest: bytes) -> Answer:
        headers = {
            "Tus-Resumable": TUS_VERSION,
            "Content-Type": "application/offset+octet-stream",
            "Upload-Offset": str(offset),
            "Upload-Checksum": f"sha256 {base64.b64encode(digest).decode()}",
        }
        body = Body(self._size - offset, fd=self._fd, offset=offset, name=self._relpath)
        return await self._channels.exchange("PATCH", url, headers=headers, body=body, moved=self._advance)

    async def _ask_offset(self, url: str, patience: Patience, reason: str | MooringError) -> int:
        """Where the upload stands and that it may go on there: HEAD, then a PATCH without a byte.

        The second because another request, also one that broke off a moment ago, may still hold the upload: finding
        that out with the rest of a file would send much of it for nothing.
        """
        while True:
            await patience.after(reason)
            try:
                answer = await self._channels.exchange("HEAD", url, headers={"Tus-Resumable": TUS_VERSION})
                if answer.status in (200, 204):
                    offset = _offset_of(answer)
                    if offset >= self._size:
                        return offset
                    headers = {"Tus-Resumable": TUS_VERSION, "Upload-Offset": str(offset), "Upload-Checksum": "sha256"}
                    answer = await self._channels.exchange("PATCH", url, headers=headers, body=Body(0))
                    if answer.status in (200, 204):
                        return offset
            except Broken as err:
                reason = err.reason
                continue
            reason = error_from_answer(answer.status, answer.content, "storage proxy")
            if not (reason.temporary or isinstance(reason, (OffsetMismatch, UploadBusy))):
                raise reason

    # --- straight into the object store -------------------------------------------------------------------------------

    async def _presigned(self) -> bytes:
        ticket = await self._manager.request_upload(self._folder, self._relpath, self._size)
        plan = parse_request(PresignedPlan, await self._post(ticket, "/presigned", b""))
        if sum(part.size for part in plan.parts) != self._size:
            raise InternalError("The storage proxy planned other parts than the file has.", hint="Report this.")
        etags: dict[int, str] = {}
        offsets, offset = [], 0
        for part in plan.parts:
            offsets.append(offset)
            offset += part.size
        todo = iter(zip(plan.parts, offsets, strict=True))

        async def work() -> None:
            for part, start in todo:
                etags[part.number] = await self._put_part(part, start)

        async with together() as group:
            hashing = group.create_task(self._hash())
            for _ in range(min(PARTS_AT_ONCE, len(plan.parts))):
                group.create_task(work())
        parts = [{"number": number, "etag": etags[number]} for number in sorted(etags)]
        await self._post(ticket, "/complete", json.dumps({"parts": parts}).encode())
        self._say(self._size)
        return hashing.result()

    async def _put_part(self, part: PresignedPart, start: int) -> str:
        patience = Patience(f"Uploading {self._relpath}", part.url)
        while True:
            sent = 0

            def moved(count: int) -> None:
                nonlocal sent
                sent += count
                self._advance(count)

            body = Body(part.size, fd=self._fd, offset=start, name=self._relpath)
            try:
                answer = await self._channels.exchange("PUT", part.url, body=body, moved=moved)
                if answer.status == 200:
                    return answer.headers.get("etag", "").strip('"')
                error = store_error(answer, f"part {part.number} of {self._relpath}")
                if not error.temporary:
                    raise error
                reason: str | MooringError = error
            except Broken as err:
                reason = err.reason
            self._say(self._said - sent)
            await patience.after(reason)

    async def _post(self, ticket: TransferTicket, below: str, data: bytes) -> object:
        """A small request to the proxy; its answer as JSON. Tried again: both routes are idempotent."""
        url = with_token(ticket, below)
        patience = Patience(f"Uploading {self._relpath}", url)
        while True:
            try:
                answer = await self._channels.exchange(
                    "POST", url, headers={"Content-Type": "application/json"}, body=Body(len(data), data=data)
                )
            except Broken as err:
                await patience.after(err.reason)
                continue
            if 200 <= answer.status < 300:
                return json.loads(answer.content) if answer.content else {}
            error = error_from_answer(answer.status, answer.content, "storage proxy")
            if not error.temporary:
                raise error
            await patience.after(error)

    # --- hashing ------------------------------------------------------------------------------------------------------

    async def _hash(self) -> bytes:
        return await sha256_of(self._channels, self._fd, self._size)


async def sha256_of(channels: Channels, fd: int, size: int) -> bytes:
    """SHA-256 of the first `size` bytes, in a thread; cancellation stops it. A file that is shorter gives another
    hash."""
    stop = threading.Event()
    digest = hashlib.sha256()

    def run() -> None:
        buffer = memoryview(bytearray(min(HASH_CHUNK_BYTES, max(size, 1))))
        offset = 0
        while offset < size and not stop.is_set():
            count = os.preadv(fd, [buffer[: min(len(buffer), size - offset)]], offset)
            if count == 0:
                return
            digest.update(buffer[:count])
            offset += count

    try:
        await channels.in_thread(run)
    except asyncio.CancelledError:
        stop.set()
        raise
    return digest.digest()


def _offset_of(answer: Answer) -> int:
    text = answer.headers.get("upload-offset", "")
    if not text.isdecimal():
        raise InternalError("The storage proxy did not say where the upload stands.", hint="Report this.")
    return int(text)
