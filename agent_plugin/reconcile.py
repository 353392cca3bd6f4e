"""Four truths compared while the agent runs: journal, mount table, mount processes, containers that hold a bind.

Every `reconcile-interval` all of them; and whenever the kernel says that the mount table changed, whether pool and
session binds are what they should be. What differs is repaired and told (log, event, counters):

    pool entry gone or covered              put back, or given up and repaired (`Attachments.misplaced`)
    session bind gone or covered            stacked again
    container sees a mount that is dead     repaired inside its mount namespace (`containers.mend`)
    attachment held once, and no more       released after `release-unheld-after`
    attachment neither bound nor gone       its release is tried again, so is the removal of a mount
    row, process, mount, file of nobody     removed, if it is there in two looks in a row

Two looks, because something may just be under way. What has its lock held by somebody is passed over until the next
time. Nothing here touches a mount point, and every part has a deadline of its own, so that one that hangs does not keep
the others from being done.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field

from storage_proxy.core.errors import MooringError
from storage_proxy.core.ids import MountKey, SessionID, VFolderID
from storage_proxy.core.logs import get_logger
from storage_proxy.core.wire import MountState

from .attachments import Attachments
from .containers.mend import mend
from .events import EventKind
from .journal import AttachmentRecord, AttachmentState, Journal, MountRecord
from .kernel import MountEntry, read_mountinfo, tops
from .kernel.abandon import off_loop
from .kernel.namespaces import Holder, holders
from .kernel.tablewatch import TableWatch
from .keys import Entry, Folder
from .layout import Layout, is_base
from .strays import Known, Stray, StrayKind, Strays

log = get_logger(__name__)

_KERNEL_SECONDS = 10.0
_PART_SECONDS = 60.0
_SETTLE_SECONDS = 0.5  # changes of the mount table come in swarms: one look for all of them
_MAX_TOLD = 50  # repairs named in one event; the counts are always whole


@dataclass(slots=True)
class Report:
    """What one comparison repaired."""

    counts: Counter[str] = field(default_factory=Counter)
    repairs: list[str] = field(default_factory=list)

    def add(self, what: str, text: str) -> None:
        """`what` is one word to count by."""
        self.counts[what] += 1
        self.repairs.append(text)


@dataclass(frozen=True, slots=True)
class _Places:
    """Where each mount should be seen: pool entries and session binds by path, and devices in use by key."""

    layout: Layout
    pool: Mapping[str, MountKey]
    binds: Mapping[str, tuple[MountKey, Folder]]
    devices: Mapping[str, MountKey]


@dataclass(frozen=True, slots=True)
class _Held:
    """Who holds what, at one moment."""

    folders: set[Folder]
    namespaces: Mapping[MountKey, set[int]]
    behind: Mapping[
        MountKey, set[tuple[int, str, str]]
    ]  # namespace, mount point, device of what is not served any more


class Reconciler:
    """`grace`: how long a mount without attachments stays by right. `release_after` 0: attachments are never
    released; those that `keeps` says yes to are not released for want of a holder. `totals` counts all repairs since
    the start, by word.
    """

    def __init__(
        self,
        layout: Layout,
        journal: Journal,
        attachments: Attachments,
        strays: Strays,
        *,
        interval: float,
        grace: float,
        release_after: float,
        keeps: Callable[[SessionID, VFolderID], bool] | None = None,
    ) -> None:
        self._layout = layout
        self._journal = journal
        self._attachments = attachments
        self._strays = strays
        self._interval = interval
        self._grace = grace
        self._release_after = release_after
        self._keeps = keeps
        self._lock = asyncio.Lock()
        self._suspects: set[Stray] = set()
        self._unfinished: set[str] = set()
        self._rows: set[tuple[object, str]] = set()
        self._unheld: dict[Folder, float] = {}  # since when (monotonic): the wall clock may jump
        self._given_up: set[tuple[int, str, str]] = set()
        self._base_trouble: str | None = None
        self.totals: Counter[str] = Counter()
        self.passes = 0
        self.last_pass: float | None = None  # seconds since the epoch

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._every_interval(), name="reconcile")
            tasks.create_task(self._at_changes(), name="mount table")

    async def _every_interval(self) -> None:
        while True:
            await self.compare()
            await asyncio.sleep(self._interval)

    async def _at_changes(self) -> None:
        pause = _SETTLE_SECONDS
        with TableWatch() as watch:
            while True:
                await watch.changed()
                await asyncio.sleep(pause)
                report = await self._compare({"mounts": self._compare_places})
                # Somebody who mounts over us again and again must not make us stack as fast as we can.
                pause = min(pause * 2, self._interval) if report.counts else _SETTLE_SECONDS

    async def compare(self) -> Report:
        """One comparison of everything. Raises nothing: what failed is logged and tried again the next time."""
        report = await self._compare(
            {
                "mounts": self._compare_places,
                "containers": self._compare_containers,
                "unfinished": self._finish,
                "journal": self._compare_journal,
                "strays": self._remove_strays,
            }
        )
        self.passes += 1
        self.last_pass = time.time()
        return report

    async def _compare(self, parts: Mapping[str, Callable[[Report], Awaitable[None]]]) -> Report:
        report = Report()
        async with self._lock:
            for name, part in parts.items():
                try:
                    async with asyncio.timeout(_PART_SECONDS):
                        await part(report)
                except (MooringError, OSError, TimeoutError) as err:
                    log.warning("a comparison failed", part=name, error=str(err) or type(err).__name__)
                except Exception:  # a bug here must not end the others
                    log.exception("a comparison failed", part=name)
        if report.counts:
            self.totals += report.counts
            told = report.repairs[:_MAX_TOLD]
            log.info("reconciled", **report.counts, repairs=told)
            self._attachments.tell(EventKind.RECONCILED, **report.counts, repairs=told)
        return report

    # --- mount table --------------------------------------------------------------------------------------------------

    async def _compare_places(self, report: Report) -> None:
        table = tops(await off_loop("the mount table", _KERNEL_SECONDS, read_mountinfo))
        self._look_at_base(table)
        for key in self._covered(table):
            # Looked at once more right before: between this look and the repair nobody else can act.
            reason = self._wrong_in_pool(self._attachments.entry(key), tops(read_mountinfo()))
            if reason is not None and await self._attachments.misplaced(key, reason):
                report.add("pool", f"{self._layout.pooled(key)} {reason}")
        for item in self._unbound(table):
            place = self._layout.bind(item.session, item.vfid)
            await self._attachments.rebind(item)
            if (top := tops(read_mountinfo()).get(str(place))) is not None and top != table.get(str(place)):
                log.warning("stacked a session bind again", session=item.session, vfid=str(item.vfid))
                report.add("bind", f"{place} {_reason(table.get(str(place)))}")

    def _living(self) -> Iterator[tuple[Entry, MountRecord]]:
        """Keys that have a mount and that nobody works on."""
        for record, _ in self._attachments.mounts():
            entry = self._attachments.entry(record.key)
            if entry is not None and not entry.lock.locked() and record.device is not None:
                yield entry, record

    def _covered(self, table: Mapping[str, MountEntry]) -> list[MountKey]:
        return [record.key for entry, record in self._living() if self._wrong_in_pool(entry, table) is not None]

    def _wrong_in_pool(self, entry: Entry | None, table: Mapping[str, MountEntry]) -> str | None:
        record = entry.record if entry is not None else None
        if entry is None or record is None or entry.lock.locked():
            return None
        if record.state not in (MountState.LIVE, MountState.DRAINING):
            return None
        top = table.get(str(self._layout.pooled(record.key)))
        return None if top is not None and top.device == record.device else _reason(top)

    def _unbound(self, table: Mapping[str, MountEntry]) -> list[AttachmentRecord]:
        found = []
        for entry, record in self._living():
            if record.state is not MountState.LIVE:
                continue
            for item in entry.attachments.values():
                top = table.get(str(self._layout.bind(item.session, item.vfid)))
                if item.state is AttachmentState.BOUND and (top is None or top.device != record.device):
                    found.append(item)
        return found

    def _look_at_base(self, table: Mapping[str, MountEntry]) -> None:
        """The base cannot be repaired from here: what is below it is hidden, or gone with it."""
        trouble = None
        for place in (self._layout.runtime, self._layout.stage, self._layout.creds):
            top = table.get(str(place))
            if top is None or not is_base(top):
                trouble = f"{place} {_reason(top)}"
                break
        if trouble is not None and trouble != self._base_trouble:
            log.error("the mount base of the agent is not what it was", trouble=trouble)
        self._base_trouble = trouble

    # --- containers ---------------------------------------------------------------------------------------------------

    async def _compare_containers(self, report: Report) -> None:
        mounts = self._attachments.mounts()
        layout = self._layout
        places = _Places(
            layout=layout,
            pool={str(layout.pooled(record.key)): record.key for record, _ in mounts},
            binds={
                str(layout.bind(item.session, item.vfid)): (record.key, (item.session, item.vfid))
                for record, items in mounts
                for item in items
            },
            devices={record.device: record.key for record, _ in mounts if record.device is not None},
        )
        held = await off_loop("a look at the containers' mounts", _KERNEL_SECONDS, lambda: _look(places))
        for record, _ in mounts:
            if (entry := self._attachments.entry(record.key)) is not None:
                entry.holders = len(held.namespaces.get(record.key, ()))
        await self._mend(held, report)
        await self._note_holders(held, report)

    async def _mend(self, held: _Held, report: Report) -> None:
        """Containers that see what is dead or retired: propagation does not reach them, or did not when it was time."""
        behind = {key: seen for key, seen in held.behind.items() if seen - self._given_up}
        for entry, record in list(self._living()):
            seen = behind.get(record.key, set()) - self._given_up
            former = {device for _, _, device in seen} - {record.device}
            if record.state is not MountState.LIVE or not former or entry.lock.locked():
                continue
            for result in await mend(former, self._layout.pooled(record.key)):
                if result.error is None:
                    report.add("container", f"{result.target} of pid {result.pid} showed a former mount")
            self._given_up |= seen
        self._given_up &= {place for seen in held.behind.values() for place in seen}

    async def _note_holders(self, held: _Held, report: Report) -> None:
        now, clock = time.time(), time.monotonic()
        bound = [item for item, _ in self._attachments.attachments() if item.state is AttachmentState.BOUND]
        seen = [item for item in bound if (item.session, item.vfid) in held.folders]
        if seen:
            await self._journal.save_held([(item, now) for item in seen])
        lost = [item for item in bound if item.held is not None and (item.session, item.vfid) not in held.folders]
        self._unheld = {(item.session, item.vfid): self._since(item, clock) for item in lost}
        if self._release_after <= 0:
            return
        for item in lost:
            if clock - self._unheld[item.session, item.vfid] < self._release_after:
                continue
            if self._keeps is not None and self._keeps(item.session, item.vfid):
                continue
            if await self._attachments.detach(item.session, item.vfid.hex):
                log.warning(
                    "released a folder: a container held it and none does any more",
                    session=item.session,
                    vfid=str(item.vfid),
                    release_unheld_after=self._release_after,
                )
                report.add("released", f"{item.vfid} of session {item.session}")

    def _since(self, item: AttachmentRecord, clock: float) -> float:
        return self._unheld.get((item.session, item.vfid), clock)

    # --- journal ------------------------------------------------------------------------------------------------------

    async def _finish(self, report: Report) -> None:
        """Releases and removals that failed are tried again."""
        stuck = {
            item.grant_id: item
            for entry, _ in self._living()
            for item in entry.attachments.values()
            if item.state is not AttachmentState.BOUND
        }
        again = [item for grant, item in stuck.items() if grant in self._unfinished]
        self._unfinished = set(stuck)
        for item in again:
            if await self._attachments.detach(item.session, item.vfid.hex):
                report.add("unfinished", f"{item.vfid} of session {item.session} was {item.state}")
        if count := await self._attachments.collect(self._grace + self._interval):
            report.counts["removal"] += count
            report.repairs.append(f"{count} mounts without sessions")

    async def _compare_journal(self, report: Report) -> None:
        """Rows of what does not exist; nothing writes a row without having the thing in memory at once."""
        attachments = {(item.session, item.vfid): item for item in await self._journal.attachments()}
        mounts = {record.key: record for record in await self._journal.mounts()}
        keys = {record.key for record, _ in self._attachments.mounts()}
        folders = {(item.session, item.vfid) for item, _ in self._attachments.attachments()}
        extra: set[tuple[object, str]] = {
            (folder, item.grant_id) for folder, item in attachments.items() if folder not in folders
        }
        extra |= {(key, record.token) for key, record in mounts.items() if key not in keys}
        confirmed, self._rows = extra & self._rows, extra
        for folder, item in attachments.items():
            if (folder, item.grant_id) in confirmed:
                await self._journal.drop_attachment(item)
                report.add("row", f"attachment of {item.vfid} to session {item.session}")
        used = {item.key for item in await self._journal.attachments()}
        for key, record in mounts.items():
            if (key, record.token) in confirmed and key not in used:
                await self._journal.drop_mount(key)
                report.add("row", f"mount {key}")

    # --- strays -------------------------------------------------------------------------------------------------------

    async def _remove_strays(self, report: Report) -> None:
        known = Known.to(self._attachments, self._layout)
        found = await off_loop("a look for strays", _KERNEL_SECONDS, lambda: self._strays.find(known))
        again, self._suspects = found & self._suspects, found
        if not again:
            return
        known = Known.to(self._attachments, self._layout)
        again = {stray for stray in again if not known.has(stray)}
        done = await self._remove(sorted(again, key=str))
        for stray in done:
            report.add(stray.kind, str(stray))

    async def _remove(self, strays: list[Stray]) -> list[Stray]:
        """Returns those that are gone."""
        # Files first, between two steps of everybody else: after a wait they might belong to somebody.
        slow = {StrayKind.PROCESS, StrayKind.MOUNT, StrayKind.SCRATCH}
        done = [stray for stray in strays if stray.kind not in slow and self._strays.remove_file(stray)]
        mounts = [stray for stray in strays if stray.kind is StrayKind.MOUNT]
        if mounts:
            done += await off_loop("stray mounts", _KERNEL_SECONDS, lambda: self._strays.unmount(mounts))
        done += [stray for stray in strays if stray.process is not None and await self._strays.end(stray.process)]
        scratch = [stray for stray in strays if stray.kind is StrayKind.SCRATCH]
        if scratch:
            done += await off_loop("temporary files", _PART_SECONDS, lambda: self._strays.remove_files(scratch))
        return done


def _look(places: _Places) -> _Held:
    """Reads our table and those of all others. Copies of our own tree (a mount namespace without a container, as the
    monitor of a container or a system service has) are no holders.
    """
    table = read_mountinfo()
    groups: dict[str, Folder] = {}
    devices = dict(places.devices)
    for entry in table:
        if not entry.is_fuse:
            continue
        if entry.mount_point in places.binds:
            key, folder = places.binds[entry.mount_point]
            devices[entry.device] = key
            groups.update(dict.fromkeys(_groups(entry, "shared:"), folder))
        elif entry.mount_point in places.pool:
            devices[entry.device] = places.pool[entry.mount_point]
    of_key: dict[MountKey, set[Folder]] = {}
    for key, folder in places.binds.values():
        of_key.setdefault(key, set()).add(folder)
    held = _Held(set(), {}, {})
    namespaces: dict[MountKey, set[int]] = {}
    behind: dict[MountKey, set[tuple[int, str, str]]] = {}
    serving = set(places.devices)
    ours = f"{places.layout.runtime}/"
    for holder in (*holders(devices), _ourselves(table, devices)):
        seen = {entry.mount_id for entry in holder.seen()} if holder.pid else set()
        for entry in holder.entries:
            if entry.mount_point.startswith(ours):
                continue
            key = devices[entry.device]
            # Propagation tells whose bind it came from. A private copy may be of any session of its key.
            mine = {groups[group] for group in _groups(entry, "master:", "shared:") if group in groups}
            held.folders.update(mine or of_key.get(key, set()))
            if holder.pid:
                namespaces.setdefault(key, set()).add(holder.namespace)
            if entry.mount_id in seen and entry.device not in serving:
                behind.setdefault(key, set()).add((holder.namespace, entry.mount_point, entry.device))
    return _Held(held.folders, namespaces, behind)


def _ourselves(table: list[MountEntry], devices: Mapping[str, MountKey]) -> Holder:
    """Binds in our own namespace that somebody made elsewhere, as if they were a container's (without a process)."""
    entries = tuple(entry for entry in table if entry.device in devices)
    return Holder(0, 0, 0, entries, entries)


def _groups(entry: MountEntry, *kinds: str) -> set[str]:
    """Peer groups of a mount, as "shared:N" whatever it is in them."""
    return {f"shared:{tag.partition(':')[2]}" for tag in entry.tags if tag.startswith(kinds)}


def _reason(top: MountEntry | None) -> str:
    return "was not mounted" if top is None else f"was covered by {top.fstype} {top.source} ({top.device})"
