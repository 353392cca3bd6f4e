"""`MemoryBudget`: the buffers of all uploads of this process, bounded together."""

from __future__ import annotations

import asyncio
from collections import deque

from ..core.errors import ServiceUnavailable

WAIT_SECONDS = 60.0


class MemoryBudget:
    """Hands out buffers, first come first served, never more than `total` bytes at once.

    Returned buffers of the usual size are used again: fresh memory costs a page fault per 4 KiB, and gaps in the heap.
    """

    def __init__(self, total: int, usual_size: int) -> None:
        self.total = total
        self.used = 0
        self._usual = usual_size
        self._free: list[bytearray] = []
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def waiting(self) -> int:
        """How many uploads wait for memory."""
        return len(self._queue)

    async def take(self, size: int) -> bytearray:
        """A buffer of exactly `size` bytes with unspecified content.

        Raises `ServiceUnavailable` after `WAIT_SECONDS`. The holder of a buffer must get rid of it without taking
        another.
        """
        if size > self.total:
            raise ServiceUnavailable(
                f"One part of this upload needs {size} bytes, more than uploads may hold.",
                hint="Raise upload-memory in the proxy's configuration.",
            )
        if self._queue or self.used + size > self.total:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._queue.append((size, turn))
            try:
                async with asyncio.timeout(WAIT_SECONDS):
                    await turn
            except BaseException as err:
                if turn.done() and not turn.cancelled():
                    self._give_back(size)  # our turn came, but too late
                else:
                    self._queue.remove((size, turn))
                    self._next()
                if isinstance(err, TimeoutError):
                    raise ServiceUnavailable(
                        f"Uploads hold all of their {self.total} bytes of memory for {WAIT_SECONDS:.0f} s now.",
                        hint="Try again, or raise upload-memory in the proxy's configuration.",
                    ) from None
                raise
        else:
            self.used += size
        if size == self._usual and self._free:
            return self._free.pop()
        while self._free and self.used + len(self._free) * self._usual > self.total:
            self._free.pop()
        return bytearray(size)

    def release(self, buffer: bytearray) -> None:
        if len(buffer) == self._usual:
            self._free.append(buffer)
        self._give_back(len(buffer))

    def _give_back(self, size: int) -> None:
        self.used -= size
        if not self.used and not self._queue:
            self._free.clear()  # nobody uploads: the memory goes back to the system
        self._next()

    def _next(self) -> None:
        while self._queue and self.used + self._queue[0][0] <= self.total:
            size, turn = self._queue.popleft()
            self.used += size
            turn.set_result(None)
