"""The FUSE control file system: freeing callers of a mount whose process hangs.

A process that waits for an answer of a hung FUSE daemon cannot be killed. Writing to `abort` of the connection (its
number is the minor in mountinfo) ends every waiting call with ENOTCONN; the mount is dead afterwards.
"""

from __future__ import annotations

import os
from pathlib import Path

from .mountinfo import entries_at
from .syscalls import MountFlag, mount

SYSTEM = Path("/sys/fs/fuse/connections")


def ensure_mounted(own: Path) -> Path:
    """A place where the control file system can be seen: our own mount of it at `own`.

    The system's own may be absent, or be unmounted under us. All mounts of it show the same connections.
    """
    if not any(entry.fstype == "fusectl" for entry in entries_at(own)):
        own.mkdir(mode=0o700, exist_ok=True)
        mount("fusectl", own, "fusectl", MountFlag.NOSUID | MountFlag.NODEV | MountFlag.NOEXEC)
    return own


def abort(root: Path, connection: int) -> bool:
    """Ends the connection. False if it is gone already. Raises OSError if the kernel refuses."""
    try:
        (root / str(connection) / "abort").write_text("1")
    except FileNotFoundError:
        return False
    return True


def waiting(root: Path, connection: int) -> int | None:
    """Requests that callers wait for, whether the process has read them or not. None if the connection is gone.

    Reading it touches neither the mount nor its process.
    """
    try:
        fd = os.open(f"{root}/{connection}/waiting", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return int(os.read(fd, 32))
    except (OSError, ValueError):  # it went while we looked
        return None
    finally:
        os.close(fd)
