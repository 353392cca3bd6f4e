"""The agent's place in the file system, and who may see what of it.

    RUNTIME.lock          held while an agent uses this place
    RUNTIME/              tmpfs made by the agent, 0700, shared: what is mounted below reaches containers bound with
    rslave
      agent.sock          the API
      stage/              tmpfs, 0700, private: every mount appears here first and is checked before anybody sees it
      pool/KEY/           one mount per key, moved here from the stage; a repaired one is stacked on its dead
      predecessor ses/SESSION/FOLDER/ one bind per attachment, a peer group of its own, so that it can be stacked on its
      own creds/              tmpfs, 0700, private: credential files
      log/                last words of mount processes
      fusectl/            our own view of the FUSE control file system

The agent does not trust the host's propagation: `/` is shared under systemd and private elsewhere, so the base is a
mount of its own, made private and then shared.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from storage_proxy.core.errors import ConfigError, Conflict, MountError, MountNotPermitted
from storage_proxy.core.ids import MountKey, SessionID, VFolderID

from .kernel import (
    MountEntry,
    MountFlag,
    Propagation,
    entries_at,
    entries_below,
    mount,
    read_mountinfo,
    set_propagation,
    top_at,
    unmount,
)
from .kernel import fusectl as _fusectl

_QUIET = MountFlag.NOSUID | MountFlag.NODEV | MountFlag.NOEXEC
_SOURCE = "mooring"
_MAX_UNMOUNTS = 100_000  # more than any table; ends a loop on a mount that does not go


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths below one runtime directory. `prepare` makes them, `tear_down` removes every trace."""

    runtime: Path

    @property
    def lock_file(self) -> Path:
        return self.runtime.with_name(f"{self.runtime.name}.lock")

    @property
    def stage(self) -> Path:
        return self.runtime / "stage"

    @property
    def pool(self) -> Path:
        return self.runtime / "pool"

    @property
    def sessions(self) -> Path:
        return self.runtime / "ses"

    @property
    def creds(self) -> Path:
        return self.runtime / "creds"

    @property
    def logs(self) -> Path:
        return self.runtime / "log"

    @property
    def fusectl(self) -> Path:
        return self.runtime / "fusectl"

    def staged(self, token: str) -> Path:
        """`token` is new for every start of a mount process: a process that ends late unmounts only what was its
        own.
        """
        return self.stage / token

    def pooled(self, key: MountKey) -> Path:
        return self.pool / key

    def bind(self, session: SessionID, vfid: VFolderID) -> Path:
        return self.sessions / session / vfid.hex

    def credential(self, key: MountKey) -> Path:
        """One per key: it outlives a mount process, for the one that comes after it."""
        return self.creds / key

    def log(self, token: str) -> Path:
        return self.logs / token

    def lock(self) -> int:
        """Takes the place for this process until it ends, however it ends. Raises `Conflict` if another agent has
        it.
        """
        while True:
            try:
                self.runtime.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                fd = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as err:
                raise ConfigError(
                    f"The lock file {self.lock_file} cannot be made: {err.strerror}.", hint="Set another runtime-dir."
                ) from None
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(fd, 20, 0).decode(errors="replace").strip() or "unknown"
                os.close(fd)
                raise Conflict(
                    f"Another agent (pid {owner}) uses {self.runtime}.", hint="Stop it, or set another runtime-dir."
                ) from None
            with contextlib.suppress(FileNotFoundError):
                if self.lock_file.stat().st_ino == os.fstat(fd).st_ino:
                    os.truncate(fd, 0)
                    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                    return fd
            os.close(fd)  # its last owner removed the file between our open and our lock: once more

    def make_runtime(self) -> None:
        """The empty directory for the base. Raises `ConfigError` if it is not usable or holds what is not ours."""
        try:
            self.runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
            top = top_at(self.runtime)
            if top is not None and not is_base(top):
                raise ConfigError(
                    f"Something else ({top.fstype}) is mounted at the runtime directory {self.runtime}.",
                    hint="Unmount it, or set another runtime-dir.",
                )
            if top is None:
                if any(self.runtime.iterdir()):
                    raise ConfigError(
                        f"The runtime directory {self.runtime} is not empty.",
                        hint="It must belong to the agent alone: empty it, or set another runtime-dir.",
                    )
                self.runtime.chmod(0o700)
        except OSError as err:
            raise ConfigError(
                f"The runtime directory {self.runtime} cannot be made: {err.strerror}.", hint="Set another runtime-dir."
            ) from None

    def prepare(self) -> None:
        """Makes what is missing; what a former agent left is kept. Raises `MountNotPermitted` without the right to
        mount.
        """
        table = read_mountinfo()
        try:
            if not entries_at(self.runtime, table):
                mount(_SOURCE, self.runtime, "tmpfs", _QUIET, "mode=0700,size=64m")
                set_propagation(self.runtime, Propagation.PRIVATE)
                set_propagation(self.runtime, Propagation.SHARED)
            for private in (self.stage, self.creds):
                if not entries_at(private, table):
                    private.mkdir(mode=0o700, exist_ok=True)
                    mount(_SOURCE, private, "tmpfs", _QUIET, "mode=0700,size=16m")
                set_propagation(private, Propagation.PRIVATE)
            for plain in (self.pool, self.sessions, self.logs):
                plain.mkdir(mode=0o700, exist_ok=True)
            _fusectl.ensure_mounted(self.fusectl)
        except PermissionError as err:
            raise not_permitted(err) from None
        except OSError as err:
            raise MountError(
                f"The agent cannot make its mount base at {self.runtime}: {err.strerror}.",
                hint="Check the runtime-dir.",
            ) from None

    def keep_stage_private(self) -> None:
        """Somebody may have made all mounts of the host shared (`mount --make-rshared /`): then what is staged would
        appear elsewhere, and the kernel refuses to move it into the pool (EINVAL). One system call if all is well.
        """
        set_propagation(self.stage, Propagation.PRIVATE)

    def mounts(self) -> list[MountEntry]:
        """The base and everything mounted below it, in the order of mounting."""
        return entries_below(self.runtime)

    def unmount_all(self, below: Path) -> int:
        """Unmounts everything at or below a path, stacked ones as often as they are there. Returns how many."""
        count = 0
        for _ in range(_MAX_UNMOUNTS):
            entries = entries_below(below)
            if not entries:
                break
            unmount_one(Path(entries[-1].mount_point))
            count += 1
        return count

    def tear_down(self) -> int:
        """Removes every mount and the directory. Returns the number of FUSE mounts and binds that were ended.

        The base is a tmpfs: with it go all directories, logs and the socket. Idempotent.
        """
        leftovers = sum(entry.is_fuse for entry in self.mounts())
        self.unmount_all(self.runtime)
        with contextlib.suppress(OSError):
            self.runtime.rmdir()
        return leftovers

    def unlock(self, fd: int) -> None:
        """Gives the place back. The file goes first, so nobody takes a lock on a file that is about to vanish."""
        self.lock_file.unlink(missing_ok=True)
        os.close(fd)


def is_base(entry: MountEntry) -> bool:
    """True for the file systems that an agent made for itself."""
    return entry.fstype == "tmpfs" and entry.source == _SOURCE


def unmount_one(path: Path) -> bool:
    """Takes off the topmost mount at `path`; lazily if something still uses it. True if that was needed."""
    try:
        unmount(path)
    except OSError as err:
        if err.errno != errno.EBUSY:
            raise
        unmount(path, lazy=True)
        return True
    return False


def unmount_stack(path: Path) -> int:
    """Takes off everything mounted at exactly `path`. Returns how many there were."""
    count = 0
    for _ in entries_at(path):
        with contextlib.suppress(OSError):
            unmount_one(path)
        count += 1
    return count


def not_permitted(err: OSError) -> MountNotPermitted:
    return MountNotPermitted(
        f"This process may not mount ({os.strerror(err.errno or errno.EPERM)}).",
        hint="Run it as root, with CAP_SYS_ADMIN, and in a container as a privileged one.",
    )
