"""Serving applications on several listeners in one process, and stopping them in order."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from aiohttp import web

from ..core.errors import ConfigError, PortTaken
from ..core.logs import get_logger
from .auth import check_policies

log = get_logger(__name__)

SHUTDOWN_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Listener:
    """One application on one address: `host` and `port`, or `socket` (a unix socket of that `mode`)."""

    app: web.Application
    name: str
    host: str | None = None
    port: int | None = None
    socket: Path | None = None
    mode: int = 0o600
    tls: ssl.SSLContext | None = None


class Server:
    """Starts all listeners or none; `run_until_signal` serves until SIGTERM or SIGINT."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = listeners
        self._runners: list[web.AppRunner] = []

    async def __aenter__(self) -> Self:
        try:
            for listener in self._listeners:
                await self._start(listener)
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _start(self, listener: Listener) -> None:
        check_policies(listener.app)
        runner = web.AppRunner(
            listener.app,
            access_log=None,  # web.errors writes the access lines, without query strings
            handler_cancellation=True,  # a client that goes away cancels its upload, so its parts are settled at once
            shutdown_timeout=SHUTDOWN_SECONDS,
        )
        await runner.setup()
        self._runners.append(runner)
        site: web.BaseSite
        if listener.socket is not None:
            old_mask = os.umask(0o177)
            try:
                listener.socket.unlink(missing_ok=True)
                site = web.UnixSite(runner, str(listener.socket))
                await site.start()
            finally:
                os.umask(old_mask)
            listener.socket.chmod(listener.mode)
        else:
            site = web.TCPSite(runner, listener.host, listener.port, ssl_context=listener.tls)
            try:
                await site.start()
            except OSError as err:
                where = f"{listener.host}:{listener.port}"
                if err.errno == errno.EADDRINUSE:
                    raise PortTaken(
                        f"Port {where} for the {listener.name} is taken by another program.",
                        hint="Stop it, or choose another port.",
                    ) from None
                raise ConfigError(f"Cannot listen on {where} for the {listener.name}: {err.strerror}.") from None
        log.info("listening", listener=listener.name, address=site.name)

    async def stop(self) -> None:
        while self._runners:
            await self._runners.pop().cleanup()
        for listener in self._listeners:
            if listener.socket is not None:
                listener.socket.unlink(missing_ok=True)

    async def run_until_signal(self) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        async with self:
            await stop.wait()
            log.info("stopping")
