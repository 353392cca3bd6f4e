"""Who has what mounted: attachments of sessions as a persisted set, and everything that can be asked of the agent.

The first attachment of a key starts a mount; those that come while it starts wait for the same start and share its
outcome. The last one to go starts the grace period; an attach during it revives the mount at once. An attach runs to
its end even if the caller goes away: the caller may ask again, or end the session. What becomes of a mount in between
is the business of `lifecycle`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Self

from storage_proxy.core.errors import (
    AlreadyExists,
    Conflict,
    LimitExceeded,
    MooringError,
    NotFound,
    ServiceUnavailable,
    TokenInvalid,
)
from storage_proxy.core.ids import MountKey, SessionID
from storage_proxy.core.logs import get_logger
from storage_proxy.core.wire import BindSpec, MountState, S3Credential

from .containers import Binds
from .drivers import Drivers, MountPlan
from .events import Event, EventKind
from .grants import GrantVerifier
from .journal import AttachmentRecord, AttachmentState, Journal, MountRecord
from .kernel.abandon import off_loop
from .keys import Entry, Folder, Keys, Ticket, in_state
from .lifecycle import Lifecycle, Mend
from .mounter import KERNEL_SECONDS, Mounter, new_token
from .orders import Order
from .supervisor import MountProcess

log = get_logger(__name__)

NODE = MountKey("")  # in drains: all keys of this node


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
        repair_attempts: int = 8,
        repair_pause: float = 15.0,
        mend: Mend | None = None,
    ) -> None:
        self._verifier = verifier
        self._journal = journal
        self._mounter = mounter
        self._binds = binds
        self._driver = drivers.default
        self._warn_mounts = warn_mounts
        self._max_mounts = max_mounts
        self._keys = Keys()
        self._lifecycle = Lifecycle(
            keys=self._keys,
            journal=journal,
            mounter=mounter,
            binds=binds,
            mend=mend,
            grace=grace,
            attempts=repair_attempts,
            longest_pause=repair_pause,
        )
        self._folders: dict[Folder, MountKey] = {}
        self._attaching: dict[SessionID, set[asyncio.Task[None]]] = {}
        self._drains: set[MountKey] = set()

    async def __aenter__(self) -> Self:
        self._drains = {MountKey(key) for key in await self._journal.drains()}
        await self._keys.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the background tasks. Mounts, binds and processes stay; the journal knows them."""
        await self._keys.close()

    def listen(self, listener: Callable[[Event], None]) -> None:
        """`listener` is called at every event, on the loop; it must not block."""
        self._keys.listen(listener)

    def tell(self, kind: EventKind, **detail: object) -> None:
        """An event that concerns the whole node, told by another part of the agent."""
        self._keys.tell(kind, detail=detail)

    # --- what is there ------------------------------------------------------------------------------------------------

    def mounts(self) -> list[tuple[MountRecord, list[AttachmentRecord]]]:
        """Every key that is not absent, with its attachments."""
        return [
            (entry.record, list(entry.attachments.values()))
            for entry in self._keys.entries.values()
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
            f"The mount of {record.plan.place} is {record.state}: {record.last_error or 'unknown cause'}"
            for record, _ in mounts
            if record.state in (MountState.DEAD, MountState.FAILED)
        ]
        for entry in self._keys.entries.values():
            if entry.record is not None:
                found += [text for text in (entry.unresponsive, entry.trouble) if text is not None]
        if self._drains:
            found.append("This node refuses new attachments (draining)." if self.draining else "Some mounts drain.")
        if len(mounts) >= self._warn_mounts:
            found.append(f"{len(mounts)} mounts; at {self._max_mounts} further ones are refused.")
        return found

    def entry(self, key: MountKey) -> Entry | None:
        """What is known of a key, to look at."""
        entry = self._keys.entries.get(key)
        return entry if entry is not None and entry.record is not None else None

    def process(self, key: MountKey) -> MountProcess | None:
        """The mount process of a key, while it lives."""
        entry = self.entry(key)
        return entry.process if entry is not None else None

    def tokens(self) -> set[str]:
        """Every start of a mount process that is known here, those under way and former ones included."""
        found: set[str] = set()
        for entry in self._keys.entries.values():
            found.update(entry.retired)
            if entry.record is not None:
                found.add(entry.record.token)
        return found

    # --- attach -------------------------------------------------------------------------------------------------------

    async def attach(self, token: str) -> BindSpec:
        """Mounts, or shares, what a grant permits and binds it for its session.

        Idempotent for the same session, folder and mount key. Raises `TokenExpired`, `TokenInvalid` (also for a grant
        that was used and released), `AlreadyExists`, `LimitExceeded`, `ServiceUnavailable` (draining, stopping), and
        everything that checking and mounting can raise.
        """
        return await self.attach_order(Order.of(self._verifier.verify(token), self._verifier, self._driver))

    async def attach_order(self, order: Order) -> BindSpec:
        """As `attach`, for what was allowed in another way."""
        if self._keys.stopping:
            raise ServiceUnavailable("The agent is stopping.", hint="Attach when it runs again.")
        group = self._attaching.setdefault(order.session, set())

        async def attach() -> BindSpec:
            try:
                return await self._attach(order)
            finally:
                if group <= {asyncio.current_task()}:
                    self._attaching.pop(order.session, None)

        return await self._keys.apart(f"attach {order.session}", attach(), group)

    async def _attach(self, order: Order) -> BindSpec:
        plan = order.plan
        folder: Folder = (order.session, order.vfid)
        async with self._keys.hold(plan.key, ticket := Ticket()) as entry:
            item = await self._attached(entry, folder, order)
            if item is not None:
                return self.spec(item, plan)
            self._refuse_draining(plan.key)
            if entry.failure is not None and entry.attempts > ticket.attempts:
                raise entry.failure  # the start that this attach waited for
            credential = order.credential()
            record = await self._record_for(entry, plan, credential)
            item = AttachmentRecord(
                session=order.session,
                vfid=order.vfid,
                key=plan.key,
                target=order.target,
                state=AttachmentState.BINDING,
                since=time.time(),
                grant_id=order.order_id,
            )
            was = entry.state
            await self._journal.begin_attach(item, record, order.expires)
            self._lifecycle.revive(entry)
            entry.record = record
            entry.attachments[folder] = item
            self._folders[folder] = plan.key
            if record.state is not was:
                self._keys.tell_state(record, was)
            try:
                if record.state is MountState.STAGING:
                    await self._lifecycle.start(entry, record, credential)
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

    async def _attached(self, entry: Entry, folder: Folder, order: Order) -> AttachmentRecord | None:
        """The attachment that this order asks for, if it is there already; a dead mount is repaired for it first."""
        item = entry.attachments.get(folder)
        if item is not None and item.target == order.target:
            if entry.state in (MountState.DEAD, MountState.FAILED):
                await self._lifecycle.revive_dead(entry, order.credential())
            return item
        if folder in self._folders:
            raise AlreadyExists(
                f"Session {folder[0]} has folder {folder[1]} attached already, with other terms.",
                hint="Detach it first.",
            )
        if await self._journal.grant_used(order.order_id):
            raise TokenInvalid("This grant was used already and its attachment has ended.", hint="Ask for a new one.")
        return None

    async def _record_for(self, entry: Entry, plan: MountPlan, credential: S3Credential) -> MountRecord:
        """The record that a new attachment goes with: the living one, or a new one in state staging (checked, not
        begun).
        """
        if entry.state in (MountState.DEAD, MountState.FAILED):
            if entry.attachments:
                await self._lifecycle.revive_dead(entry, credential)
            else:
                await self._lifecycle.take_down(entry)
        if entry.record is not None:
            return in_state(entry.record, MountState.LIVE)
        count = sum(other.record is not None for other in self._keys.entries.values())
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
        return MountRecord(
            plan=plan,
            state=MountState.STAGING,
            since=time.time(),
            token=new_token(),
            credential_expires=credential.expires_at.timestamp() if credential.expires_at else None,
        )

    # --- detach -------------------------------------------------------------------------------------------------------

    async def detach_session(self, session: SessionID) -> int:
        """Ends every attachment of a session. Returns how many there were. Idempotent."""
        return await self._keys.apart(f"detach {session}", self._detach_all(session))

    async def detach(self, session: SessionID, folder_hex: str) -> int:
        """Ends one attachment, named by the hex digits of its folder. Returns 1 or 0. Idempotent."""
        return await self._keys.apart(f"detach {session}", self._detach_all(session, folder_hex))

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
        async with self._keys.hold(key) as entry:
            item = entry.attachments.get(folder)
            if item is None:
                return False
            await self._release(entry, item)
            log.info("detached", session=item.session, vfid=str(item.vfid), key=key)
            return True

    async def _release(self, entry: Entry, item: AttachmentRecord, *, forget_grant: bool = False) -> None:
        """Unbinds and forgets one attachment; the mount of the last one drains, or goes at once if it never lived."""
        await self._journal.set_attachment(item, AttachmentState.RELEASING)
        async with self._mounter.unmounting:
            await off_loop("an unbind", KERNEL_SECONDS, lambda: self._binds.remove(item.session, item.vfid))
        await self._journal.drop_attachment(item, forget_grant=forget_grant)
        folder: Folder = (item.session, item.vfid)
        entry.attachments.pop(folder, None)
        self._folders.pop(folder, None)
        await self._lifecycle.rest(entry)

    async def collect(self, grace: float = 0.0) -> int:
        """Takes down mounts without sessions that have been so for at least `grace` seconds. Returns how many."""
        keys = [
            key
            for key, entry in self._keys.entries.items()
            if entry.state in (MountState.DRAINING, MountState.FAILED)
            and entry.record is not None
            and time.time() - entry.record.since >= grace
        ]
        return await self._keys.apart("collect", self._collect(keys))

    async def _collect(self, keys: list[MountKey]) -> int:
        async def one(key: MountKey) -> bool:
            async with self._keys.hold(key) as entry:
                if entry.state not in (MountState.DRAINING, MountState.FAILED) or entry.attachments:
                    return False
                await self._lifecycle.take_down(entry)
                return True

        return sum([result is True for result in await asyncio.gather(*map(one, keys))])

    async def stop_all(self) -> None:
        """Refuses new attachments, ends all there are and takes every mount down. Raises nothing: what stays is
        logged.
        """
        self._keys.stopping = True
        if attaching := [task for tasks in self._attaching.values() for task in tasks]:
            for task in attaching:
                task.cancel()  # it cleans up after itself
            await asyncio.wait(attaching)
        folders = list(self._folders)
        keys = [key for key, entry in self._keys.entries.items() if entry.record is not None]

        async def rest(key: MountKey) -> None:
            async with self._keys.hold(key) as entry:
                if entry.record is not None and not entry.attachments:
                    await self._lifecycle.take_down(entry)

        detached = await asyncio.gather(*map(self._detach, folders), return_exceptions=True)
        rested = await asyncio.gather(*map(rest, keys), return_exceptions=True)
        for result in (*detached, *rested):
            if isinstance(result, BaseException):
                log.error("not everything could be taken down", error=str(result))

    # --- drain --------------------------------------------------------------------------------------------------------

    @property
    def draining(self) -> bool:
        """The whole node refuses new attachments."""
        return NODE in self._drains

    @property
    def drains(self) -> frozenset[MountKey]:
        """Keys that refuse new attachments; `NODE` stands for all."""
        return frozenset(self._drains)

    async def drain(self, keys: Collection[MountKey] | None = None) -> None:
        """Refuses new attachments of these keys (None: of all) from now on, also after a restart. Idempotent.

        What is attached stays until its session ends.
        """
        wanted = {NODE} if keys is None else set(keys)
        for key in wanted - {NODE}:
            if self.entry(key) is None:
                raise NotFound(f"This node has no mount {key}.", hint="See `mooring mounts ls`.")
        await self._journal.begin_drain(wanted)
        self._drains |= wanted
        self._keys.tell(EventKind.DRAIN, detail={"draining": True, "keys": sorted(wanted - {NODE})})

    async def resume(self, keys: Collection[MountKey] | None = None) -> None:
        """The end of `drain`; None ends all. Idempotent."""
        await self._journal.end_drain(keys)
        self._drains = set() if keys is None else self._drains - set(keys)
        self._keys.tell(EventKind.DRAIN, detail={"draining": False, "keys": sorted(keys or ())})

    def _refuse_draining(self, key: MountKey) -> None:
        if self.draining:
            raise ServiceUnavailable(
                "This node is being drained and takes no new attachments.",
                hint="Use another node; an administrator ends it with `mooring mounts drain --cancel`.",
            )
        if key in self._drains:
            raise ServiceUnavailable(
                "This mount is being drained and takes no new attachments.",
                hint="Wait; an administrator ends it with `mooring mounts drain --cancel`.",
            )

    # --- what watchers, reconciler and operators do -------------------------------------------------------------------

    async def lost(self, key: MountKey, reason: str) -> bool:
        """The mount of a key is given up though its process runs: see `Lifecycle.lost`."""
        return await self._keys.apart(f"lost {key}", self._lifecycle.lost(key, reason))

    async def misplaced(self, key: MountKey, reason: str) -> bool:
        """The mount of a key is not seen in the pool any more: see `Lifecycle.misplaced`."""
        return await self._keys.apart(f"misplaced {key}", self._lifecycle.misplaced(key, reason))

    async def rebind(self, item: AttachmentRecord) -> None:
        """A session bind is not there, or covered by somebody: see `Lifecycle.rebind`."""
        await self._keys.apart(f"rebind {item.session}", self._lifecycle.rebind(item))

    async def repair(self, key: MountKey) -> bool:
        """Repairs a dead or failed mount now. False if it lives. Raises what stopped it, or `NotFound`."""
        return await self._keys.apart(f"repair {key}", self._lifecycle.repair(key))

    async def renew(self, token: str) -> None:
        """Gives the mount of an attachment the fresh credential of a new grant. Raises as `attach` does."""
        await self.renew_order(Order.of(self._verifier.verify(token), self._verifier, self._driver))

    async def renew_order(self, order: Order) -> None:
        """The order must name an attachment there is, with the same mount key."""
        await self._keys.apart(f"renew {order.plan.key}", self._renew(order))

    async def _renew(self, order: Order) -> None:
        async with self._keys.hold(order.plan.key) as entry:
            if (order.session, order.vfid) not in entry.attachments:
                other = self._folders.get((order.session, order.vfid))
                if other is not None:
                    raise Conflict(
                        f"Folder {order.vfid} of session {order.session} is mounted with other terms.",
                        hint="Ask for a grant with the terms of the first one.",
                    )
                raise NotFound(
                    f"Session {order.session} has folder {order.vfid} not attached here.", hint="Attach it first."
                )
            credential = order.credential()
            if entry.state in (MountState.DEAD, MountState.FAILED):
                await self._lifecycle.revive_dead(entry, credential)
            else:
                await self._lifecycle.renew(entry, credential)

    def trouble(self, key: MountKey, text: str | None) -> None:
        """A problem between a living mount and S3, in one sentence; None: it works (again)."""
        entry = self.entry(key)
        if entry is not None and entry.record is not None and entry.trouble != text:
            entry.trouble = text
            self._keys.tell(EventKind.TROUBLE, entry.record, error=text)

    def unresponsive(self, key: MountKey, text: str | None) -> None:
        """The process of a mount does not answer; None: it does (again)."""
        entry = self.entry(key)
        if entry is not None and entry.record is not None and entry.unresponsive != text:
            entry.unresponsive = text
            kind = EventKind.ANSWERS if text is None else EventKind.UNRESPONSIVE
            self._keys.tell(kind, entry.record, error=text)

    # --- taking over --------------------------------------------------------------------------------------------------

    async def adopt(
        self,
        record: MountRecord,
        process: MountProcess | None,
        items: Collection[AttachmentRecord],
        retired: dict[str, MountProcess | None] | None = None,
    ) -> None:
        """Takes over what a former agent left of a key; see `Lifecycle.adopt`."""
        async with self._keys.hold(record.key) as entry:
            for item in items:
                self._folders[item.session, item.vfid] = record.key
            await self._lifecycle.adopt(entry, record, process, items, retired or {})
