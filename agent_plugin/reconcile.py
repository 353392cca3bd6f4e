"""What a former agent left: journal, mount table and processes compared, before the first request is served.

Two ways, by `stop-mounts-on-exit`. With it (one-machine stack) nothing is kept: its sessions are gone too. Without it
(a node whose agent was upgraded or killed) living mounts are taken over and everything that is not wholly alive is
removed. After either, no process, mount, bind, credential file or stage entry is there that the journal does not know.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from storage_proxy.core.errors import DeadlineExceeded, MooringError
from storage_proxy.core.logs import get_logger
from storage_proxy.core.wire import MountState

from .attachments import Attachments
from .containers import Binds
from .credentials import wipe_all, wipe_credential
from .drivers import Drivers
from .journal import AttachmentRecord, AttachmentState, Journal, MountRecord
from .kernel import fusectl
from .kernel.abandon import off_loop
from .layout import Layout
from .mounter import Mounter
from .supervisor import MountProcess, ProcessID

log = get_logger(__name__)

_SECONDS = 10.0
_TOKEN = re.compile(r"[0-9a-f]{16}")


@dataclass(slots=True)
class Found:
    """What was there and what became of it."""

    adopted: int = 0
    mounts: int = 0
    processes: int = 0
    credentials: int = 0
    attachments: int = 0

    def tell(self) -> None:
        if any((self.mounts, self.processes, self.credentials, self.attachments, self.adopted)):
            log.info(
                "reconciled with what a former agent left",
                adopted_mounts=self.adopted,
                removed_mounts=self.mounts,
                ended_processes=self.processes,
                wiped_files=self.credentials,
                dropped_attachments=self.attachments,
            )


class Reconciler:
    """`scratch`: the directory with the mounts' temporary files."""

    def __init__(self, layout: Layout, journal: Journal, drivers: Drivers, scratch: Path) -> None:
        self._layout = layout
        self._journal = journal
        self._programs = frozenset(drivers.names)
        self._scratch = scratch

    async def clean(self) -> Found:
        """Removes everything, the base included; only used grants are remembered."""
        found = Found()
        records = await self._journal.mounts()
        found.attachments = len(await self._journal.attachments())
        processes = {record.process for record in records if record.process and record.process.runs}
        processes |= set(self._strays(set()))
        found.credentials = wipe_all(self._layout.creds)
        connections = [entry.connection for entry in self._layout.mounts() if entry.is_fuse]
        try:
            found.mounts = await off_loop("the removal of old mounts", _SECONDS, self._layout.tear_down)
        except DeadlineExceeded:
            # Their processes hang. Without their connections nothing waits for them any more.
            for connection in connections:
                fusectl.abort(fusectl.SYSTEM, connection)
            found.mounts = await off_loop("the removal of old mounts", _SECONDS, self._layout.tear_down)
        await self._end(processes)
        found.processes = len(processes)
        await off_loop("the removal of temporary files", 60.0, lambda: self._sweep_scratch(set()))
        await self._journal.clear()
        return found

    async def adopt(self, attachments: Attachments, mounter: Mounter, binds: Binds) -> Found:
        """Takes over what lives, removes the rest. The layout must be prepared."""
        found = Found()
        items: dict[str, list[AttachmentRecord]] = {}
        for item in await self._journal.attachments():
            items.setdefault(item.key, []).append(item)
        kept: set[str] = set()
        for record in await self._journal.mounts():
            mine = items.pop(record.key, [])
            process = await self._living(record, mounter)
            if process is None:
                await self._remove(record, mine, mounter, binds, found)
                continue
            held = await self._bound(record, mine, binds, found)
            await attachments.adopt(record, process, held)
            kept.add(record.token)
            found.adopted += 1
        strays = self._strays(kept)
        await self._end(set(strays))
        found.processes += len(strays)
        await off_loop("the removal of stray mounts", _SECONDS, lambda: self._sweep(attachments, kept, found))
        return found

    async def _living(self, record: MountRecord, mounter: Mounter) -> MountProcess | None:
        """The process of a mount that can be taken over whole."""
        if record.state not in (MountState.LIVE, MountState.DRAINING) or record.process is None:
            return None
        process = MountProcess.adopt(record.process, self._layout.log(record.token))
        if process is None or await mounter.usable(record):
            return process
        process.let_go()
        return None

    async def _remove(
        self, record: MountRecord, items: list[AttachmentRecord], mounter: Mounter, binds: Binds, found: Found
    ) -> None:
        log.info("removing a mount that is not alive", key=record.key, place=record.plan.place, state=record.state)
        for item in items:
            await self._drop(item, binds, found)
        identity = record.process
        process = MountProcess.adopt(identity, self._layout.log(record.token)) if identity else None
        try:
            await mounter.remove(record, process)
        except MooringError as err:
            log.error("an old mount could not be removed", key=record.key, error=str(err))
        await self._journal.drop_mount(record.key)
        found.mounts += 1
        found.processes += process is not None

    async def _bound(
        self, record: MountRecord, items: list[AttachmentRecord], binds: Binds, found: Found
    ) -> list[AttachmentRecord]:
        """The attachments that hold; one that was being made or unmade is ended: nobody was promised it."""
        held = []
        for item in items:
            if item.state is not AttachmentState.BOUND:
                await self._drop(item, binds, found)
                continue
            if not binds.exists(item.session, item.vfid):
                await self._bind(record, item, binds)
            held.append(item)
        return held

    async def _bind(self, record: MountRecord, item: AttachmentRecord, binds: Binds) -> None:
        await off_loop(
            "a session bind", _SECONDS, lambda: binds.make(record.key, item.session, item.vfid, record.plan.mode)
        )

    async def _drop(self, item: AttachmentRecord, binds: Binds, found: Found) -> None:
        await off_loop("an unbind", _SECONDS, lambda: binds.remove(item.session, item.vfid))
        await self._journal.drop_attachment(item)
        found.attachments += 1

    def _sweep(self, attachments: Attachments, kept: set[str], found: Found) -> None:
        """Whatever is below the base without a row in the journal."""
        layout = self._layout
        keys = {record.key for record, _ in attachments.mounts()}
        binds = {layout.bind(item.session, item.vfid) for item, _ in attachments.attachments()}
        wanted = {str(layout.pooled(key)) for key in keys} | {str(place) for place in binds}
        for entry in layout.mounts():
            if entry.is_fuse and entry.mount_point not in wanted:
                found.mounts += layout.unmount_all(Path(entry.mount_point))
        for folder, known in ((layout.stage, set[str]()), (layout.pool, set(map(str, keys))), (layout.logs, kept)):
            for place in folder.iterdir():
                if place.name not in known:
                    _remove_empty(place)
        for session in layout.sessions.iterdir():
            for place in session.iterdir():
                if place not in binds:
                    _remove_empty(place)
            _remove_empty(session)
        for path in layout.creds.iterdir():
            if path.name not in keys:
                wipe_credential(path)
                found.credentials += 1
        self._sweep_scratch(kept)

    def _sweep_scratch(self, kept: set[str]) -> None:
        if self._scratch.is_dir():
            for place in self._scratch.iterdir():
                if place.name not in kept:
                    shutil.rmtree(place, ignore_errors=True)

    def _strays(self, kept: set[str]) -> list[ProcessID]:
        """Mount processes on our stage whose pid was not written down in time, or whose journal is lost.

        The mount point in their arguments names them: no other program has that random directory in its command line.
        """
        found = []
        for place in Path("/proc").iterdir():
            if not place.name.isdigit():
                continue
            try:
                arguments = [Path(os.fsdecode(raw)) for raw in (place / "cmdline").read_bytes().split(b"\0") if raw]
            except OSError:
                continue
            tokens = {path.name for path in arguments if path.parent == self._layout.stage}
            if not arguments or arguments[0].name not in self._programs:
                continue
            if any(_TOKEN.fullmatch(token) and token not in kept for token in tokens):
                identity = ProcessID.of(int(place.name))
                if identity is not None:
                    found.append(identity)
        return found

    async def _end(self, identities: set[ProcessID]) -> None:
        processes = [
            process
            for identity in identities
            if (process := MountProcess.adopt(identity, self._layout.logs / "none")) is not None
        ]
        results = await asyncio.gather(*(process.stop(patience=1.0) for process in processes))
        for process, ended in zip(processes, results, strict=True):
            if not ended:
                log.error("a mount process of a former agent does not end", pid=process.pid)


def _remove_empty(place: Path) -> None:
    try:
        if place.is_dir():
            place.rmdir()
        else:
            place.unlink()
    except OSError as err:
        log.info("left in place", path=str(place), reason=err.strerror)
