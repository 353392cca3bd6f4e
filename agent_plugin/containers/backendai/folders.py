"""The folders that this node shows below its volume roots: got from the manager extension, attached, released.

A place below a root names a folder and nothing else; whether this node may have it, read-only or not and as whose,
comes with the manager's grant. Each folder is one session of its own (the manager chose its id), however many
containers bind its path.

A folder stays while any other mount namespace holds it or something looked it up within the idle time. The kernel is
asked to let it go (`Autofs.expire`), so that no look-up can come in between; then it is detached, and its grant ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from storage_proxy.client import ManagerClient
from storage_proxy.core.errors import Forbidden, MooringError, NotFound, TokenInvalid
from storage_proxy.core.ids import SessionID, VFolderID
from storage_proxy.core.logs import get_logger
from storage_proxy.core.wire import MountState

from ...attachments import Attachments
from ...drivers import MountPlan
from ...events import Event, EventKind
from ...journal import AttachmentRecord
from ...kernel import MountEntry, entries_at, read_mountinfo, top_at
from ...kernel.abandon import off_loop
from ...kernel.autofs import Autofs
from ...kernel.mountinfo import escape
from ...kernel.namespaces import Holder, holders
from .kernels import KernelEvent
from .places import FolderPlace
from .tree import YOUNG_SECONDS, Point, Tree

log = get_logger(__name__)

# What the manager extension calls the sessions that stand for a folder of a whole node; users cannot choose such ids.
SESSION_PREFIX = "node-wide-"
_KERNEL_SECONDS = 5.0
_SCAN_SECONDS = 10.0
_END_SECONDS = 10.0
_PAUSE_SECONDS = 0.2
# For so long after the end of a kernel its folders are looked at: its container may take a while to go.
_SOON_SECONDS = 15.0
_ASK_AGAIN_SECONDS = 3600.0
_RETRY_SECONDS = 60.0


@dataclass(slots=True)
class _Folder:
    """One place. `used`: when it was last mounted or held (monotonic seconds); look-ups of what is mounted the kernel
    counts.
    """

    place: FolderPlace
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    session: SessionID | None = None
    used: float = 0.0
    releasing: bool = False


class NodeFolders:
    """`volumes`: root name -> (volume name in grants, volume as the manager extension is asked for it)."""

    def __init__(
        self,
        *,
        agent_id: str,
        attachments: Attachments,
        manager: ManagerClient,
        autofs: Autofs,
        trees: Mapping[str, Tree],
        volumes: Mapping[str, str],
        idle: float,
        deadline: float,
        runtime: Path,
    ) -> None:
        self._agent_id = agent_id
        self._attachments = attachments
        self._manager = manager
        self._autofs = autofs
        self._trees = trees
        self._volumes = volumes
        self._idle = idle
        self._deadline = deadline
        self._ours = [str(path) for path in (runtime, *(tree.path for tree in trees.values()))]
        self._folders: dict[FolderPlace, _Folder] = {}
        self._ending: set[SessionID] = set()  # grants that the manager has not been told the end of
        self._hint = asyncio.Event()
        self._soon_until = 0.0  # a kernel has ended: until then, what nobody holds goes without waiting to be idle
        attachments.listen(self._note)

    def _note(self, event: Event) -> None:
        """A mount that goes, whoever ended it, takes its place with it; the sweep looks."""
        if event.kind is EventKind.STATE and event.new in (MountState.DRAINING, MountState.ABSENT):
            self._hint.set()

    def kernel_event(self, event: KernelEvent) -> None:
        """When a kernel has started, its container holds its folders; when it has ended, release at once what nobody
        holds.
        """
        log.debug("kernel event", name=event.name, kernel_id=event.kernel_id)
        if event.ended:
            self._soon_until = time.monotonic() + _SOON_SECONDS
        self._hint.set()

    # --- taking over --------------------------------------------------------------------------------------------------

    async def adopt(self) -> int:
        """Knows again what a former agent mounted; takes away what has no attachment any more. Returns how many."""
        now = time.monotonic()
        for item, plan in self._attachments.attachments():
            place = self._place_of(item, plan.volume)
            if place is not None:
                self._folders[place] = _Folder(place, session=item.session, used=now)
        for tree in self._trees.values():
            await self._compare(tree)
        return len(self._folders)

    def _place_of(self, item: AttachmentRecord, volume: str) -> FolderPlace | None:
        if not item.session.startswith(SESSION_PREFIX):
            return None
        for root, asked in self._volumes.items():
            if asked.rpartition(":")[2] == volume:
                return FolderPlace.of_vfid(root, item.vfid)
        return None

    def _attachment(self, folder: _Folder) -> tuple[AttachmentRecord, MountPlan] | None:
        for item, plan in self._attachments.attachments():
            if item.session == folder.session and folder.place.is_of(item.vfid):
                return item, plan
        return None

    # --- look-ups -----------------------------------------------------------------------------------------------------

    async def serve(self, place: FolderPlace) -> None:
        """Mounts a folder at its place; attaches it if it is not.

        Raises `NotFound` for what the manager extension does not know, `Forbidden` for what it does not open to this
        node, and everything that an attach raises.
        """
        while True:
            folder = self._folders.setdefault(place, _Folder(place))
            async with folder.lock:
                if self._folders.get(place) is not folder:
                    continue  # it was released while this waited for the lock
                try:
                    source = await self._attached(folder)
                    # Under the lock: a release that begins now finds it mounted.
                    mount = partial(self._trees[place.root].mount_leaf, place, source)
                    await off_loop("the mount of a folder", _KERNEL_SECONDS, mount)
                except BaseException:
                    if folder.session is None:
                        self._folders.pop(place, None)
                    raise
                folder.used = time.monotonic()
                return

    async def _attached(self, folder: _Folder) -> Path:
        if (found := self._attachment(folder)) is not None:
            item, plan = found
            with contextlib.suppress(NotFound):
                await self._attachments.repair(item.key)  # does nothing to a living one
            if self._attachment(folder) is not None:
                return Path(self._attachments.spec(item, plan).source)
        place = folder.place
        given = await self._manager.grant_node_folder(
            self._agent_id, self._volumes[place.root], place.scope, place.folder, timeout=self._deadline
        )
        session = SessionID(given.session_id)
        try:
            if not place.is_of(VFolderID.parse(given.vfid)) or not session.startswith(SESSION_PREFIX):
                raise TokenInvalid(f"The manager extension granted another folder than {place}.")
            folder.session = session
            spec = await self._attachments.attach(given.grant)
        except Exception:  # not when this is cancelled: then the attach goes on, and the next look-up has it
            folder.session = None
            self._ending.add(session)
            raise
        return Path(spec.source)

    # --- release ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Releases what is idle, until it is cancelled."""
        asked_again = 0.0
        self._hint.set()
        while True:
            pause = 1.0 if time.monotonic() < self._soon_until else min(self._idle / 4, 30.0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(pause, _PAUSE_SECONDS)):
                    await self._hint.wait()
            self._hint.clear()
            try:
                if time.monotonic() >= asked_again:
                    heard = await self._end_unknown()
                    asked_again = time.monotonic() + (_ASK_AGAIN_SECONDS if heard else _RETRY_SECONDS)
                await self._sweep()
            except MooringError as err:
                log.warning("the volume roots could not be looked through", error=str(err))
            except Exception:
                log.exception("the volume roots could not be looked through")
            await asyncio.sleep(_PAUSE_SECONDS)  # events may come in any number

    async def _sweep(self) -> None:
        """One look at everything."""
        for tree in self._trees.values():
            await self._compare(tree)
        held = await self._held()
        await self._detach_orphans(held)
        now = time.monotonic()
        for folder in list(self._folders.values()):
            if folder.place in held:
                folder.used = now
            elif folder.lock.locked():
                continue
            elif now < self._soon_until:
                await self._let_go(folder, YOUNG_SECONDS)
            elif now - folder.used >= self._idle:
                await self._let_go(folder, max(self._idle, YOUNG_SECONDS))
        for tree in self._trees.values():
            await off_loop("a look at the volume roots", _KERNEL_SECONDS, lambda tree=tree: _prune(tree))  # type: ignore[misc]
        await self._end_grants()

    async def _compare(self, tree: Tree) -> None:
        """Makes what is mounted below a root agree with the attachments."""
        shown = await off_loop("a look at the volume roots", _KERNEL_SECONDS, tree.leaves)
        for place, stack in shown.items():
            folder = self._folders.setdefault(place, _Folder(place))
            if folder.lock.locked():
                continue  # somebody looks it up or releases it at this moment
            async with folder.lock:
                if self._attachment(folder) is not None:
                    await self._freshen(folder, stack)
                    continue
                # Detached by somebody else: what is still mounted here would fail as soon as its process ends.
                log.info("a folder without an attachment is unmounted", place=str(place))
                await self._unmount(place, force=True)
                self._folders.pop(place, None)
                if folder.session is not None:
                    self._ending.add(folder.session)

    async def _detach_orphans(self, held: set[FolderPlace]) -> None:
        """Attachments that no place shows: of an attach that ended after its look-up had given up on it."""
        for item, plan in self._attachments.attachments():
            place = self._place_of(item, plan.volume)
            folder = self._folders.get(place) if place is not None else None
            if (
                place is None
                or place in held
                or (folder is not None and (folder.session == item.session or folder.lock.locked()))
            ):
                continue
            log.info("an attachment that nothing shows is ended", place=str(place), session=item.session)
            await self._attachments.detach_session(item.session)
            self._ending.add(item.session)

    async def _held(self, wanted: FolderPlace | None = None) -> set[FolderPlace]:
        """The folders, or whether the one, that a container or any other mount namespace holds."""

        def look() -> set[FolderPlace]:
            table = read_mountinfo()
            devices: dict[FolderPlace, set[str]] = {}
            for item, plan in self._attachments.attachments():
                place = self._place_of(item, plan.volume)
                if place is None or wanted not in (None, place):
                    continue
                source = self._attachments.spec(item, plan).source
                leaf = self._trees[place.root].leaf(place)
                stacks = [*entries_at(source, table), *entries_at(leaf, table)]
                devices.setdefault(place, set()).update(entry.device for entry in stacks)
            held: set[str] = set()
            for holder in holders(set().union(*devices.values())):
                held |= {entry.device for entry in holder.entries if not self._is_copy(holder, entry)}
            return {place for place, own in devices.items() if own & held}

        return await off_loop("a look at the containers", _SCAN_SECONDS, look)

    def _is_copy(self, holder: Holder, entry: MountEntry) -> bool:
        """True for a mount of a namespace that has a copy of our whole directory, as services with private mounts have:
        what goes here goes there. A container that was given the folder has the folder alone, at whatever path.
        """
        whole = next((path for path in self._ours if entry.mount_point.startswith(f"{path}/")), None)
        if whole is None:
            return False
        try:
            table = Path(f"/proc/{holder.pid}/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return False
        return any(line.split(" ", 5)[4] == escape(whole) for line in table.split("\n") if line)

    async def _let_go(self, folder: _Folder, unused_for: float) -> None:
        """Asks the kernel to expire the folder if nobody looked it up for so many seconds; `expired` answers. Then
        detaches what is not mounted any more.
        """
        place = folder.place
        tree = self._trees[place.root]
        point = next((point for point in tree.points.values() if point.names == place.names[:-1]), None)
        mounted = point is not None and bool(entries_at(tree.leaf(place)))
        if point is not None and mounted:
            folder.releasing = True
            try:
                await off_loop("an expiry", self._deadline, lambda: _expire(self._autofs, point, unused_for))
            finally:
                folder.releasing = False
            if entries_at(tree.leaf(place)):
                return  # somebody uses it, or did a moment ago
        async with folder.lock:
            if entries_at(tree.leaf(place)):
                return  # looked up again meanwhile
            await off_loop("an unmount", _KERNEL_SECONDS, lambda: tree.forget_leaf(place))
            await self._detach(folder)
        log.info("folder released", place=str(place))

    async def expired(self, place: FolderPlace) -> bool:
        """The kernel found nobody in it: True if it was unmounted. Until this returns, look-ups of it wait.

        A container may have bound it after it was looked whether one does. So that is looked at once more when it is
        unmounted and nobody can bind it; if one has, it is mounted again.
        """
        folder = self._folders.get(place)
        if folder is None or not folder.releasing or not await self._unmount(place):
            return False
        try:
            if place not in await self._held(place):
                return True
        except MooringError as err:
            log.warning("a folder is not released", place=str(place), error=str(err))
        if (found := self._attachment(folder)) is not None:
            mount = partial(self._trees[place.root].mount_leaf, place, Path(self._attachments.spec(*found).source))
            await off_loop("the mount of a folder", _KERNEL_SECONDS, mount)
        return False

    async def _unmount(self, place: FolderPlace, *, force: bool = False) -> bool:
        tree = self._trees[place.root]

        def work() -> bool:
            gone = tree.unmount_leaf(place, force=force)
            if gone and force:
                tree.forget_leaf(place)
            return gone

        return await off_loop("an unmount", _KERNEL_SECONDS, work)

    async def _detach(self, folder: _Folder) -> None:
        session = folder.session
        if session is not None:
            await self._attachments.detach_session(session)
            self._ending.add(session)
        folder.session = None
        self._folders.pop(folder.place, None)

    async def _end_unknown(self) -> bool:
        """Ends the grants that this agent does not know of: a former one was killed, or lost its journal, before it
        could tell their end, and they keep folders from being deleted. False if the manager extension did not answer.
        """
        try:
            held = [item async for item in self._manager.node_folders(self._agent_id)]
        except MooringError as err:
            log.info("the manager extension was not asked what it holds for this node", error=str(err))
            return False
        # A look-up that is under way has its place here before it asks for a grant.
        known = {(place.scope, place.folder) for place in self._folders}
        for item in held:
            vfid = VFolderID.parse(item.vfid)
            if (vfid.scope.hex, vfid.hex) not in known:
                self._ending.add(SessionID(item.session_id))
        return True

    async def _end_grants(self) -> None:
        """Tells the manager extension what ended; what it does not hear now it hears later."""
        for session in list(self._ending):
            try:
                async with asyncio.timeout(_END_SECONDS):
                    await self._manager.end_node_folder(self._agent_id, session)
            except Forbidden as err:
                log.warning("a grant could not be ended", session=session, error=str(err))
            except (MooringError, TimeoutError) as err:
                log.info("the end of a grant is told later", session=session, error=str(err))
                return
            self._ending.discard(session)

    # --- repair -------------------------------------------------------------------------------------------------------

    async def _freshen(self, folder: _Folder, stack: list[MountEntry]) -> None:
        """Shows at the place what its session bind shows. Propagation does that when a mount is repaired; here is what
        it missed, as when the session bind itself was made anew.
        """
        found = self._attachment(folder)
        if found is None:
            return
        item, plan = found
        entry = self._attachments.entry(item.key)
        if entry is None or entry.record is None or entry.record.state is not MountState.LIVE:
            return
        device = entry.record.device
        if any(layer.device == device for layer in stack):
            return
        source = Path(self._attachments.spec(item, plan).source)
        tree = self._trees[folder.place.root]

        def work() -> bool:
            top = top_at(source)
            if top is None or top.device != device:
                return False  # the bind itself is behind: first things first
            tree.mount_leaf(folder.place, source)
            return True

        if await off_loop("the mount of a folder", _KERNEL_SECONDS, work):
            log.info("folder shown anew", place=str(folder.place), key=item.key)


def _expire(autofs: Autofs, point: Point, unused_for: float) -> bool:
    fd = autofs.open(point.path, point.device)
    try:
        return autofs.expire(fd, unused_for)
    finally:
        os.close(fd)


def _prune(tree: Tree) -> None:
    for names in tree.empty_points():
        tree.prune(names)
