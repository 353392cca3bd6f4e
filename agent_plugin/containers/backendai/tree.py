"""The directories of one volume on this node: automount points for its inner levels, mounts of folders at its leaves.

    PATH                        automount point, shared: what is mounted below reaches a runtime's half-made container
    PATH/SCOPE                  automount point, as are
    PATH/SCOPE/aa, .../aa/bb      these two: a name that is not there yet must be asked for at each level
    PATH/SCOPE/aa/bb/REST       the folder: a copy of its session bind

A copy of a session bind is a slave of it, so a mount that is stacked on the bind by a repair arrives here by itself.

All methods make mount calls: run them off the loop. None waits for the automounter, since this process is exempt.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path

from storage_proxy.core.errors import ConfigError, Conflict, MountError
from storage_proxy.core.logs import get_logger

from ...kernel import (
    MountEntry,
    Propagation,
    clone_tree,
    entries_at,
    entries_below,
    move_mount,
    set_mount,
    set_propagation,
    top_at,
    unmount,
)
from ...kernel.autofs import Autofs, encoded
from ...layout import not_permitted, unmount_one
from .places import LEAF_LEVEL, FolderPlace, valid_name

log = get_logger(__name__)

SOURCE = "mooring"
_MAX_UNMOUNTS = 100_000
# Inner directories of one volume; more than a node with all its mounts in use needs, and less than harms the kernel.
MAX_POINTS = 4096
# What was looked up in so short a time is not released: who did it may not have run since, on a busy host, or be about
# to bind it.
YOUNG_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Point:
    """One automount point: an inner directory, the root included. `names` lead to it from the root; `made` in monotonic
    seconds.
    """

    tree: Tree
    names: tuple[str, ...]
    device: str
    made: float

    @property
    def path(self) -> Path:
        return self.tree.path.joinpath(*self.names)

    @property
    def level(self) -> int:
        """Of the names in it."""
        return len(self.names)


class Tree:
    """One volume. `points` maps the kernel's number of each automount point to it."""

    def __init__(self, name: str, path: Path, autofs: Autofs) -> None:
        self.name = name
        self.path = path
        self._autofs = autofs
        self._lock: int | None = None
        self.points: dict[int, Point] = {}

    def leaf(self, place: FolderPlace) -> Path:
        return place.below(self.path)

    # --- the whole ----------------------------------------------------------------------------------------------------

    def prepare(self) -> int:
        """Makes the root, or takes over what a former agent left. Returns how many inner points were taken over.

        Raises `ConfigError` for a path that is not usable, `Conflict` if another agent serves it, `MountNotPermitted`.
        """
        try:
            self.path.mkdir(mode=0o755, parents=True, exist_ok=True)
            self.path = self.path.resolve()  # the kernel's table has real paths
            top = top_at(self.path)
            if top is None:
                if any(self.path.iterdir()):
                    raise ConfigError(
                        f"The directory {self.path} of [backend-ai.root.{self.name}] is not empty.",
                        hint="Its content would be hidden: move it away, or set another path.",
                    )
                self._autofs.mount(SOURCE, self.path)
                made = top_at(self.path)
                if made is not None and not made.is_shared:  # where the host's own mounts are not shared
                    set_propagation(self.path, Propagation.SHARED)
                self._take_lock()
                self._know(self.path, ())
                return 0
            if (top.fstype, top.source) != ("autofs", SOURCE):
                raise ConfigError(
                    f"Something else ({top.fstype}) is mounted at {self.path} of [backend-ai.root.{self.name}].",
                    hint="Unmount it, or set another path.",
                )
            self._take_lock()
            return self._take_over()
        except PermissionError as err:
            raise not_permitted(err) from None
        except OSError as err:
            raise ConfigError(
                f"The path {self.path} of [backend-ai.root.{self.name}] cannot be served: {err.strerror}.",
                hint="Check the path, or set another one.",
            ) from None

    def _take_lock(self) -> None:
        """Two agents on one path would answer each other's questions."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise Conflict(
                f"Another agent serves {self.path}.", hint="Stop it, or give each agent paths of its own."
            ) from None
        self._lock = fd

    def _take_over(self) -> int:
        for entry in self._entries():
            if (entry.fstype, entry.source) == ("autofs", SOURCE):
                names = Path(entry.mount_point).relative_to(self.path).parts
                fd = self._autofs.open(Path(entry.mount_point), entry.device)
                try:
                    self._autofs.take_over(fd)
                finally:
                    os.close(fd)
                self.points[encoded(entry.device)] = Point(self, names, entry.device, time.monotonic())
        return len(self.points) - 1

    def silence(self) -> None:
        """Ends the asking, also for who waits now; what is mounted stays."""
        for point in list(self.points.values()):
            with contextlib.suppress(OSError):
                fd = self._autofs.open(point.path, point.device)
                try:
                    self._autofs.silence(fd)
                finally:
                    os.close(fd)

    def leave(self) -> None:
        """Lets another agent have the path; what is mounted goes on meanwhile."""
        self.silence()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def clean(self) -> None:
        """Unmounts what a killed agent left, if nobody serves it. Raises `Conflict` if somebody does."""
        top = top_at(self.path.resolve())
        if top is None or (top.fstype, top.source) != ("autofs", SOURCE):
            return
        self.path = self.path.resolve()
        self._take_lock()
        self._take_over()
        self.tear_down()

    def tear_down(self) -> None:
        """Unmounts everything, the root included. Idempotent."""
        self.silence()
        self._release()
        for _ in range(_MAX_UNMOUNTS):
            entries = self._entries()
            if not entries:
                break
            unmount_one(Path(entries[-1].mount_point))
        self.points.clear()

    def _entries(self) -> list[MountEntry]:
        return entries_below(self.path)

    # --- inner directories --------------------------------------------------------------------------------------------

    def _know(self, path: Path, names: tuple[str, ...]) -> Point:
        top = top_at(path)
        if top is None or top.fstype != "autofs":
            raise MountError(f"No automount point appeared at {path}.", hint="Look at the kernel log.")
        point = Point(self, names, top.device, time.monotonic())
        self.points[encoded(point.device)] = point
        return point

    def add_point(self, parent: Point, name: str) -> Point:
        """Makes an inner directory. Raises `MountError` if there are too many."""
        if len(self.points) >= MAX_POINTS:
            raise MountError(
                f"Volume {self.name!r} has {len(self.points)} directories on this node.", hint="Wait; idle ones go."
            )
        path = parent.path / name
        with self._autofs.changes:
            path.mkdir(mode=0o755, exist_ok=True)
            if not entries_at(path):
                self._autofs.mount(SOURCE, path)
            return self._know(path, (*parent.names, name))

    def prune(self, names: tuple[str, ...]) -> None:
        """Removes the inner directories that lead to `names` and are empty, from the innermost on. One that somebody
        uses or waits in stays, and a new one: who asked for it may not have run since.
        """
        with self._autofs.changes:
            self._prune(names)

    def _prune(self, names: tuple[str, ...]) -> None:
        for length in range(len(names), 0, -1):
            path = self.path.joinpath(*names[:length])
            found = [(n, point) for n, point in self.points.items() if point.names == names[:length]]
            if not found:
                continue
            device, point = found[0]
            if time.monotonic() - point.made < YOUNG_SECONDS or any(path.iterdir()):
                return
            try:
                unmount(path)
            except OSError:  # busy
                return
            self.points.pop(device)
            with contextlib.suppress(OSError):
                path.rmdir()

    def empty_points(self) -> list[tuple[str, ...]]:
        """Names of the innermost directories in which nothing is, as look-ups of unknown folders leave them."""
        return [point.names for point in list(self.points.values()) if point.names and not any(point.path.iterdir())]

    # --- folders ------------------------------------------------------------------------------------------------------

    def mount_leaf(self, place: FolderPlace, source: Path) -> None:
        """Puts a copy of the session bind `source` at the folder's place, on top of what is there.

        Raises `MountError` if it cannot be put there; then the directory is gone again.
        """
        path = self.leaf(place)
        created = False
        try:
            # No question whether it exists: that would be put to a mount which is there already, and may be frozen.
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o755)
                created = True
            tree = clone_tree(source)
            try:
                set_mount(tree, propagation=Propagation.SLAVE)
                move_mount(tree, path)
            finally:
                os.close(tree)
        except OSError as err:
            if created:
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise MountError(f"Folder {place} could not be put in place: {err.strerror}.", hint="Try again.") from None

    def unmount_leaf(self, place: FolderPlace, *, force: bool = False) -> bool:
        """Takes the folder's mounts away. False, with nothing changed, if a process of this host uses it and `force`
        is not set. Its directory stays until `forget_leaf`.
        """
        path = self.leaf(place)
        count = len(entries_at(path))
        for number in range(count):
            try:
                unmount(path)
            except OSError as err:
                if err.errno != errno.EBUSY:
                    raise MountError(f"Folder {place} could not be unmounted: {err.strerror}.") from None
                # Below the top there are only dead ones, which nobody can begin to use.
                if number == 0 and not force:
                    return False
                unmount(path, lazy=True)
        return True

    def forget_leaf(self, place: FolderPlace) -> None:
        """Removes the directory of an unmounted folder and what leads to nothing else any more."""
        if entries_at(self.leaf(place)):
            return
        with contextlib.suppress(OSError):
            self.leaf(place).rmdir()
        self.prune(place.names[:-1])

    def leaves(self) -> dict[FolderPlace, list[MountEntry]]:
        """What is mounted at the places of folders, each with its stack, oldest first."""
        found: dict[FolderPlace, list[MountEntry]] = {}
        for entry in self._entries():
            if (entry.fstype, entry.source) == ("autofs", SOURCE):
                continue
            names = Path(entry.mount_point).relative_to(self.path).parts
            if len(names) == LEAF_LEVEL + 1 and all(
                valid_name(level, os.fsencode(name)) for level, name in enumerate(names)
            ):
                found.setdefault(FolderPlace.of(self.name, names), []).append(entry)
        return found
