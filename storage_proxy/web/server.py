"""Serving applications on several listeners in one process, and stopping them in order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import ssl
import stat
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
        self._sockets: list[Path] = []

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
            site = web.SockSite(runner, _unix_socket(listener.socket, listener.mode, listener.name))
            self._sockets.append(listener.socket)
            await site.start()
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
        while self._sockets:
            self._sockets.pop().unlink(missing_ok=True)

    async def run_until_signal(self) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        async with self:
            await stop.wait()
            log.info("stopping")


def _unix_socket(path: Path, mode: int, name: str) -> socket.socket:
    """A bound socket that has its mode from its first moment, without touching the umask, which belongs to the whole
    process: on Linux the file gets the mode of the unbound socket. Only a socket at that place is replaced.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), mode)
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise ConfigError(f"{path} for the {name} is there and is no socket.", hint="Set another path.")
            path.unlink()
        listener.bind(str(path))
        path.chmod(mode)  # what the umask took away
    except OSError as err:
        listener.close()
        raise ConfigError(f"Cannot listen at {path} for the {name}: {err.strerror}.") from None
    except BaseException:
        listener.close()
        raise
    return listener
