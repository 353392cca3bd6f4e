"""Calls into the kernel that may never return: run in a thread of their own, given up at a deadline."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from storage_proxy.core.errors import DeadlineExceeded

T = TypeVar("T")


async def off_loop(what: str, deadline: float, call: Callable[[], T]) -> T:
    """The result of `call()`, run in a daemon thread. Raises what it raises; `DeadlineExceeded` after `deadline`
    seconds.

    A pool would do for calls that end; here one thread that hangs must not take a place in it, nor hold up the exit of
    the process. Cancelling the caller, like the deadline, abandons the thread: the call may still take effect.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # None is a T where `call` returns None

    def work() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = call()
        except BaseException as err:  # handed over to the waiting task
            error = err
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return

    threading.Thread(target=work, name=f"kernel: {what}", daemon=True).start()
    try:
        async with asyncio.timeout(deadline):
            return await future
    except TimeoutError:
        raise DeadlineExceeded(
            f"The kernel did not finish {what} within {deadline:g} s.",
            hint="A mount below it hangs; see `mooring mounts ls` and the log of the agent.",
        ) from None
