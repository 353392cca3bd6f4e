"""Being told that the mount table of this namespace changed, whoever changed it, at no cost while it does not."""

from __future__ import annotations

import asyncio
import os
import select
from typing import Self

from .mountinfo import MOUNTINFO


class TableWatch:
    """Use as a context manager on a running loop; `changed` waits for the next change.

    proc(5): after a change, poll(2) on mountinfo answers POLLPRI and POLLERR, once. But it always answers POLLIN too,
    and that is all that an event loop asks for, so the file is in an epoll of its own that asks for the former only,
    and the loop watches that epoll.
    """

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self._file = -1
        self._epoll: select.epoll | None = None

    def __enter__(self) -> Self:
        self._file = os.open(MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._file, select.EPOLLPRI | select.EPOLLERR)
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._epoll is not None:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()
            os.close(self._file)
            self._epoll = None

    def _note(self) -> None:
        if self._epoll is not None:
            self._epoll.poll(0)
        self._changed.set()

    async def changed(self) -> None:
        """Returns when the table has changed since the last call (or since the start)."""
        await self._changed.wait()
        self._changed.clear()
