"""Bulk bytes over HTTP/1.1, in worker threads: files go out by sendfile and come in by `recv_into`.

The event loop's own client copies every chunk several times under the interpreter lock; with a proxy and an object
store on the same machine that CPU is missing there. Measured here (1 GiB, loopback, two cores): 0.05-0.1 s of user CPU
for threads and sendfile against 0.5-1.2 s for aiohttp and 2.0 s for boto3. Small requests stay with aiohttp
(`HttpService`).
"""

from __future__ import annotations

import asyncio
import http.client
import os
import select
import socket
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from ..core.errors import ConfigError, IntegrityError

CONNECT_SECONDS = 5.0
IDLE_SECONDS = 60.0  # no byte moved in either direction
ANSWER_SECONDS = 300.0  # the other side publishes the file before it answers
ABORT_SECONDS = 5.0
CHUNK_BYTES = 1024 * 1024
MAX_ERROR_BYTES = 1024 * 1024

Writer = Callable[[memoryview], None]
Moved = Callable[[int], None]


class Broken(Exception):
    """The connection failed: nothing is known about the request. `reason` is for a person. Never leaves this room."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Body:
    """`length` bytes of an open file from `offset`, or of `data`."""

    length: int
    fd: int = -1
    offset: int = 0
    data: bytes = b""
    name: str = "the file"


@dataclass(frozen=True, slots=True)
class Answer:
    """`headers` in lower case. `content` is empty when a writer took the body; then `received` counts its bytes."""

    status: int
    headers: Mapping[str, str]
    content: bytes
    received: int


# Gets the head of the answer; returns where its body goes, or None to have it in `Answer.content`.
Sink = Callable[[int, Mapping[str, str]], Writer | None]


class Channel:
    """One connection. Its methods block and are called from one thread at a time; `abort` from any."""

    def __init__(self, scheme: str, host: str, port: int | None, context: ssl.SSLContext | None) -> None:
        self._http: http.client.HTTPConnection = (
            http.client.HTTPSConnection(host, port, timeout=CONNECT_SECONDS, context=context)
            if scheme == "https"
            else http.client.HTTPConnection(host, port, timeout=CONNECT_SECONDS)
        )
        self._aborted = False
        self.reusable = False

    def close(self) -> None:
        self._http.close()

    def abort(self) -> None:
        """Wakes a thread that waits in here; its call ends with `Broken`."""
        self._aborted = True
        sock = self._http.sock
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def exchange(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: Body | None = None,
        sink: Sink | None = None,
        moved: Moved | None = None,
    ) -> Answer:
        """One request and its answer. Raises `Broken`; `IntegrityError` when the file has fewer bytes than `body`."""
        self.reusable = False
        try:
            if self._http.sock is None:
                self._http.connect()  # sets TCP_NODELAY as well
            if self._aborted:
                raise Broken("cancelled")
            self._http.sock.settimeout(IDLE_SECONDS)
            self._http.putrequest(method, target, skip_accept_encoding=True)
            for name, value in headers.items():
                self._http.putheader(name, value)
            if body is not None:
                self._http.putheader("Content-Length", str(body.length))
            self._http.endheaders()
            complete = True
            if body is not None:
                complete = self._send(body, moved)
            return self._receive(method, sink, moved if body is None else None, complete)
        except TimeoutError:
            raise Broken(f"nothing moved for {IDLE_SECONDS:g} s") from None
        except http.client.HTTPException as err:
            raise Broken(f"no valid answer ({type(err).__name__})") from None
        except ssl.SSLCertVerificationError as err:
            raise ConfigError(
                f"The certificate of {self._http.host} is not trusted: {err.verify_message}.",
                hint="Give the file of its certificate authority.",
            ) from None
        except OSError as err:
            raise Broken(err.strerror or type(err).__name__) from None

    def _send(self, body: Body, moved: Moved | None) -> bool:
        """False if the other side answered before it had everything."""
        sock = self._http.sock
        try:
            if body.fd < 0:
                sock.sendall(body.data)
                return True
            if isinstance(sock, ssl.SSLSocket):
                self._copy_file(sock, body, moved)
                return True
            return self._send_file(sock, body, moved)
        except (BrokenPipeError, ConnectionResetError):
            # It may have said why before it closed; without an answer this is raised again as a broken connection.
            if self._aborted or not select.select([sock], [], [], 0.2)[0]:
                raise
            return False

    @staticmethod
    def _send_file(sock: socket.socket, body: Body, moved: Moved | None) -> bool:
        poller = select.poll()
        poller.register(sock, select.POLLOUT | select.POLLIN)
        offset, end, unsaid = body.offset, body.offset + body.length, 0
        while offset < end:
            events = poller.poll(IDLE_SECONDS * 1000)
            if not events:
                raise TimeoutError
            if events[0][1] & select.POLLIN:
                return False
            try:
                sent = os.sendfile(sock.fileno(), body.fd, offset, min(end - offset, 4 * CHUNK_BYTES))
            except BlockingIOError:
                continue
            if sent == 0:
                raise _shrank(body)
            offset += sent
            unsaid += sent
            if moved is not None and (unsaid >= CHUNK_BYTES or offset == end):
                moved(unsaid)
                unsaid = 0
        return True

    @staticmethod
    def _copy_file(sock: socket.socket, body: Body, moved: Moved | None) -> None:
        offset, end = body.offset, body.offset + body.length
        while offset < end:
            chunk = os.pread(body.fd, min(CHUNK_BYTES, end - offset), offset)
            if not chunk:
                raise _shrank(body)
            sock.sendall(chunk)
            offset += len(chunk)
            if moved is not None:
                moved(len(chunk))

    def _receive(self, method: str, sink: Sink | None, moved: Moved | None, complete: bool) -> Answer:
        self._http.sock.settimeout(ANSWER_SECONDS)
        sock = self._http.sock
        with self._http.getresponse() as response:
            headers = {name.lower(): value for name, value in response.getheaders()}
            sock.settimeout(IDLE_SECONDS)
            writer = sink(response.status, headers) if sink is not None else None
            received, content = 0, b""
            if writer is None:
                content = b"" if method == "HEAD" else response.read(MAX_ERROR_BYTES)
            else:
                buffer = memoryview(bytearray(CHUNK_BYTES))
                while count := response.readinto(buffer):
                    writer(buffer[:count])
                    received += count
                    if moved is not None:
                        moved(count)
            self.reusable = complete and response.isclosed() and not response.will_close and not self._aborted
            return Answer(response.status, headers, content, received)


def _shrank(body: Body) -> IntegrityError:
    return IntegrityError(
        f"{body.name} became shorter while it was read.", hint="Wait until nothing writes to it, then try again."
    )


@asynccontextmanager
async def together() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose first error arrives as itself, not in an exception group."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as err:
        first: BaseException = err
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


class Channels:
    """Connections to any number of servers, each reused by the next request; asyncio's face of `Channel`."""

    def __init__(self, *, workers: int = 64, ca_file: Path | None = None) -> None:
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="transfer")
        self._ca_file = ca_file
        self._context: ssl.SSLContext | None = None
        self._idle: dict[tuple[str, str, int | None], list[Channel]] = defaultdict(list)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes idle connections; call it when nothing is under way."""
        for channels in self._idle.values():
            for channel in channels:
                channel.close()
        self._idle.clear()
        self._threads.shutdown(wait=False)

    async def in_thread(self, function: Callable[[], object]) -> None:
        """Runs something that only computes or uses the local disk."""
        await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def exchange(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
        sink: Sink | None = None,
        moved: Moved | None = None,
    ) -> Answer:
        """One request. `moved` is called on the event loop with counts of body bytes, `sink` and its writer in a
        thread.

        Raises `Broken`. Cancellation cuts the connection, so no thread goes on with it.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("The URL for a transfer is not valid.", hint="Check `public-url` of the storage proxy.")
        origin = (parts.scheme, parts.hostname, parts.port)
        idle = self._idle[origin]
        channel = idle.pop() if idle else Channel(*origin, self._tls() if parts.scheme == "https" else None)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        loop = asyncio.get_running_loop()

        def report(count: int) -> None:
            if moved is not None:
                loop.call_soon_threadsafe(moved, count)

        work = loop.run_in_executor(
            self._threads, channel.exchange, method, target, headers or {}, body, sink, report if moved else None
        )
        try:
            answer = await asyncio.shield(work)
        except asyncio.CancelledError:
            channel.abort()
            await asyncio.wait([work], timeout=ABORT_SECONDS)
            if work.done() and not work.cancelled():
                work.exception()  # seen, so that asyncio does not complain about it
            channel.close()
            raise
        except BaseException:
            channel.close()
            raise
        if channel.reusable:
            idle.append(channel)
        else:
            channel.close()
        return answer

    def _tls(self) -> ssl.SSLContext:
        if self._context is None:
            self._context = ssl.create_default_context(cafile=str(self._ca_file) if self._ca_file else None)
        return self._context
