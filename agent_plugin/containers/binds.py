"""Session binds: the directory that a container runtime is told to bind.

Each is a bind of the pooled mount with a peer group of its own, so that it can be replaced on its own, by stacking,
while containers hold it. Read-only is said three times: by the superblock of the mount (the only one that holds against
a runtime that remounts), by this bind, and in the bind spec.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from storage_proxy.core.errors import MountError, MountFailed
from storage_proxy.core.ids import AccessMode, MountKey, SessionID, VFolderID
from storage_proxy.core.wire import BindSpec

from ..journal import AttachmentRecord, MountRecord
from ..kernel import (
    Attribute,
    MountEntry,
    Propagation,
    clone_tree,
    entries_at,
    move_mount,
    read_mountinfo,
    set_mount,
    top_at,
)
from ..layout import Layout, unmount_stack


class Binds:
    """Makes and removes session binds. All methods make mount calls: run them off the loop."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def make(self, key: MountKey, session: SessionID, vfid: VFolderID, mode: AccessMode) -> Path:
        """Binds the mount of `key` for a session, on top of what is there. Returns the source for the runtime.

        Raises `MountFailed` if the bind would not recover from a crash (its mount is not shared).
        """
        place = self._layout.bind(session, vfid)
        self._stack(key, place, mode)
        self.check(place)
        return place

    def _stack(self, key: MountKey, place: Path, mode: AccessMode) -> None:
        source = self._layout.pooled(key)
        table = read_mountinfo()
        if not any(entry.is_fuse for entry in entries_at(source, table)):
            raise MountFailed(f"Nothing is mounted at {source}.", hint="Attach again.")
        if not entries_at(place, table):  # a dead mount there answers neither mkdir nor stat
            place.mkdir(mode=0o755, parents=True, exist_ok=True)
        _put(source, place, read_only=mode is AccessMode.READ_ONLY, propagation=Propagation.SHARED)

    def restack(self, record: MountRecord, items: Sequence[AttachmentRecord]) -> int:
        """Puts the mount in the pool on top of the session binds that do not show it yet. Returns how many there were.

        Containers that hold them with propagation see it at once. Raises as `make` does, after all were tried.
        """
        table = read_mountinfo()
        places = [self._layout.bind(item.session, item.vfid) for item in items]
        behind = [place for place in places if (top := top_at(place, table)) is None or top.device != record.device]
        for place in behind:
            self._stack(record.key, place, record.plan.mode)
        if behind:
            table = read_mountinfo()
            for place in behind:
                self.check(place, table)
        return len(behind)

    def put_back(self, record: MountRecord, items: Sequence[AttachmentRecord]) -> bool:
        """Makes the pool show the mount of a key again, taken from a session bind. False if none shows it."""
        table = read_mountinfo()
        pooled = self._layout.pooled(record.key)
        for item in items:
            place = self._layout.bind(item.session, item.vfid)
            top = top_at(place, table)
            if top is not None and top.is_fuse and top.device == record.device:
                if not entries_at(pooled, table):
                    pooled.mkdir(mode=0o755, exist_ok=True)
                _put(place, pooled, read_only=False, propagation=Propagation.PRIVATE)
                return True
        return False

    def devices(self, items: Iterable[AttachmentRecord]) -> set[str]:
        """Every device in the stacks of these binds, the covered ones included."""
        places = {str(self._layout.bind(item.session, item.vfid)) for item in items}
        return {entry.device for entry in read_mountinfo() if entry.mount_point in places and entry.is_fuse}

    def check(self, place: Path, table: Sequence[MountEntry] | None = None) -> None:
        """Raises `MountFailed` unless what is seen at `place` is a shared FUSE mount. Podman would take a private one
        too, and its container could never be repaired.
        """
        top = top_at(place, table)
        if top is None or not top.is_fuse or not top.is_shared:
            raise MountFailed(
                f"The bind at {place} is not a shared mount.", hint="Restart the agent; it makes its mount base anew."
            )

    def exists(self, session: SessionID, vfid: VFolderID) -> bool:
        return bool(entries_at(self._layout.bind(session, vfid)))

    def remove(self, session: SessionID, vfid: VFolderID) -> None:
        """Takes the bind away, with everything stacked on it, and its directories. Idempotent.

        Containers that hold a copy keep it until they end.
        """
        place = self._layout.bind(session, vfid)
        unmount_stack(place)
        for directory in (place, place.parent):
            with contextlib.suppress(OSError):  # not empty: another folder of the session
                directory.rmdir()

    def spec(self, key: MountKey, session: SessionID, vfid: VFolderID, target: str, mode: AccessMode) -> BindSpec:
        return BindSpec(
            session_id=session,
            vfid=str(vfid),
            mount_key=key,
            source=str(self._layout.bind(session, vfid)),
            target=target,
            read_only=mode is AccessMode.READ_ONLY,
        )


def _put(source: Path, place: Path, *, read_only: bool, propagation: Propagation) -> None:
    """A clone of the mount at `source` onto `place`. Raises `MountError`."""
    try:
        tree = clone_tree(source)
        try:
            # Private first: a clone is born into the peer group of its source.
            set_mount(tree, propagation=Propagation.PRIVATE)
            if read_only:
                set_mount(tree, attributes=Attribute.RDONLY)
            set_mount(tree, propagation=propagation)
            move_mount(tree, place)
        finally:
            os.close(tree)
    except OSError as err:
        raise MountError(f"The folder could not be bound at {place}: {err.strerror}.", hint="Try again.") from None
