"""Sending the bytes of a file, and never anything else under their length."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from aiohttp import web

from ..core.errors import DeadlineExceeded
from ..s3 import ObjectInfo
from ..volumes import FolderTree
from .services import SERVICES

CHUNK = 512 * 1024
WRITE_BUFFER = 1024 * 1024
STALLED_SECONDS = 120.0


async def stream_file(
    request: web.Request,
    tree: FolderTree,
    info: ObjectInfo,
    *,
    status: int,
    headers: Mapping[str, str],
    start: int,
    length: int,
) -> web.StreamResponse:
    """Answers with `length` bytes from `start` of exactly the version that `info` is.

    Errors before the first byte become an answer, later ones cut the connection (see `web.errors`); so does a client
    that takes nothing for `STALLED_SECONDS`.
    """
    response = web.StreamResponse(status=status, headers=headers)
    if request.method == "HEAD" or length == 0:
        await response.prepare(request)
        return response
    client, metrics = tree.folder.client, request.app[SERVICES].metrics
    whole = start == 0 and length == info.size
    stream = await client.get(
        tree.folder.ref.bucket,
        info.key,
        start=None if whole else start,
        end=None if whole else start + length - 1,
        if_match=info.etag,
    )
    async with stream:
        await response.prepare(request)
        if request.transport is not None:
            request.transport.set_write_buffer_limits(high=WRITE_BUFFER)
        async for chunk in stream.chunks(CHUNK):
            try:
                async with asyncio.timeout(STALLED_SECONDS):
                    await response.write(chunk)
            except TimeoutError:
                raise DeadlineExceeded(f"The client took nothing for {STALLED_SECONDS:g} s.") from None
            metrics.sent.inc(len(chunk))
    return response
