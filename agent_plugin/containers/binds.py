"""Session binds: the directory that a container runtime is told to bind.

Each is a bind of the pooled mount with a peer group of its own, so that it can be replaced on its own, by stacking,
while containers hold it. Read-only is said three times: by the superblock of the mount (the only one that holds against
a runtime that remounts), by this bind, and in the bind spec.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from storage_proxy.core.errors import MountError, MountFailed
from storage_proxy.core.ids import AccessMode, MountKey, SessionID, VFolderID
from storage_proxy.core.wire import BindSpec

from ..kernel import Attribute, Propagation, clone_tree, entries_at, move_mount, set_mount, top_at
from ..layout import Layout, unmount_stack


class Binds:
    """Makes and removes session binds. All methods make mount calls: run them off the loop."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def make(self, key: MountKey, session: SessionID, vfid: VFolderID, mode: AccessMode) -> Path:
        """Binds the mount of `key` for a session, on top of what is there. Returns the source for the runtime.

        Raises `MountFailed` if the bind would not recover from a crash (its mount is not shared).
        """
        source = self._layout.pooled(key)
        place = self._layout.bind(session, vfid)
        if not any(entry.is_fuse for entry in entries_at(source)):
            raise MountFailed(f"Nothing is mounted at {source}.", hint="Attach again.")
        place.mkdir(mode=0o755, parents=True, exist_ok=True)
        tree = clone_tree(source)
        try:
            # Private first: a clone is born into the peer group of the pooled mount.
            set_mount(tree, propagation=Propagation.PRIVATE)
            if mode is AccessMode.READ_ONLY:
                set_mount(tree, attributes=Attribute.RDONLY)
            set_mount(tree, propagation=Propagation.SHARED)
            move_mount(tree, place)
        except OSError as err:
            raise MountError(
                f"The folder could not be bound for session {session}: {err.strerror}.", hint="Try again."
            ) from None
        finally:
            os.close(tree)
        self.check(place)
        return place

    def check(self, place: Path) -> None:
        """Raises `MountFailed` unless what is seen at `place` is a shared FUSE mount. Podman would take a private one
        too, and its container could never be repaired.
        """
        top = top_at(place)
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
