"""What a former agent left: journal, mount table and processes compared, before the first request is served.

Two ways, by `stop-mounts-on-exit`. With it (one-machine stack) nothing is kept: its sessions are gone too. Without it
(a node whose agent was upgraded or killed) what was promised is kept: living mounts are taken over, those that sessions
hold and that are not alive are taken over as dead and repaired in the background. An attachment that was being made or
unmade is ended, for nobody was promised it; so is one whose directory is gone: the host was started anew, and with it
ended every container. After either way, no process, mount, bind, credential file or stage entry is there that the
journal does not know.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from storage_proxy.core.errors import DeadlineExceeded, MooringError
from storage_proxy.core.logs import get_logger
from storage_proxy.core.wire import MountState

from .attachments import Attachments
from .containers import Binds
from .credentials import wipe_all
from .journal import AttachmentRecord, AttachmentState, Journal, MountRecord, RetiredRecord
from .kernel import entries_at, fusectl
from .kernel.abandon import off_loop
from .layout import Layout
from .mounter import Mounter
from .strays import Known, StrayKind, Strays, arguments_of, names_in
from .supervisor import MountProcess, ProcessID

log = get_logger(__name__)

_SECONDS = 10.0
_AT_ONCE = 16  # keys that are looked at at the same time


@dataclass(slots=True)
class Found:
    """What was there and what became of it."""

    adopted_mounts: int = 0
    dead_mounts: int = 0  # taken over and repaired in the background
    removed_mounts: int = 0
    ended_processes: int = 0
    wiped_files: int = 0
    dropped_attachments: int = 0

    @property
    def detail(self) -> dict[str, object]:
        """What differed, without what is zero; that living mounts go on is no difference."""
        return {name: count for name, count in asdict(self).items() if count and name != "adopted_mounts"}

    def tell(self) -> None:
        if any(asdict(self).values()):
            log.info("reconciled with what a former agent left", **asdict(self))


class Takeover:
    """`scratch`: the directory with the mounts' temporary files."""

    def __init__(self, layout: Layout, journal: Journal, strays: Strays, scratch: Path) -> None:
        self._layout = layout
        self._journal = journal
        self._strays = strays
        self._scratch = scratch

    # --- nothing is kept ----------------------------------------------------------------------------------------------

    async def clean(self) -> Found:
        """Removes everything, the base included; only used grants are remembered."""
        found = Found()
        starts: list[MountRecord | RetiredRecord] = [*await self._journal.mounts(), *await self._journal.retired()]
        found.dropped_attachments = len(await self._journal.attachments())
        processes = {start.process for start in starts if self._is_ours(start.process, start.token) and start.process}
        processes |= set(self._strays.processes(()))
        found.wiped_files = wipe_all(self._layout.creds)
        connections = [entry.connection for entry in self._layout.mounts() if entry.is_fuse]
        try:
            found.removed_mounts = await off_loop("the removal of old mounts", _SECONDS, self._layout.tear_down)
        except DeadlineExceeded:
            # Their processes hang. Without their connections nothing waits for them any more.
            for connection in connections:
                fusectl.abort(fusectl.SYSTEM, connection)
            found.removed_mounts = await off_loop("the removal of old mounts", _SECONDS, self._layout.tear_down)
        found.ended_processes = await self._end(processes)
        await off_loop("the removal of temporary files", 60.0, self._empty_scratch)
        await self._journal.clear()
        return found

    def _empty_scratch(self) -> None:
        for name in names_in(self._scratch):
            shutil.rmtree(self._scratch / name, ignore_errors=True)

    async def _end(self, processes: Iterable[ProcessID]) -> int:
        return sum(await asyncio.gather(*map(self._strays.end, processes)))

    # --- what was promised is kept ------------------------------------------------------------------------------------

    async def adopt(self, attachments: Attachments, mounter: Mounter, binds: Binds) -> Found:
        """Takes over what was promised, removes the rest. The layout must be prepared.

        Does not wait for repairs. Mounts that hang cost their deadline, all at the same time.
        """
        found = Found()
        items: dict[str, list[AttachmentRecord]] = {}
        for item in await self._journal.attachments():
            items.setdefault(item.key, []).append(item)
        retired: dict[str, list[RetiredRecord]] = {}
        for row in await self._journal.retired():
            retired.setdefault(row.key, []).append(row)
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(record: MountRecord) -> None:
            key = _Key(self, record, items.get(record.key, []), retired.get(record.key, []), mounter, binds, found)
            async with gate:
                try:
                    await key.take_over(attachments)
                except MooringError as err:
                    log.error("a mount could not be taken over", key=record.key, error=str(err))
                    await attachments.lost(record.key, f"It could not be taken over: {err}")

        await asyncio.gather(*map(one, await self._journal.mounts()))
        await self._sweep(attachments, found)
        return found

    async def _sweep(self, attachments: Attachments, found: Found) -> None:
        """Whatever is there without a row in the journal: nothing else is under way yet but repairs."""
        known = Known.to(attachments, self._layout)
        strays = await off_loop("a look for strays", _SECONDS, lambda: self._strays.find(known))
        known = Known.to(attachments, self._layout)
        strays = {stray for stray in strays if not known.has(stray)}
        found.ended_processes += await self._end(stray.process for stray in strays if stray.process)
        mounts = [stray for stray in strays if stray.kind is StrayKind.MOUNT]
        found.removed_mounts += len(await off_loop("stray mounts", _SECONDS, lambda: self._strays.unmount(mounts)))
        # What was mounted or written by them can be seen now.
        strays = await off_loop("a look for strays", _SECONDS, lambda: self._strays.find(known))
        known = Known.to(attachments, self._layout)
        files = {stray for stray in strays if not known.has(stray)}
        files -= {stray for stray in files if stray.kind in (StrayKind.MOUNT, StrayKind.PROCESS)}
        scratch = {stray for stray in files if stray.kind is StrayKind.SCRATCH}
        done = self._strays.remove_files(files - scratch)
        found.wiped_files += sum(stray.kind is StrayKind.CREDENTIAL for stray in done)
        await off_loop("the removal of temporary files", 60.0, lambda: self._strays.remove_files(scratch))

    def _is_ours(self, process: ProcessID | None, token: str) -> bool:
        """True if it runs and was started by an agent with this token.

        A pid with its start time is unique until the host is started anew, and then another may be just that.
        """
        if process is None or not process.runs:
            return False
        return str(self._layout.staged(token)) in arguments_of(process.pid)

    def adopted(self, process: ProcessID | None, token: str) -> MountProcess | None:
        if process is None or not self._is_ours(process, token):
            return None
        return MountProcess.adopt(process, self._layout.log(token))


class _Key:
    """One row of the journal and what belongs to it."""

    def __init__(
        self,
        takeover: Takeover,
        record: MountRecord,
        items: list[AttachmentRecord],
        retired: list[RetiredRecord],
        mounter: Mounter,
        binds: Binds,
        found: Found,
    ) -> None:
        self._takeover = takeover
        self._layout = takeover._layout
        self._journal = takeover._journal
        self._record = record
        self._items = items
        self._retired = retired
        self._mounter = mounter
        self._binds = binds
        self._found = found

    async def take_over(self, attachments: Attachments) -> None:
        record, mounter = self._record, self._mounter
        held = await self._held()
        former = await self._former()
        process = self._takeover.adopted(record.process, record.token)
        if process is not None and await self._serves(held):
            self._found.adopted_mounts += 1
            await attachments.adopt(record, process, held, former)
            self._forget_stage()
            return
        if process is not None:
            self._found.ended_processes += 1
        if not held:
            log.info("removing a mount without sessions", key=record.key, place=record.plan.place, state=record.state)
            await mounter.remove(record, process, former)
            await self._journal.drop_mount(record.key)
            self._found.removed_mounts += 1
            return
        log.info("taking over a dead mount", key=record.key, place=record.plan.place, state=record.state)
        await mounter.cut(record, process)
        try:
            await mounter.undo(record, process)
        except MooringError as err:  # the repair does not need its place
            log.error("a dead mount left something behind", key=record.key, error=str(err))
            former[record.token] = process
        await attachments.adopt(record, None, held, former)
        self._found.dead_mounts += 1

    async def _held(self) -> list[AttachmentRecord]:
        """The attachments that were promised; the others are ended."""
        held = []
        for item in self._items:
            there = item.vfid.hex in names_in(self._layout.sessions / item.session)
            if item.state is AttachmentState.BOUND and there:
                held.append(item)
                continue
            log.info("ending an attachment", session=item.session, vfid=str(item.vfid), state=item.state, there=there)
            await off_loop("an unbind", _SECONDS, partial(self._binds.remove, item.session, item.vfid))
            # One that was not finished may be asked for again with the same grant.
            await self._journal.drop_attachment(item, forget_grant=item.state is AttachmentState.BINDING)
            self._found.dropped_attachments += 1
        return held

    async def _former(self) -> dict[str, MountProcess | None]:
        """Former starts by token. One that still has its stage entry was never put in place: it is taken back."""
        former: dict[str, MountProcess | None] = {}
        staged = names_in(self._layout.stage)
        for row in self._retired:
            process = self._takeover.adopted(row.process, row.token)
            if row.token not in staged:
                former[row.token] = process
                continue
            start = replace(self._record, token=row.token, device=None)
            await self._mounter.cut(start, process)
            await self._mounter.undo(start, process)
            await self._journal.drop_retired(row.token)
            self._found.ended_processes += process is not None
        return former

    async def _serves(self, held: list[AttachmentRecord]) -> bool:
        """True if the mount of the process can go on: in the pool, still on the stage, or seen in a session bind."""
        record = self._record
        if record.state in (MountState.DEAD, MountState.FAILED) or record.device is None:
            return False
        if record.state is MountState.STAGING and not held:
            return False
        if await self._mounter.usable(record):
            return True
        put_back = await off_loop("the repair of the pool", _SECONDS, lambda: self._binds.put_back(record, held))
        return put_back and await self._mounter.usable(record)

    def _forget_stage(self) -> None:
        """The empty stage entry of a mount whose agent died right after it had put it in place."""
        place = self._layout.staged(self._record.token)
        if place.name in names_in(self._layout.stage) and not entries_at(place):
            with contextlib.suppress(OSError):
                place.rmdir()
