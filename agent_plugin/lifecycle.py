"""The life of a mount: started, watched, repaired, renewed, taken down.

    absent -> staging -> live -> draining -> absent
                 ^        |
                 |        v                              after too many attempts in a row: failed
                 +------ dead                            (the next attach, or an operator, tries once more)

A dead mount that sessions hold gets a new process: mounted on the private stage, checked, put into the pool, then
stacked on every session bind, from where it reaches running containers; what was opened before stays broken, what is
opened afterwards works. The dead layers below stay until the session ends: taking them away would end the propagation.
A renewed credential goes the same way, only that the old process lives on for the files that are open.

Everything here is done under the lock of the key (`keys.Keys.hold`), by the caller or by the method itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from pathlib import Path

from storage_proxy.core.errors import MooringError, MountFailed, NotFound
from storage_proxy.core.ids import MountKey
from storage_proxy.core.logs import get_logger
from storage_proxy.core.wire import MountState, S3Credential

from .containers import Binds
from .events import EventKind
from .journal import AttachmentRecord, AttachmentState, Journal, MountRecord, RetiredRecord, Step
from .kernel.abandon import off_loop
from .keys import Entry, Keys, in_state
from .mounter import KERNEL_SECONDS, Mounter, new_token
from .supervisor import MountProcess

log = get_logger(__name__)

# A repaired mount that lived for less than the first counts as a failed attempt; after the second all is forgiven.
_SHORT_LIFE_SECONDS = 2.0
_LONG_LIFE_SECONDS = 60.0
_FIRST_PAUSE_SECONDS = 0.5

Mend = Callable[[Collection[str], Path], Awaitable[int]]


class Lifecycle:
    """`mend` repairs binds in containers that mounts do not propagate to: old devices, new mount -> how many."""

    def __init__(
        self,
        *,
        keys: Keys,
        journal: Journal,
        mounter: Mounter,
        binds: Binds,
        mend: Mend | None,
        grace: float,
        attempts: int,
        longest_pause: float,
    ) -> None:
        self._keys = keys
        self._journal = journal
        self._mounter = mounter
        self._binds = binds
        self._mend = mend
        self._grace = grace
        self._attempts = attempts
        self._longest_pause = longest_pause

    # --- start --------------------------------------------------------------------------------------------------------

    async def start(self, entry: Entry, record: MountRecord, credential: S3Credential) -> None:
        """Makes the first mount of a key, which the journal has as staging. On failure the caller takes it down."""
        begun = time.monotonic()
        try:
            async with self._mounter.starting(record):
                process = entry.process = await self._mounter.start(record, credential)
                record.process = process.identity
                await self._journal.save_mount(Step.MOUNT_STARTED, record)
                record.device = await self._mounter.ready(record, process)
            await self._mounter.place(record)
            await self._journal.save_mount(Step.MOUNT_LIVE, in_state(record, MountState.LIVE))
        except MooringError as err:
            entry.failure = err
            raise
        else:
            entry.failure = None
        finally:
            entry.attempts += 1
        self._live(entry, record, process)
        log.info(
            "mounted",
            key=record.key,
            place=record.plan.place,
            mode=record.plan.mode,
            pid=process.pid,
            duration_ms=round((time.monotonic() - begun) * 1000, 1),
        )

    def _live(self, entry: Entry, record: MountRecord, process: MountProcess) -> None:
        entry.trouble = entry.unresponsive = None
        self._keys.move(entry, MountState.LIVE)
        self._keys.background(f"watch {record.key}", self._watch(record.key, process))

    # --- end ----------------------------------------------------------------------------------------------------------

    async def rest(self, entry: Entry) -> None:
        """What becomes of a mount whose last attachment is gone: grace if it lives, else it is taken down."""
        if entry.attachments or entry.record is None:
            return
        if entry.record.state is MountState.LIVE and self._grace > 0 and not self._keys.stopping:
            await self._drain(entry)
        else:
            await self.take_down(entry)

    async def _drain(self, entry: Entry) -> None:
        record = entry.record
        if record is None:
            return
        await self._journal.save_mount(Step.MOUNT_DRAINING, in_state(record, MountState.DRAINING))
        self._keys.move(entry, MountState.DRAINING)
        entry.grace = self._keys.background(f"grace {record.key}", self._expire(record.key, self._grace))

    async def _expire(self, key: MountKey, seconds: float) -> None:
        await asyncio.sleep(seconds)
        async with self._keys.hold(key) as entry:
            if entry.state is MountState.DRAINING and entry.grace is asyncio.current_task():
                entry.grace = None
                await self.take_down(entry)

    def revive(self, entry: Entry) -> None:
        """Ends the grace period: somebody attaches."""
        if entry.grace is not None:
            entry.grace.cancel()
            entry.grace = None

    async def take_down(self, entry: Entry) -> None:
        """Removes the mount of a key without attachments. If something stays, the key stays with it and says why."""
        record = entry.record
        if record is None:
            return
        for task in (entry.grace, entry.repair):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        entry.grace = entry.repair = None
        process, entry.process = entry.process, None
        begun = time.monotonic()
        try:
            await self._mounter.remove(record, process, dict(entry.retired))
        except MooringError as err:
            entry.process = process
            await self._journal.save_mount(Step.MOUNT_FAILED, in_state(record, MountState.FAILED, str(err)))
            self._keys.move(entry, MountState.FAILED, error=str(err))
            log.error("mount could not be removed", key=record.key, place=record.plan.place, error=str(err))
            raise
        await self._journal.drop_mount(record.key)
        self._keys.move(entry, MountState.ABSENT)
        entry.record = None
        entry.retired.clear()
        log.info(
            "unmounted",
            key=record.key,
            place=record.plan.place,
            duration_ms=round((time.monotonic() - begun) * 1000, 1),
        )

    # --- death --------------------------------------------------------------------------------------------------------

    async def _watch(self, key: MountKey, process: MountProcess) -> None:
        await process.ended.wait()
        async with self._keys.hold(key) as entry:
            if entry.process is not process or entry.record is None:
                return  # it was us
            entry.process = None
            said = self._mounter.last_words(entry.record, process)
            error = f"The mount process ended (status {process.status})" + (f"; it said: {said}" if said else ".")
            log.warning(
                "mount process ended",
                key=key,
                place=entry.record.plan.place,
                pid=process.pid,
                status=process.status,
                said=said,
            )
            await self._died(entry, entry.record, error)

    async def lost(self, key: MountKey, reason: str) -> bool:
        """Gives up a mount whose process runs but does not serve: frees its callers, kills it, begins the repair.

        Returns False if the key does not live any more. What was opened on it before fails from now on.
        """
        async with self._keys.hold(key) as entry:
            record, process = entry.record, entry.process
            if record is None or record.state not in (MountState.LIVE, MountState.DRAINING):
                return False
            log.warning("giving up a mount", key=key, place=record.plan.place, reason=reason)
            entry.process = None
            await self._mounter.cut(record, process)
            await self._died(entry, record, reason, retire=process)
            return True

    async def _died(self, entry: Entry, record: MountRecord, error: str, *, retire: MountProcess | None = None) -> None:
        lived = time.time() - record.since if record.state is MountState.LIVE else 0.0
        if lived < _SHORT_LIFE_SECONDS and record.repairs:
            entry.failures += 1
        elif lived > _LONG_LIFE_SECONDS:
            entry.failures = 0
        await self._journal.save_mount(Step.MOUNT_DEAD, in_state(record, MountState.DEAD, error))
        self._keys.move(entry, MountState.DEAD, error=error)
        if retire is not None:
            entry.retired[record.token] = retire
        if not entry.attachments:
            await self.take_down(entry)
        elif not self._keys.stopping:
            self._begin_repair(entry, record.key)

    # --- repair -------------------------------------------------------------------------------------------------------

    def _begin_repair(self, entry: Entry, key: MountKey) -> None:
        if entry.repair is None or entry.repair.done():
            entry.repair = self._keys.background(f"repair {key}", self._keep_repairing(key))

    async def _keep_repairing(self, key: MountKey) -> None:
        """Tries until it works, nobody needs it any more, or the limit is reached."""
        pauses = 0
        while True:
            async with self._keys.hold(key) as entry:
                if entry.state is not MountState.DEAD:
                    return  # somebody else repaired it
                if not entry.attachments:
                    await self.take_down(entry)
                    return
                failures = max(entry.failures, pauses)
                if failures == 0 or pauses > 0:
                    if await self._attempt(entry, look_first=pauses > 0):
                        return
                    failures = max(entry.failures, pauses)
                if entry.failures >= self._attempts:
                    await self._fail(entry)
                    return
            pauses += 1
            await asyncio.sleep(min(_FIRST_PAUSE_SECONDS * 2 ** min(failures, 10), self._longest_pause))

    async def _attempt(self, entry: Entry, *, look_first: bool) -> bool:
        """One attempt. False if it failed; the cause is in the record.

        `look_first`: asks S3 before a process is started, which would only wait for a server that is away.
        """
        cause: MooringError | None = None
        if look_first and entry.record is not None:
            found = await self._mounter.examine(entry.record)
            cause = found if found is not None and found.temporary else None
        if cause is None:
            try:
                await self.restart(entry)
            except MooringError as err:
                cause = await self._cause(entry, err)
            else:
                return True
        if not cause.temporary:
            entry.failures += 1
        if entry.record is not None:
            entry.record.last_error = str(cause)
            log.warning(
                "a mount could not be repaired yet",
                key=entry.record.key,
                place=entry.record.plan.place,
                attempt=entry.failures,
                error=str(cause),
            )
        return False

    async def _cause(self, entry: Entry, err: MooringError) -> MooringError:
        """What S3 says about the place, if that explains the failure; else the failure itself."""
        if entry.record is None:
            return err
        found = await self._mounter.examine(entry.record)
        if found is None:
            return MountFailed(err.message, hint=err.hint)  # S3 is fine, so it is not temporary
        return found

    async def _fail(self, entry: Entry) -> None:
        record = entry.record
        if record is None:
            return
        error = f"Given up after {entry.failures} attempts: {record.last_error or 'unknown cause'}"
        await self._journal.save_mount(Step.MOUNT_FAILED, in_state(record, MountState.FAILED, error))
        self._keys.move(entry, MountState.FAILED, error=error)
        log.error("a mount is not repaired any more", key=record.key, place=record.plan.place, error=error)

    async def repair(self, key: MountKey) -> bool:
        """Repairs a dead or failed mount now. False if there was nothing to repair; raises what stopped it."""
        async with self._keys.hold(key) as entry:
            if entry.record is None:
                raise NotFound(f"This node has no mount {key}.", hint="See `mooring mounts ls`.")
            if entry.state not in (MountState.DEAD, MountState.FAILED):
                return False
            if not entry.attachments:
                await self.take_down(entry)
                return True
            await self.revive_dead(entry, None)
            return True

    async def revive_dead(self, entry: Entry, credential: S3Credential | None) -> None:
        """Repairs a dead or failed mount at once, with a fresh credential if there is one. Raises what stopped it."""
        entry.failures = 0
        try:
            await self.restart(entry, credential)
        except MooringError as err:
            cause = await self._cause(entry, err)
            record = entry.record
            if record is not None:
                record.last_error = str(cause)
                self._begin_repair(entry, record.key)
            raise cause from None

    async def restart(self, entry: Entry, credential: S3Credential | None = None) -> None:
        """Puts a new process in the place of a dead one, everywhere. On failure the mount is dead as before."""
        old = entry.record
        if old is None:
            return
        begun, died = time.monotonic(), old.since
        retired = RetiredRecord(old.token, old.key, old.process)
        expires = old.credential_expires
        if credential is not None:
            expires = credential.expires_at.timestamp() if credential.expires_at else None
        new = replace(
            old,
            state=MountState.STAGING,
            since=time.time(),
            token=new_token(),
            process=None,
            credential_expires=expires,
        )
        await self._journal.retire(Step.REPAIR_BEGIN, retired, new)
        entry.retired.setdefault(old.token, None)
        entry.record = new
        self._keys.tell_state(new, old.state)
        process: MountProcess | None = None
        try:
            async with self._mounter.starting(new):
                process = await self._mounter.start(new, credential)
                new.process = process.identity
                await self._journal.save_mount(Step.MOUNT_STARTED, new)
                new.device = await self._mounter.ready(new, process)
            await self._journal.save_mount(Step.REPAIR_PLACE, new)
            staged_ms = round((time.monotonic() - begun) * 1000, 1)
            count = await self._put_in_place(entry, new)
            new.repairs += 1
            await self._journal.save_mount(Step.REPAIR_LIVE, in_state(new, MountState.LIVE))
        except BaseException as err:
            new.device = old.device
            entry.retired[new.token] = process
            if isinstance(err, MooringError):
                await self._give_up_start(entry, new, old, process, err)
            raise
        entry.process = process
        entry.failure = None
        self._live(entry, new, process)
        seconds = round(time.time() - died, 3)
        mended = await self._mend_containers(entry, new)
        detail = {
            "seconds": seconds,
            "staged_ms": staged_ms,
            "binds": count,
            "containers": mended,
            "repairs": new.repairs,
        }
        self._keys.tell(EventKind.REPAIRED, new, detail=detail)
        log.info("mount repaired", key=new.key, place=new.plan.place, pid=process.pid, **detail)
        await self._forget_retired(entry)

    async def _give_up_start(
        self, entry: Entry, new: MountRecord, old: MountRecord, process: MountProcess | None, err: MooringError
    ) -> None:
        """After a failed attempt: nothing of it stays but the record, dead, with the cause."""
        dead = in_state(new, MountState.DEAD, str(err))
        try:
            await self._mounter.undo(new, process)
        except MooringError as stays:
            log.warning("a failed start left something behind", key=new.key, error=str(stays))
        else:
            entry.retired.pop(new.token, None)
        dead.process = None
        entry.record = replace(new, process=None)
        await self._journal.save_mount(Step.MOUNT_DEAD, dead)
        self._keys.move(entry, MountState.DEAD, error=str(err))
        entry.record.since = old.since  # dead since then; a failed attempt does not make it younger

    async def _put_in_place(self, entry: Entry, record: MountRecord) -> int:
        """The staged mount into the pool, then onto every session bind. Returns the number of binds."""
        await self._mounter.place(record)
        items = [item for item in entry.attachments.values() if item.state is AttachmentState.BOUND]
        await off_loop("the session binds", KERNEL_SECONDS, lambda: self._binds.restack(record, items))
        return len(items)

    async def _mend_containers(self, entry: Entry, record: MountRecord) -> int:
        """Repairs the binds that propagation did not reach. Returns how many.

        Only devices that a session bind still has below its top are looked for: the kernel gives the number of one that
        nobody holds to the next mount, whoever makes it.
        """
        if self._mend is None:
            return 0
        former = self._binds.devices(entry.attachments.values()) - {record.device}
        try:
            return await self._mend(former, self._mounter.pooled(record)) if former else 0
        except MooringError as err:
            log.warning("containers without propagation were not repaired", key=record.key, error=str(err))
            return 0

    async def _forget_retired(self, entry: Entry) -> None:
        """Removes the traces of former starts that have ended; the others are watched."""
        record = entry.record
        if record is None:
            return
        for token, process in list(entry.retired.items()):
            if process is not None and not process.ended.is_set():
                self._keys.background(f"watch retired {token}", self._watch_retired(record.key, token, process))
                continue
            await self._forget(entry, token)

    async def _forget(self, entry: Entry, token: str) -> None:
        await self._mounter.sweep(token)
        await self._journal.drop_retired(token)
        entry.retired.pop(token, None)

    async def _watch_retired(self, key: MountKey, token: str, process: MountProcess) -> None:
        await process.ended.wait()
        async with self._keys.hold(key) as entry:
            if entry.retired.get(token) is process:
                await self._forget(entry, token)

    # --- renewal ------------------------------------------------------------------------------------------------------

    async def renew(self, entry: Entry, credential: S3Credential) -> None:
        """Gives a living mount a fresh credential by a second process in front of the first, which is retired.

        Files that are open stay with the old process, until they are closed or the last session of the key ends.
        """
        old, former = entry.record, entry.process
        if old is None or former is None or old.state is not MountState.LIVE:
            raise MountFailed("The mount does not live, so its credential cannot be renewed.", hint="Attach again.")
        begun = time.monotonic()
        await self._mounter.check(old.plan, credential)
        expires = credential.expires_at.timestamp() if credential.expires_at else None
        new = replace(old, token=new_token(), process=None, device=None, credential_expires=expires)
        await self._journal.retire(Step.RENEW_BEGIN, RetiredRecord(new.token, new.key))
        entry.retired[new.token] = None
        process: MountProcess | None = None
        try:
            async with self._mounter.starting(new):
                process = entry.retired[new.token] = await self._mounter.start(new, credential)
                new.process = process.identity
                await self._journal.retire(Step.RENEW_STARTED, RetiredRecord(new.token, new.key, new.process))
                new.device = await self._mounter.ready(new, process)
        except MooringError:
            await self._mounter.undo(new, process)
            await self._journal.drop_retired(new.token)
            entry.retired.pop(new.token, None)
            raise
        await self._journal.retire(Step.RENEW_PLACE, RetiredRecord(old.token, old.key, old.process), new)
        entry.retired.pop(new.token, None)
        entry.retired[old.token] = former
        entry.record, entry.process = new, process
        self._keys.background(f"watch {new.key}", self._watch(new.key, process))
        try:
            count = await self._put_in_place(entry, new)
        except MooringError as err:
            await self._died(entry, new, f"The renewed mount could not be put in place: {err}")
            raise
        await self._journal.save_mount(Step.RENEW_LIVE, new)
        mended = await self._mend_containers(entry, new)
        entry.trouble = None
        detail = {
            "seconds": round(time.monotonic() - begun, 3),
            "binds": count,
            "containers": mended,
            "expires": expires,
        }
        self._keys.tell(EventKind.RENEWED, new, detail=detail)
        log.info("credential renewed", key=new.key, place=new.plan.place, pid=process.pid, **detail)
        await self._forget_retired(entry)

    # --- what others did ----------------------------------------------------------------------------------------------

    async def misplaced(self, key: MountKey, reason: str) -> bool:
        """Puts the mount of a key back into the pool, from where somebody took it or where somebody mounted over it.

        Its process and what is open on it are not touched, if a session bind still shows it; else it is `lost`.
        """
        async with self._keys.hold(key) as entry:
            record = entry.record
            if record is None or record.state not in (MountState.LIVE, MountState.DRAINING):
                return False
            binds = list(entry.attachments.values())
            if await off_loop("the repair of the pool", KERNEL_SECONDS, lambda: self._binds.put_back(record, binds)):
                log.warning("put a mount back into the pool", key=key, place=record.plan.place, reason=reason)
                return True
        return await self.lost(key, reason)

    async def rebind(self, item: AttachmentRecord) -> None:
        """Makes a session bind again that somebody took away or mounted over."""
        async with self._keys.hold(item.key) as entry:
            record = entry.record
            if record is None or record.state is not MountState.LIVE or item.state is not AttachmentState.BOUND:
                return
            if entry.attachments.get((item.session, item.vfid)) is item:
                await off_loop("a session bind", KERNEL_SECONDS, lambda: self._binds.restack(record, [item]))

    # --- taking over --------------------------------------------------------------------------------------------------

    async def adopt(
        self,
        entry: Entry,
        record: MountRecord,
        process: MountProcess | None,
        items: Collection[AttachmentRecord],
        retired: dict[str, MountProcess | None],
    ) -> None:
        """Takes over what a former agent left of a key. Without a process it is dead, and repaired if sessions hold it.

        A living one whose process is staged but not in place (its agent died in between) is put in place.
        """
        entry.record, entry.process, entry.retired = record, process, dict(retired)
        entry.attachments = {(item.session, item.vfid): item for item in items}
        if process is None:
            error = record.last_error or "The mount was not alive when the agent started."
            entry.record = replace(record, state=MountState.DEAD, process=None)
            await self._journal.save_mount(Step.ADOPT, in_state(record, MountState.DEAD, error))
            self._keys.move(entry, MountState.DEAD, error=error)
            entry.retired.setdefault(record.token, None)
            if items:
                self._begin_repair(entry, record.key)
            else:
                await self.take_down(entry)
            return
        if not await self._mounter.placed(record):
            await self._put_in_place(entry, record)
        if record.state is not MountState.LIVE:
            await self._journal.save_mount(Step.ADOPT, in_state(record, MountState.LIVE))
            record.state = MountState.LIVE
        self._keys.background(f"watch {record.key}", self._watch(record.key, process))
        if not items:
            await self._drain(entry)
        await self._forget_retired(entry)
