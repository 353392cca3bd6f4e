"""Answering the kernel: one reader of the pipe, one task per question, a deadline for each.

Somebody looks up a name that is not there; the kernel lets them wait and asks here. Inner directories are made at once;
for a folder `serve` is asked, which mounts it or raises, and then the look-up ends with that error's errno. Whatever
happens here, a look-up ends within the deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from storage_proxy.core.errors import MooringError
from storage_proxy.core.logs import get_logger

from ...kernel.abandon import off_loop
from ...kernel.autofs import PACKET_BYTES, Autofs, Packet, PacketType
from .places import LEAF_LEVEL, FolderPlace, valid_name
from .tree import Point, Tree

log = get_logger(__name__)

_KERNEL_SECONDS = 5.0
_SENTINEL = Path(__file__).with_name("_sentinel.py")
# The kernel asks twice for one failed `ls`, and runtimes try again at once: for so long the answer is the same.
_REFUSAL_SECONDS = 2.0
_MAX_REFUSALS = 1000


class Automounter:
    """`serve(place)` mounts a folder at its place; `expired(place)` is asked whether a folder that the kernel
    found unused may go, and unmounts it if so. Use as an async context manager inside that of the trees.
    """

    def __init__(
        self,
        autofs: Autofs,
        trees: Sequence[Tree],
        *,
        serve: Callable[[FolderPlace], Awaitable[None]],
        expired: Callable[[FolderPlace], Awaitable[bool]],
        deadline: float,
        uids: frozenset[int],
    ) -> None:
        self._autofs = autofs
        self._trees = list(trees)
        self._serve = serve
        self._expired = expired
        self._deadline = deadline
        self._uids = uids
        self._tasks: set[asyncio.Task[None]] = set()
        self._refused: dict[FolderPlace, tuple[float, int]] = {}
        self._sentinel: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Automounter:
        self._sentinel = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(_SENTINEL), *(str(tree.path) for tree in self._trees)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            env={"PATH": os.defpath},
            start_new_session=True,  # also: not in our process group, whose look-ups the kernel does not ask about
        )
        asyncio.get_running_loop().add_reader(self._autofs.questions, self._read)
        return self

    async def __aexit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._autofs.questions)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._sentinel is not None:
            with contextlib.suppress(ProcessLookupError):
                self._sentinel.kill()
            await self._sentinel.wait()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._autofs.questions, PACKET_BYTES)
            except BlockingIOError:
                return
            try:
                packet = Packet.parse(data)
            except ValueError as err:
                log.error("the automounter sent what this agent does not understand", error=str(err))
                return
            point = next((tree.points[packet.device] for tree in self._trees if packet.device in tree.points), None)
            if point is None:  # taken down between its question and now; nobody waits there, or it would be busy
                log.info("a question about a directory that went", name=packet.name.decode(errors="replace"))
                continue
            task = asyncio.get_running_loop().create_task(self._answer(packet, point), name=f"look-up in {point.path}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, packet: Packet, point: Point) -> None:
        number = errno.EIO
        try:
            async with asyncio.timeout(self._deadline):
                if packet.type == PacketType.MISSING:
                    number = await self._missing(packet, point)
                elif packet.type == PacketType.EXPIRE:
                    number = await self._expire(packet, point)
        except TimeoutError:
            log.warning("a look-up took too long", path=str(point.path), name=packet.name.decode(errors="replace"))
            number = errno.ETIMEDOUT
        except MooringError as err:
            number = err.errno
            log.log(err.log_level, "a look-up failed", path=str(point.path), error=str(err))
        except Exception:  # a bug here must not leave a process waiting
            log.exception("a look-up failed", path=str(point.path))
        finally:
            self._say(packet, point, number)

    def _say(self, packet: Packet, point: Point, number: int) -> None:
        """Answers the kernel. Neither call waits for anything."""
        try:
            fd = self._autofs.open(point.path, point.device)
            try:
                if number == 0:
                    self._autofs.ready(fd, packet.token)
                else:
                    self._autofs.fail(fd, packet.token, number)
            finally:
                os.close(fd)
        except OSError as err:
            log.info("nobody waits for this look-up any more", path=str(point.path), error=err.strerror)

    async def _missing(self, packet: Packet, point: Point) -> int:
        """0 when the name is there, or the errno that the look-up ends with."""
        name = valid_name(point.level, packet.name)
        if name is None:
            return errno.ENOENT
        if packet.uid not in self._uids:
            return errno.EACCES
        if point.level < LEAF_LEVEL:
            await off_loop("an automount point", _KERNEL_SECONDS, lambda: point.tree.add_point(point, name))
            return 0
        place = FolderPlace.of(point.tree.name, (*point.names, name))
        if (known := self._refusal(place)) is not None:
            return known
        begun = time.monotonic()
        try:
            await self._serve(place)
        except MooringError as err:
            if err.errno in (errno.ENOENT, errno.EACCES):
                self._refuse(place, err.errno)
            raise
        log.info("folder mounted", place=str(place), duration_ms=round((time.monotonic() - begun) * 1000, 1))
        return 0

    async def _expire(self, packet: Packet, point: Point) -> int:
        name = valid_name(point.level, packet.name)
        if name is None or point.level != LEAF_LEVEL:
            return errno.EBUSY
        return 0 if await self._expired(FolderPlace.of(point.tree.name, (*point.names, name))) else errno.EBUSY

    # --- refusals -----------------------------------------------------------------------------------------------------

    def _refusal(self, place: FolderPlace) -> int | None:
        until, number = self._refused.get(place, (0.0, 0))
        return number if time.monotonic() < until else None

    def _refuse(self, place: FolderPlace, number: int) -> None:
        now = time.monotonic()
        if len(self._refused) >= _MAX_REFUSALS:
            self._refused = {key: value for key, value in self._refused.items() if value[0] > now}
        if len(self._refused) < _MAX_REFUSALS:
            self._refused[place] = (now + _REFUSAL_SECONDS, number)
