"""Who has what mounted: attachments as a persisted set, one state machine and one lock per mount key.

    absent -> staging -> live -> draining -> absent         live, draining -> dead -> absent

The first attachment of a key starts a mount; those that come while it starts wait for the same start and share its
outcome. The last one to go starts the grace period; an attach during it revives the mount at once. Each transition is
in the journal before it is done. An attach runs to its end even if the caller goes away: the caller may ask again, or
end the session.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

from storage_proxy.core.errors import (
    AlreadyExists,
    LimitExceeded,
    MooringError,
    MountFailed,
    ServiceUnavailable,
    TokenInvalid,
)
from storage_proxy.core.ids import MountKey, SessionID, VFolderID
from storage_proxy.core.logs import get_logger
from storage_proxy.core.wire import BindSpec, MountState, S3Credential

from .containers import Binds
from .drivers import Drivers, MountPlan
from .grants import Grant, GrantVerifier
from .journal import AttachmentRecord, AttachmentState, Journal, MountRecord
from .kernel.abandon import off_loop
from .mounter import KERNEL_SECONDS, Mounter, new_token
from .supervisor import MountProcess

log = get_logger(__name__)

T = TypeVar("T")

Folder = tuple[SessionID, VFolderID]


@dataclass(frozen=True, slots=True)
class Transition:
    """One step of a key, for whoever listens."""

    at: float
    key: MountKey
    old: MountState
    new: MountState
    plan: MountPlan
    error: str | None = None


@dataclass(slots=True)
class _Key:
    """What is known of one mount key. `record` is None while it is absent."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    record: MountRecord | None = None
    process: MountProcess | None = None
    grace: asyncio.Task[None] | None = None
    attachments: dict[Folder, AttachmentRecord] = field(default_factory=dict)
    users: int = 0  # tasks that hold or wait for the lock
    attempts: int = 0  # starts that have ended, well or badly
    failure: MooringError | None = None  # how the last one ended

    @property
    def state(self) -> MountState:
        return MountState.ABSENT if self.record is None else self.record.state


class Attachments:
    """The manager. Use as an async context manager; `close` leaves mounts as they are, `stop_all` takes them down."""

    def __init__(
        self,
        *,
        verifier: GrantVerifier,
        journal: Journal,
        mounter: Mounter,
        binds: Binds,
        drivers: Drivers,
        grace: float,
        warn_mounts: int,
        max_mounts: int,
    ) -> None:
        self._verifier = verifier
        self._journal = journal
        self._mounter = mounter
        self._binds = binds
        self._driver = drivers.default
        self._grace = grace
        self._warn_mounts = warn_mounts
        self._max_mounts = max_mounts
        self._keys: dict[MountKey, _Key] = {}
        self._folders: dict[Folder, MountKey] = {}
        self._listeners: list[Callable[[Transition], None]] = []
        self._tasks = asyncio.TaskGroup()
        self._running: set[asyncio.Task[None]] = set()
        self._attaching: dict[SessionID, set[asyncio.Task[None]]] = {}
        self._stopping = False

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the background tasks. Mounts, binds and processes stay; the journal knows them."""
        self._stopping = True
        for entry in self._keys.values():
            if entry.grace is not None:
                entry.grace.cancel()
            if entry.process is not None:
                entry.process.let_go()
        for task in list(self._running):
            task.cancel()
        await self._tasks.__aexit__(None, None, None)

    def listen(self, listener: Callable[[Transition], None]) -> None:
        """`listener` is called at every transition, on the loop; it must not block."""
        self._listeners.append(listener)

    # --- what is there ------------------------------------------------------------------------------------------------

    def mounts(self) -> list[tuple[MountRecord, list[AttachmentRecord]]]:
        """Every key that is not absent, with its attachments."""
        return [
            (entry.record, list(entry.attachments.values()))
            for entry in self._keys.values()
            if entry.record is not None
        ]

    def attachments(self) -> list[tuple[AttachmentRecord, MountPlan]]:
        """Every attachment, with the plan of its mount."""
        return [(item, record.plan) for record, items in self.mounts() for item in items]

    def spec(self, item: AttachmentRecord, plan: MountPlan) -> BindSpec:
        return self._binds.spec(item.key, item.session, item.vfid, item.target, plan.mode)

    def warnings(self) -> list[str]:
        """What an operator should look at."""
        mounts = self.mounts()
        found = [
            f"The mount of {record.plan.place} is dead: {record.last_error or 'unknown cause'}"
            for record, _ in mounts
            if record.state is MountState.DEAD
        ]
        if len(mounts) >= self._warn_mounts:
            found.append(f"{len(mounts)} mounts; at {self._max_mounts} further ones are refused.")
        return found

    # --- attach -------------------------------------------------------------------------------------------------------

    async def attach(self, token: str) -> BindSpec:
        """Mounts, or shares, what a grant permits and binds it for its session.

        Idempotent for the same session, folder and mount key. Raises `TokenExpired`, `TokenInvalid` (also for a grant
        that was used and released), `AlreadyExists`, `LimitExceeded`, and everything that checking and mounting can
        raise.
        """
        if self._stopping:
            raise ServiceUnavailable("The agent is stopping.", hint="Attach when it runs again.")
        grant = self._verifier.verify(token)
        plan = MountPlan.of(grant.request, self._driver)
        return await self._apart(f"attach {grant.session}", self._attach(grant, plan), session=grant.session)

    async def _attach(self, grant: Grant, plan: MountPlan) -> BindSpec:
        folder: Folder = (grant.session, grant.vfid)
        async with self._key(plan.key, ticket := _Ticket()) as entry:
            item = await self._attached(entry, folder, grant, plan)
            if item is not None:
                return self.spec(item, plan)
            if entry.failure is not None and entry.attempts > ticket.attempts:
                raise entry.failure  # the start that this attach waited for
            credential = self._verifier.open(grant)
            record = await self._record_for(entry, plan, credential)
            item = AttachmentRecord(
                session=grant.session,
                vfid=grant.vfid,
                key=plan.key,
                target=grant.request.target,
                state=AttachmentState.BINDING,
                since=time.time(),
                grant_id=grant.token_id,
            )
            was = entry.state
            await self._journal.begin_attach(item, record, grant.expires_at.timestamp())
            if entry.grace is not None:
                entry.grace.cancel()
                entry.grace = None
            entry.record = record
            entry.attachments[folder] = item
            self._folders[folder] = plan.key
            if record.state is not was:
                self._tell(record, was)
            try:
                if record.state is MountState.STAGING:
                    await self._start(entry, record, credential)
                await off_loop(
                    "a session bind",
                    KERNEL_SECONDS,
                    lambda: self._binds.make(item.key, item.session, item.vfid, plan.mode),
                )
                await self._journal.set_attachment(item, AttachmentState.BOUND)
            except BaseException:
                try:
                    await self._release(entry, item, forget_grant=True)
                except MooringError as err:
                    log.error("a failed attach left something behind", key=item.key, error=str(err))
                raise
            log.info("attached", session=item.session, vfid=str(item.vfid), key=item.key, place=plan.place)
            return self.spec(item, plan)

    async def _attached(self, entry: _Key, folder: Folder, grant: Grant, plan: MountPlan) -> AttachmentRecord | None:
        """The attachment that this grant asks for, if it is there already."""
        item = entry.attachments.get(folder)
        if item is not None and item.target == grant.request.target:
            if entry.state is MountState.LIVE:
                return item
            raise self._dead(plan, entry)
        if folder in self._folders:
            raise AlreadyExists(
                f"Session {folder[0]} has folder {folder[1]} attached already, with other terms.",
                hint="Detach it first.",
            )
        if await self._journal.grant_used(grant.token_id):
            raise TokenInvalid("This grant was used already and its attachment has ended.", hint="Ask for a new one.")
        return None

    def _dead(self, plan: MountPlan, entry: _Key) -> MountFailed:
        cause = entry.record.last_error if entry.record else None
        return MountFailed(
            f"The mount of {plan.place} is dead and sessions still hold it ({cause or entry.state}).",
            hint="End the sessions that use it, then attach again.",
        )

    async def _record_for(self, entry: _Key, plan: MountPlan, credential: S3Credential) -> MountRecord:
        """The record that a new attachment goes with: the living one, or a new one in state staging (checked, not
        begun).
        """
        if entry.state in (MountState.DEAD, MountState.FAILED):
            if entry.attachments:
                raise self._dead(plan, entry)
            await self._take_down(entry)
        if entry.record is not None:
            return _in_state(entry.record, MountState.LIVE)
        count = sum(other.record is not None for other in self._keys.values())
        if count >= self._max_mounts:
            raise LimitExceeded(
                f"This node has {count} mounts, and {self._max_mounts} is its limit.",
                hint="End sessions, use another node, or raise max-mounts.",
            )
        try:
            await self._mounter.check(plan, credential)
        except MooringError as err:
            entry.attempts += 1
            entry.failure = err
            raise
        return MountRecord(plan=plan, state=MountState.STAGING, since=time.time(), token=new_token())

    async def _start(self, entry: _Key, record: MountRecord, credential: S3Credential) -> None:
        begun = time.monotonic()
        try:
            process = entry.process = await self._mounter.start(record, credential)
            record.process = process.identity
            await self._journal.save_mount(record)
            record.device = await self._mounter.ready(record, process, credential.secret_key)
            await self._mounter.place(record)
            await self._journal.save_mount(_in_state(record, MountState.LIVE))
        except MooringError as err:
            entry.failure = err
            raise
        else:
            entry.failure = None
        finally:
            entry.attempts += 1
        self._move(entry, MountState.LIVE)
        self._background_task(f"watch {record.key}", self._watch(record.key, process))
        log.info(
            "mounted",
            key=record.key,
            place=record.plan.place,
            mode=record.plan.mode,
            pid=process.pid,
            duration_ms=round((time.monotonic() - begun) * 1000, 1),
        )

    # --- detach -------------------------------------------------------------------------------------------------------

    async def detach_session(self, session: SessionID) -> int:
        """Ends every attachment of a session. Returns how many there were. Idempotent."""
        return await self._apart(f"detach {session}", self._detach_all(session))

    async def detach(self, session: SessionID, folder_hex: str) -> int:
        """Ends one attachment, named by the hex digits of its folder. Returns 1 or 0. Idempotent."""
        return await self._apart(f"detach {session}", self._detach_all(session, folder_hex))

    async def _detach_all(self, session: SessionID, folder_hex: str | None = None) -> int:
        """All of them, also if one fails; then the first error is raised.

        An attach of the session that is under way (its caller may have given up) is waited for, so that it is not left
        over.
        """
        if attaching := self._attaching.get(session):
            await asyncio.wait(list(attaching))
        folders = [f for f in self._folders if f[0] == session and folder_hex in (None, f[1].hex)]
        results = await asyncio.gather(*(self._detach(folder) for folder in folders), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return sum(result is True for result in results)

    async def _detach(self, folder: Folder) -> bool:
        key = self._folders.get(folder)
        if key is None:
            return False
        async with self._key(key) as entry:
            item = entry.attachments.get(folder)
            if item is None:
                return False
            await self._release(entry, item)
            log.info("detached", session=item.session, vfid=str(item.vfid), key=key)
            return True

    async def _release(self, entry: _Key, item: AttachmentRecord, *, forget_grant: bool = False) -> None:
        """Unbinds and forgets one attachment; the mount of the last one drains, or goes at once if it never lived."""
        await self._journal.set_attachment(item, AttachmentState.RELEASING)
        await off_loop("an unbind", KERNEL_SECONDS, lambda: self._binds.remove(item.session, item.vfid))
        await self._journal.drop_attachment(item, forget_grant=forget_grant)
        folder: Folder = (item.session, item.vfid)
        entry.attachments.pop(folder, None)
        self._folders.pop(folder, None)
        if entry.attachments or entry.record is None:
            return
        if entry.record.state is MountState.LIVE and self._grace > 0 and not self._stopping:
            await self._drain(entry)
        else:
            await self._take_down(entry)

    async def _drain(self, entry: _Key) -> None:
        record = entry.record
        if record is None:
            return
        await self._journal.save_mount(_in_state(record, MountState.DRAINING))
        self._move(entry, MountState.DRAINING)
        entry.grace = self._background_task(f"grace {record.key}", self._expire(record.key, self._grace))

    async def _expire(self, key: MountKey, seconds: float) -> None:
        await asyncio.sleep(seconds)
        async with self._key(key) as entry:
            if entry.state is MountState.DRAINING and entry.grace is asyncio.current_task():
                entry.grace = None
                await self._take_down(entry)

    async def _take_down(self, entry: _Key) -> None:
        """Removes the mount of a key without attachments. If something stays, the key stays with it and says why."""
        record = entry.record
        if record is None:
            return
        if entry.grace is not None and entry.grace is not asyncio.current_task():
            entry.grace.cancel()
        entry.grace = None
        process, entry.process = entry.process, None
        begun = time.monotonic()
        try:
            await self._mounter.remove(record, process)
        except MooringError as err:
            entry.process = process
            await self._journal.save_mount(_in_state(record, MountState.FAILED, str(err)))
            self._move(entry, MountState.FAILED, error=str(err))
            log.error("mount could not be removed", key=record.key, place=record.plan.place, error=str(err))
            raise
        await self._journal.drop_mount(record.key)
        self._move(entry, MountState.ABSENT)
        entry.record = None
        log.info(
            "unmounted",
            key=record.key,
            place=record.plan.place,
            duration_ms=round((time.monotonic() - begun) * 1000, 1),
        )

    async def collect(self, grace: float = 0.0) -> int:
        """Takes down mounts without sessions that have been so for at least `grace` seconds. Returns how many."""
        keys = [
            key
            for key, entry in self._keys.items()
            if entry.state in (MountState.DRAINING, MountState.FAILED)
            and entry.record is not None
            and time.time() - entry.record.since >= grace
        ]
        return await self._apart("collect", self._collect(keys))

    async def _collect(self, keys: list[MountKey]) -> int:
        async def one(key: MountKey) -> bool:
            async with self._key(key) as entry:
                if entry.state not in (MountState.DRAINING, MountState.FAILED) or entry.attachments:
                    return False
                await self._take_down(entry)
                return True

        return sum([result is True for result in await asyncio.gather(*map(one, keys))])

    async def stop_all(self) -> None:
        """Refuses new attachments, ends all there are and takes every mount down. Raises nothing: what stays is
        logged.
        """
        self._stopping = True
        if attaching := [task for tasks in self._attaching.values() for task in tasks]:
            for task in attaching:
                task.cancel()  # it cleans up after itself
            await asyncio.wait(attaching)
        folders = list(self._folders)
        keys = [key for key, entry in self._keys.items() if entry.record is not None]

        async def rest(key: MountKey) -> None:
            async with self._key(key) as entry:
                if entry.record is not None and not entry.attachments:
                    await self._take_down(entry)

        detached = await asyncio.gather(*map(self._detach, folders), return_exceptions=True)
        rested = await asyncio.gather(*map(rest, keys), return_exceptions=True)
        for result in (*detached, *rested):
            if isinstance(result, BaseException):
                log.error("not everything could be taken down", error=str(result))

    # --- deaths -------------------------------------------------------------------------------------------------------

    async def _watch(self, key: MountKey, process: MountProcess) -> None:
        await process.ended.wait()
        async with self._key(key) as entry:
            record = entry.record
            if entry.process is not process or record is None:
                return  # it was us
            said = process.last_words()
            error = f"The mount process ended (status {process.status})" + (f"; it said: {said}" if said else ".")
            log.warning("mount process ended", key=key, place=record.plan.place, pid=process.pid, status=process.status)
            await self._journal.save_mount(_in_state(record, MountState.DEAD, error))
            self._move(entry, MountState.DEAD, error=error)
            if not entry.attachments:
                await self._take_down(entry)

    # --- taking over --------------------------------------------------------------------------------------------------

    async def adopt(self, record: MountRecord, process: MountProcess, items: list[AttachmentRecord]) -> None:
        """Takes over a living mount of a former agent with its attachments; without any it starts to drain."""
        async with self._key(record.key) as entry:
            entry.record, entry.process = record, process
            for item in items:
                folder: Folder = (item.session, item.vfid)
                entry.attachments[folder] = item
                self._folders[folder] = record.key
            record.state = MountState.LIVE
            self._background_task(f"watch {record.key}", self._watch(record.key, process))
            if not items:
                await self._drain(entry)

    # --- plumbing -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _key(self, key: MountKey, ticket: _Ticket | None = None) -> AsyncIterator[_Key]:
        """The entry of a key under its lock; an absent one that nobody waits for is forgotten afterwards."""
        entry = self._keys.setdefault(key, _Key())
        entry.users += 1
        if ticket is not None:
            ticket.attempts = entry.attempts
        try:
            async with entry.lock:
                yield entry
        finally:
            entry.users -= 1
            if entry.users == 0 and entry.record is None:
                self._keys.pop(key, None)

    def _move(self, entry: _Key, new: MountState, *, error: str | None = None) -> None:
        """The transition itself, after the journal has it."""
        record = entry.record
        if record is None:
            return
        old = record.state
        record.state, record.since, record.last_error = new, time.time(), error
        self._tell(record, old, new)

    def _tell(self, record: MountRecord, old: MountState, new: MountState | None = None) -> None:
        step = Transition(time.time(), record.key, old, new or record.state, record.plan, record.last_error)
        for listener in self._listeners:
            listener(step)

    def _background_task(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs in the group; an error is logged and ends only this task."""

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

    async def _apart(self, name: str, work: Coroutine[Any, Any, T], *, session: SessionID | None = None) -> T:
        """The result of `work`, which goes on if this caller is cancelled. `session`: it is an attach of that
        session.
        """
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
        if session is not None:
            group = self._attaching.setdefault(session, set())
            group.add(task)

            def ended(done: asyncio.Task[None]) -> None:
                group.discard(done)
                if not group:
                    self._attaching.pop(session, None)

            task.add_done_callback(ended)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            # Nobody will look at the outcome any more; asyncio would complain about that.
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise


class _Ticket:
    """How many starts of a key had ended when somebody began to wait for it."""

    attempts = 0


def _in_state(record: MountRecord, state: MountState, error: str | None = None) -> MountRecord:
    """A copy in another state, for the journal: it is told first."""
    since = record.since if state is record.state else time.time()
    return replace(record, state=state, since=since, last_error=error)
