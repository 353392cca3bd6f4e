"""Asking a mount whether it answers, without ever waiting for it longer than a deadline.

A `stat` on a frozen FUSE mount sleeps uninterruptibly: not even SIGKILL ends it, and a thread of ours that did it would
be lost with everything it holds. So a helper program (`_prober.py`) forks one child per question; the agent reads
answers from a pipe and forgets questions whose time is over. Children on a frozen mount end when its connection is
aborted or its process dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from storage_proxy.core.errors import ServiceUnavailable
from storage_proxy.core.logs import get_logger

log = get_logger(__name__)

_PROGRAM = Path(__file__).with_name("_prober.py")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. `number` is an errno, 0 for success, None if nothing came before the deadline."""

    number: int | None

    @property
    def healthy(self) -> bool:
        """The file system answered: it has the name, or it knows that it has not."""
        return self.number in (0, errno.ENOENT, errno.EACCES)

    def __str__(self) -> str:
        if self.number is None:
            return "no answer"
        return "ok" if self.number == 0 else os.strerror(self.number)


class Prober:
    """Use as an async context manager. The helper starts with the first question and again if it was killed."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[int]] = {}
        self._next = 0
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> Prober:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the helper. Children of it that hang are left to the kernel."""
        process, self._process = self._process, None
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
        if process is not None:
            if process.stdin is not None:
                process.stdin.close()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            # The write end of the pipe may live on in a child that hangs; our end closes here.
            _let_go(process)

    async def stat(self, path: Path, deadline: float) -> Answer:
        """Stats `path` itself: the root of a mount."""
        try:
            async with asyncio.timeout(deadline):
                (future,) = await self._ask("s", [path])
                return Answer(await future)
        except (TimeoutError, ConnectionError):
            return Answer(None)

    async def fresh_name(self, path: Path, deadline: float) -> Answer:
        """Stats a name below `path` that nobody asked for before, so that no cache of the kernel can answer."""
        return await self.stat(path / f".mooring-probe-{secrets.token_hex(8)}", deadline)

    async def filesystems(self, paths: Sequence[Path]) -> list[asyncio.Future[int]]:
        """Asks for the size of the file systems at `paths` (statvfs), one after the other in one child.

        The kernel answers this from no cache, so each mount process is really asked; s3fs answers without a request to
        S3, so a slow server does not matter. Returns a future per path with an errno, 0 for success; behind one that
        does not answer, none does. Cancel those that are not wanted any more. A future raises `ConnectionError` when
        the helper ended before the answer came, which says nothing about the mount. Raises `ServiceUnavailable` or
        `ConnectionError` if it cannot be asked.
        """
        return await self._ask("v", paths)

    async def _ask(self, kind: str, paths: Sequence[Path]) -> list[asyncio.Future[int]]:
        questions = await self._questions()
        futures: list[asyncio.Future[int]] = []
        words = [kind]
        for path in paths:
            number = self._next = self._next + 1
            future = self._waiting[number] = asyncio.get_running_loop().create_future()
            future.add_done_callback(partial(self._settled, number))
            futures.append(future)
            words += [str(number), os.fsencode(path).hex()]
        try:
            questions.write(" ".join(words).encode() + b"\n")
            await questions.drain()
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return futures

    def _settled(self, number: int, future: asyncio.Future[int]) -> None:
        self._waiting.pop(number, None)
        if not future.cancelled():
            future.exception()  # looked at, so that asyncio does not complain where nobody waits any more

    async def _questions(self) -> asyncio.StreamWriter:
        """The helper's standard input; starts it if it does not run."""
        async with self._lock:
            process = self._process
            if process is None or process.returncode is not None:
                try:
                    process = await asyncio.create_subprocess_exec(
                        *(sys.executable, "-I", "-S", str(_PROGRAM)),
                        stdin=asyncio.subprocess.PIPE,
                        stdout=asyncio.subprocess.PIPE,
                        env={"PATH": os.defpath},
                        start_new_session=True,
                    )
                except OSError as err:
                    raise ServiceUnavailable(
                        f"The mount prober cannot be started: {err.strerror}.", hint="Check memory and process limits."
                    ) from None
                self._process = process
                self._reader = asyncio.create_task(self._read(process), name="mount prober")
            if process.stdin is None:
                raise ServiceUnavailable("The mount prober has no input.")
            return process.stdin

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        while process.stdout is not None and (line := await process.stdout.readline()):
            number, _, code = line.decode().strip().partition(" ")
            future = self._waiting.get(int(number))
            if future is not None and not future.done():
                future.set_result(int(code))
        log.debug("the mount prober ended")
        if process is not self._process:
            return
        # At once, not when its exit is known: a question in between would wait for ever.
        self._process = None
        for future in list(self._waiting.values()):
            if not future.done():
                future.set_exception(ConnectionError("the mount prober ended"))
        try:
            await process.wait()  # before its pipes are closed: asyncio would ask for its exit a second time then
        finally:
            _let_go(process)


def _let_go(process: asyncio.subprocess.Process) -> None:
    """Closes our ends of its pipes, and kills it if it still runs."""
    process._transport.close()  # type: ignore[attr-defined]  # asyncio offers no public way to let go of it
