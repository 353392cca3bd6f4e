"""`PartWriter`: a stream of bytes becomes parts of equal size, sent to S3 in parallel while the next one fills.

Part `n` always holds the bytes from `(n - 1) * part_size`, so where an upload stands can be read from S3 alone and a
part that is sent twice replaces itself. What does not fill a part when the stream ends is the tail; its fate is the
caller's.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from ..core.errors import DeadlineExceeded, IntegrityError, LimitExceeded, MooringError
from .memory import MemoryBudget

PARALLEL_PARTS = 4
IDLE_SECONDS = 60.0
# A stream that needs longer than this for one part has to stop when others wait for its memory.
PATIENCE_SECONDS = 30.0
SETTLE_SECONDS = 60.0


class RunningHash:
    """SHA-256 of the first `position` bytes of a file."""

    def __init__(self) -> None:
        self.position = 0
        self._hash = hashlib.sha256()

    async def update(self, data: memoryview) -> None:
        # hashlib lets go of the GIL for large buffers; a thread is not worth it for small ones.
        if len(data) > 256 * 1024:
            await asyncio.to_thread(self._hash.update, data)
        else:
            self._hash.update(data)
        self.position += len(data)

    def digest(self) -> bytes:
        return self._hash.digest()


class PartWriter:
    """Takes the bytes of one request. `send(number, data)` stores one part.

    `start` is the offset of the first byte, `size` that of the whole file; `tail` are the bytes between the last whole
    part and `start`, which an earlier request left. Use: `receive` once, then `settle`, always `close`.
    """

    def __init__(
        self,
        *,
        start: int,
        size: int,
        part_size: int,
        tail: bytes,
        budget: MemoryBudget,
        send: Callable[[int, memoryview], Coroutine[Any, Any, None]],
        running_hash: RunningHash | None,
    ) -> None:
        self._size = size
        self._part_size = part_size
        self._budget = budget
        self._send = send
        self.hash = running_hash
        self._hash_order = asyncio.Lock()
        self._first_part = start // part_size + 1
        self._number = self._first_part
        self._sent: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(PARALLEL_PARTS)
        self._initial_tail = tail
        self._buffer: bytearray | None = None
        self._filled = 0
        self._since = 0.0
        self.error: MooringError | None = None

    @property
    def _is_last(self) -> bool:
        return self._number * self._part_size >= self._size

    @property
    def position(self) -> int:
        """Offset behind the last byte taken."""
        return (self._number - 1) * self._part_size + self._filled

    @property
    def stored(self) -> int:
        """Offset behind the last byte of an unbroken row of whole parts in S3."""
        number = self._first_part
        while number in self._sent:
            number += 1
        return (number - 1) * self._part_size

    @property
    def tail(self) -> memoryview:
        """The bytes behind the last whole part; not yet in S3."""
        return memoryview(self._buffer or b"")[: self._filled]

    async def receive(self, source: AsyncIterator[bytes]) -> None:
        """Takes everything that `source` gives. Raises what it raises, `LimitExceeded` for a byte too many,
        `DeadlineExceeded` when it falls silent, or the first error of a part. Whatever it raises, `settle` follows."""
        if self._initial_tail:
            await self._take(memoryview(self._initial_tail))
            self._initial_tail = b""
        iterator = aiter(source)
        while self.error is None:
            try:
                async with asyncio.timeout(IDLE_SECONDS):
                    chunk = await anext(iterator)
            except StopAsyncIteration:
                break
            except TimeoutError:
                raise DeadlineExceeded(
                    f"No byte of the upload came for {IDLE_SECONDS:.0f} s.", hint="Ask for the offset and go on there."
                ) from None
            view = memoryview(chunk)
            if self.position + len(view) > self._size:
                raise LimitExceeded(
                    f"The upload is longer than the {self._size} bytes that were declared.",
                    hint="Ask for a new upload with the right size.",
                    detail={"declared": self._size},
                )
            await self._take(view)
            self._check_pace()
        if self.error is not None:
            raise self.error

    async def _take(self, view: memoryview) -> None:
        while view:
            if self._buffer is None:
                room = min(self._part_size, self._size - (self._number - 1) * self._part_size)
                self._buffer = await self._budget.take(room)
                self._since = asyncio.get_running_loop().time()
            count = min(len(self._buffer) - self._filled, len(view))
            self._buffer[self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]
            # The last part is the caller's to send: it may have to be checked first.
            if self._filled == len(self._buffer) and not self._is_last:
                await self._slots.acquire()
                buffer, self._buffer, self._filled = self._buffer, None, 0
                task = asyncio.create_task(self._store(self._number, buffer), name=f"upload part {self._number}")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                self._number += 1

    def _check_pace(self) -> None:
        age = asyncio.get_running_loop().time() - self._since
        if self._budget.waiting and self._buffer is not None and age > PATIENCE_SECONDS:
            raise DeadlineExceeded(
                "The upload is slow and others wait for its memory.", hint="Ask for the offset and go on there."
            )

    async def _store(self, number: int, buffer: bytearray) -> None:
        """Never raises a known error: it ends in `error`, and the other parts go on."""
        try:
            view = memoryview(buffer)
            if self.hash is None:
                await self._send(number, view)
            else:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._hash_in_order(view))
                    group.create_task(self._send(number, view))
            self._sent.add(number)
        except MooringError as err:
            self.error = self.error or err
        except ExceptionGroup as errors:
            found = errors.exceptions[0]
            self.error = self.error or (
                found if isinstance(found, MooringError) else IntegrityError(f"A part failed: {type(found).__name__}.")
            )
        finally:
            self._slots.release()
            self._budget.release(buffer)

    async def _hash_in_order(self, view: memoryview) -> None:
        assert self.hash is not None  # noqa: S101  # the caller looked
        async with self._hash_order:  # waiters are served in the order in which they came: that of the parts
            await self.hash.update(view)

    async def hash_tail(self) -> None:
        """Adds the tail to the running hash: before the last part is sent."""
        if self.hash is not None:
            await self._hash_in_order(self.tail)

    async def settle(self) -> None:
        """Waits until every part on its way is stored or has failed, at most `SETTLE_SECONDS`."""
        if self._tasks:
            _done, late = await asyncio.wait(self._tasks, timeout=SETTLE_SECONDS)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    async def close(self) -> None:
        """Gives all memory back. Idempotent; parts on their way are cancelled."""
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))
        if self._buffer is not None:
            self._budget.release(self._buffer)
            self._buffer, self._filled = None, 0
