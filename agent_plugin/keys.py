"""The mount keys this agent knows: one entry and one lock each, who listens, and the tasks that work on them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

from storage_proxy.core.errors import MooringError
from storage_proxy.core.ids import MountKey, SessionID, VFolderID
from storage_proxy.core.logs import get_logger
from storage_proxy.core.wire import MountState

from .events import Event, EventKind
from .journal import AttachmentRecord, MountRecord
from .supervisor import MountProcess

log = get_logger(__name__)

T = TypeVar("T")

Folder = tuple[SessionID, VFolderID]


@dataclass(slots=True)
class Entry:
    """What is known of one mount key. `record` is None while it is absent. Change it under its lock only."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    record: MountRecord | None = None
    process: MountProcess | None = None
    retired: dict[str, MountProcess | None] = field(default_factory=dict)  # former starts by token
    grace: asyncio.Task[None] | None = None
    repair: asyncio.Task[None] | None = None
    attachments: dict[Folder, AttachmentRecord] = field(default_factory=dict)
    users: int = 0  # tasks that hold or wait for the lock
    attempts: int = 0  # starts that have ended, well or badly
    failure: MooringError | None = None  # how the last one ended
    failures: int = 0  # starts in a row that failed or did not live
    trouble: str | None = None  # it lives, but S3 refuses it or is away
    unresponsive: str | None = None  # its process does not answer
    holders: int = 0  # mount namespaces that hold a bind, at the last look

    @property
    def state(self) -> MountState:
        return MountState.ABSENT if self.record is None else self.record.state


class Ticket:
    """How many starts of a key had ended when somebody began to wait for it."""

    attempts = 0


class Keys:
    """Use as an async context manager: its background tasks end with it, mounts and processes stay."""

    def __init__(self) -> None:
        self.entries: dict[MountKey, Entry] = {}
        self.stopping = False
        self._listeners: list[Callable[[Event], None]] = []
        self._tasks = asyncio.TaskGroup()
        self._running: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        self.stopping = True
        for entry in self.entries.values():
            for process in (entry.process, *entry.retired.values()):
                if process is not None:
                    process.let_go()
        for task in list(self._running):
            task.cancel()
        await self._tasks.__aexit__(None, None, None)

    @asynccontextmanager
    async def hold(self, key: MountKey, ticket: Ticket | None = None) -> AsyncIterator[Entry]:
        """The entry of a key under its lock; an absent one that nobody waits for is forgotten afterwards."""
        entry = self.entries.setdefault(key, Entry())
        entry.users += 1
        if ticket is not None:
            ticket.attempts = entry.attempts
        try:
            async with entry.lock:
                yield entry
        finally:
            entry.users -= 1
            if entry.users == 0 and entry.record is None:
                self.entries.pop(key, None)

    # --- telling ------------------------------------------------------------------------------------------------------

    def listen(self, listener: Callable[[Event], None]) -> None:
        """`listener` is called at every event, on the loop; it must not block."""
        self._listeners.append(listener)

    def move(self, entry: Entry, new: MountState, *, error: str | None = None) -> None:
        """The transition itself, after the journal has it."""
        record = entry.record
        if record is None:
            return
        old = record.state
        record.state, record.since, record.last_error = new, time.time(), error
        self.tell_state(record, old, new)

    def tell_state(self, record: MountRecord, old: MountState, new: MountState | None = None) -> None:
        self.tell(EventKind.STATE, record, old=old, new=new or record.state, error=record.last_error)

    def tell(
        self,
        kind: EventKind,
        record: MountRecord | None = None,
        *,
        old: MountState | None = None,
        new: MountState | None = None,
        error: str | None = None,
        detail: Mapping[str, object] | None = None,
    ) -> None:
        event = Event(
            at=time.time(),
            kind=kind,
            key=record.key if record else None,
            plan=record.plan if record else None,
            old=old,
            new=new,
            error=error,
            detail=detail or {},
        )
        for listener in self._listeners:
            listener(event)

    # --- tasks --------------------------------------------------------------------------------------------------------

    def background(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs until it ends or the manager is closed; an error is logged and ends only this task."""

        async def run() -> None:
            try:
                await work
            except MooringError as err:
                log.error("background task failed", task=name, error=str(err))
            except Exception:
                log.exception("background task failed", task=name)

        return self._keep(run(), name)

    def _keep(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = self._tasks.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def apart(self, name: str, work: Coroutine[Any, Any, T], group: set[asyncio.Task[None]] | None = None) -> T:
        """The result of `work`, which goes on if this caller is cancelled. Its task is in `group` while it runs."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        async def run() -> None:
            try:
                result = await work
            except asyncio.CancelledError:
                future.cancel()
                raise
            except Exception as err:
                future.set_exception(err)
            else:
                future.set_result(result)

        task = self._keep(run(), name)
        task.add_done_callback(lambda _: future.done() or future.cancel())  # cancelled before its first step
        if group is not None:
            group.add(task)
            task.add_done_callback(group.discard)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            # Nobody will look at the outcome any more; asyncio would complain about that.
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise


def in_state(record: MountRecord, state: MountState, error: str | None = None) -> MountRecord:
    """A copy in another state, for the journal: it is told first."""
    since = record.since if state is record.state else time.time()
    return replace(record, state=state, since=since, last_error=error)
