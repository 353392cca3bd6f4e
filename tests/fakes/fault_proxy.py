"""A relay in front of a real S3 server that misbehaves on command.

Everything it is not told to spoil goes through untouched, with the Host header that the client signed. Faults are used
up in the order they were added: each matching request takes the first one that fits.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp import web
from yarl import URL

_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-authorization"}

ALWAYS = 1_000_000


@dataclass
class Fault:
    """What to do to matching requests; the first set one of these wins.

    `status` (with the S3 error `code` in an XML body) answers without asking the server. `hang` never answers. `reset`
    closes with RST: before the server is asked, or with `after_server` when it has done the work already, so that only
    the answer is lost. `cut` sends that many bytes of the body and then RST. `shrink` drops that many bytes and says so
    in Content-Length, as a broken cache would. `delay` (seconds) and `rate` (bytes per second) slow the answer down.
    """

    method: str = ""
    contains: str = ""
    times: int = 1
    status: int = 0
    code: str = ""
    hang: bool = False
    reset: bool = False
    after_server: bool = False
    cut: int | None = None
    shrink: int = 0
    delay: float = 0.0
    rate: float = 0.0
    body: bytes | None = None
    hits: int = field(default=0, init=False)

    def fits(self, request: web.Request) -> bool:
        return (
            self.hits < self.times
            and self.method in ("", request.method)
            and (not self.contains or self.contains in request.raw_path)
        )


class FaultProxy:
    """Use as an async context manager; `url` is its endpoint. `requests` lists (method, raw path) of all it has
    seen.
    """

    def __init__(self, target: str, *, tls: ssl.SSLContext | None = None) -> None:
        self._target = target
        self._tls = tls
        self._faults: list[Fault] = []
        self._session: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None
        self.url = ""
        self.requests: list[tuple[str, str]] = []
        self.on_request: Callable[[web.Request], None] = lambda _: None

    def add(self, fault: Fault) -> Fault:
        self._faults.append(fault)
        return fault

    def clear(self) -> None:
        self._faults.clear()

    def count(self, method: str, contains: str = "") -> int:
        return sum(1 for seen, path in self.requests if seen == method and contains in path)

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=60),
            skip_auto_headers=("User-Agent", "Content-Type", "Accept", "Accept-Encoding"),
        )
        app = web.Application(client_max_size=2**31)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        listener = socket.create_server(("127.0.0.1", 0))
        await web.SockSite(self._runner, listener, ssl_context=self._tls).start()
        self.url = f"http{'s' if self._tls else ''}://127.0.0.1:{listener.getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._runner is not None
        assert self._session is not None
        await self._runner.cleanup()
        await self._session.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.raw_path))
        self.on_request(request)
        fault = next((fault for fault in self._faults if fault.fits(request)), Fault())
        fault.hits += 1
        if fault.hang:
            await asyncio.sleep(3600)
        if fault.status:
            await request.read()
            text = (
                f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{fault.code}</Code><Message>by order</Message>'
                "<RequestId>FAULT1</RequestId></Error>"
            )
            body = b"" if request.method == "HEAD" else text.encode() if fault.body is None else fault.body
            return web.Response(status=fault.status, body=body, content_type="application/xml")
        if fault.reset and not fault.after_server:
            return self._reset(request)
        return await self._relay(request, fault)

    async def _relay(self, request: web.Request, fault: Fault) -> web.StreamResponse:
        assert self._session is not None
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
        async with self._session.request(
            request.method,
            URL(self._target + request.raw_path, encoded=True),
            headers=headers,
            data=request.content if request.can_read_body else None,
            allow_redirects=False,
        ) as answer:
            if fault.reset:
                await answer.read()
                return self._reset(request)
            if fault.delay:
                await asyncio.sleep(fault.delay)
            response = web.StreamResponse(status=answer.status, reason=answer.reason)
            for name, value in answer.headers.items():
                if name.lower() not in _HOP:
                    response.headers.add(name, value)
            length = int(answer.headers.get("Content-Length", 0))
            limit = length if fault.cut is None else min(fault.cut, length)
            if fault.shrink:
                limit = length - fault.shrink
                response.headers["Content-Length"] = str(limit)
            await response.prepare(request)
            sent = 0
            if request.method != "HEAD":
                async for chunk in answer.content.iter_chunked(8192 if fault.rate else 65536):
                    piece = chunk[: limit - sent] if length else chunk
                    await response.write(piece)
                    sent += len(piece)
                    if fault.rate:
                        await asyncio.sleep(len(piece) / fault.rate)
                    if length and sent >= limit:
                        break
            if fault.cut is not None and sent < length:
                return self._reset(request)
            await response.write_eof()
            return response

    def _reset(self, request: web.Request) -> web.StreamResponse:
        """Closes with RST instead of FIN."""
        transport = request.transport
        assert transport is not None
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
        raise asyncio.CancelledError
