"""Things of the agent that belong to nothing it knows: processes, mounts, directories, credential files.

A start of a mount process leaves traces under its token (stage entry, log, scratch folder, the process itself), a key
leaves a pool entry and a credential file, an attachment a directory below its session. Whatever is there without being
known was left by a killed agent, by a failed removal, or put there by somebody else. Nothing here stats a mount point.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from storage_proxy.core.logs import get_logger

from .attachments import Attachments
from .credentials import wipe_credential
from .drivers import Drivers
from .kernel import MountEntry, read_mountinfo
from .layout import Layout, unmount_one
from .supervisor import MountProcess, ProcessID

log = get_logger(__name__)


class StrayKind(StrEnum):
    PROCESS = "process"
    MOUNT = "mount"
    CREDENTIAL = "credential"
    SCRATCH = "scratch"
    STAGE = "stage"
    POOL = "pool"
    LOG = "log"
    SESSION = "session"


@dataclass(frozen=True, slots=True)
class Stray:
    """`place`: its path, of a process its mount point. Equal if it is the same thing, not only at the same place."""

    kind: StrayKind
    place: Path
    process: ProcessID | None = None
    mount_id: int | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.process.pid if self.process else self.place}"


@dataclass(frozen=True, slots=True)
class Known:
    """What the agent knows: tokens of starts, keys of mounts, directories of attachments."""

    tokens: Collection[str] = frozenset()
    keys: Collection[str] = frozenset()
    binds: Collection[Path] = frozenset()

    @classmethod
    def to(cls, attachments: Attachments, layout: Layout) -> Known:
        """What the manager knows at this moment, attachments under way included."""
        mounts = attachments.mounts()
        return cls(
            tokens=attachments.tokens(),
            keys={record.key for record, _ in mounts},
            binds={layout.bind(item.session, item.vfid) for _, items in mounts for item in items},
        )

    def has(self, stray: Stray) -> bool:
        """True if it turns out to be known: it was looked for a moment ago."""
        name, place = stray.place.name, stray.place
        return name in self.tokens or name in self.keys or any(place in (bind, bind.parent) for bind in self.binds)


class Strays:
    """`scratch`: the directory with the mounts' temporary files."""

    def __init__(self, layout: Layout, drivers: Drivers, scratch: Path) -> None:
        self._layout = layout
        self._programs = frozenset(drivers.names)
        self._scratch = scratch

    def find(self, known: Known, table: list[MountEntry] | None = None) -> set[Stray]:
        """Everything without an owner. Reads directories of the agent and /proc; call it off the loop."""
        layout = self._layout
        table = read_mountinfo() if table is None else table
        found = {Stray(StrayKind.PROCESS, place, process) for process, place in self._processes(known.tokens)}
        found |= set(self._mounts(known, table))
        mounted = {entry.mount_point for entry in table}
        for kind, folder, names in (
            (StrayKind.CREDENTIAL, layout.creds, known.keys),
            (StrayKind.SCRATCH, self._scratch, known.tokens),
            (StrayKind.STAGE, layout.stage, known.tokens),
            (StrayKind.LOG, layout.logs, known.tokens),
            (StrayKind.POOL, layout.pool, known.keys),
        ):
            found |= {Stray(kind, folder / name) for name in names_in(folder) if name not in names}
        for session in names_in(layout.sessions):
            place = layout.sessions / session
            folders = [place / name for name in names_in(place)]
            found |= {Stray(StrayKind.SESSION, folder) for folder in folders if folder not in known.binds}
            if not folders:
                found.add(Stray(StrayKind.SESSION, place))
        # What is mounted goes first; the directory below it is a stray of the next look.
        return {stray for stray in found if stray.kind is StrayKind.MOUNT or str(stray.place) not in mounted}

    def processes(self, tokens: Collection[str]) -> list[ProcessID]:
        """Mount processes on our stage whose token is not one of these."""
        return [process for process, _ in self._processes(tokens)]

    def _processes(self, tokens: Collection[str]) -> list[tuple[ProcessID, Path]]:
        """Those whose pid was not written down in time, whose journal is lost, or that somebody else started.

        The mount point in their arguments names them: no other program has that directory in its command line.
        """
        found = []
        for name in names_in(Path("/proc")):
            if not name.isdigit():
                continue
            arguments = arguments_of(int(name))
            if not arguments or Path(arguments[0]).name not in self._programs:
                continue
            for place in map(Path, arguments):
                if place.parent == self._layout.stage and place.name not in tokens:
                    identity = ProcessID.of(int(name))
                    if identity is not None:
                        found.append((identity, place))
        return found

    def _mounts(self, known: Known, table: list[MountEntry]) -> list[Stray]:
        layout = self._layout
        found = []
        base = f"{layout.runtime}/"
        for entry in table:
            if not entry.mount_point.startswith(base):
                continue
            place = Path(entry.mount_point)
            if place.is_relative_to(layout.pool):
                mine = place.parent == layout.pool and place.name in known.keys
            elif place.is_relative_to(layout.sessions):
                mine = place in known.binds
            elif place != layout.stage and place.is_relative_to(layout.stage):
                mine = place.parent == layout.stage and place.name in known.tokens
            else:
                continue
            if not mine:
                found.append(Stray(StrayKind.MOUNT, place, mount_id=entry.mount_id))
        return found

    def remove_file(self, stray: Stray) -> bool:
        """Removes what is no process and no mount. At once, so that the loop may do it between two steps of others,
        but for scratch folders, which may be large: those off the loop. False if it stays, which is logged.
        """
        try:
            if stray.kind is StrayKind.CREDENTIAL:
                wipe_credential(stray.place)
            elif stray.kind is StrayKind.SCRATCH and stray.place.is_dir() and not stray.place.is_symlink():
                shutil.rmtree(stray.place)
            elif stray.place.is_dir() and not stray.place.is_symlink():
                stray.place.rmdir()
                if stray.kind is StrayKind.SESSION and stray.place.parent != self._layout.sessions:
                    with contextlib.suppress(OSError):  # not empty: another folder of the session
                        stray.place.parent.rmdir()
            else:
                stray.place.unlink(missing_ok=True)
        except FileNotFoundError:
            return True
        except OSError as err:
            log.info("left in place", path=str(stray.place), reason=err.strerror)
            return False
        return True

    def remove_files(self, strays: Collection[Stray]) -> list[Stray]:
        """`remove_file` for several; returns those that are gone."""
        return [stray for stray in strays if self.remove_file(stray)]

    def unmount(self, strays: Collection[Stray]) -> list[Stray]:
        """Takes off stray mounts, the latest first, if they still are what they were. Returns those that are gone. May
        hang: call it off the loop.
        """
        wanted = {stray.mount_id: stray for stray in strays}
        done = []
        for entry in reversed(read_mountinfo()):
            stray = wanted.get(entry.mount_id)
            if stray is None:
                continue
            try:
                unmount_one(Path(entry.mount_point))
            except OSError as err:
                log.info("left mounted", path=entry.mount_point, reason=err.strerror)
            else:
                done.append(stray)
        return done

    async def end(self, process: ProcessID) -> bool:
        """Ends a mount process, in the end by force. False if it stays, which is logged."""
        adopted = MountProcess.adopt(process, self._layout.logs / "none")
        if adopted is None or await adopted.stop(patience=1.0):
            return True
        adopted.let_go()
        log.error("a mount process that nobody knows does not end", pid=process.pid)
        return False


def arguments_of(pid: int) -> list[str]:
    """The command line of a process; empty if it is gone or a thread of the kernel."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(part) for part in raw.split(b"\0") if part]


def names_in(folder: Path) -> list[str]:
    """The names in a directory, none if it is not there; does not stat what they name, which may be a dead mount."""
    try:
        return os.listdir(folder)
    except OSError:
        return []
