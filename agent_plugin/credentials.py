"""Credential files for mount processes: 0600, in a 0700 tmpfs, gone when the mount is gone."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from storage_proxy.core.errors import MountError, NoSpace
from storage_proxy.core.secrets import Secret


def write_credential(path: Path, content: Secret) -> None:
    """Makes or replaces the file at once, never through a symlink. On failure what was there stays."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as err:
        raise MountError(f"A credential file cannot be made: {err.strerror}.", hint="Check the runtime-dir.") from None
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content.reveal().encode())
        temporary.rename(path)
    except OSError as err:
        wipe_credential(temporary)
        raise NoSpace(f"A credential file cannot be written: {err.strerror}.", hint="Free space in /run.") from None


def read_credential(path: Path) -> Secret:
    """Raises `MountError` if it is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            return Secret(file.read().decode())
    except OSError as err:
        raise MountError(
            f"The credential of the mount cannot be read: {err.strerror}.", hint="Attach the folder again."
        ) from None


def wipe_credential(path: Path) -> None:
    """Overwrites and removes it. Idempotent; never follows a symlink."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.write(fd, b"\0" * os.fstat(fd).st_size)
        finally:
            os.close(fd)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def wipe_all(directory: Path) -> int:
    """Wipes every file of a directory; at start, for what a killed agent left. Returns how many."""
    count = 0
    with contextlib.suppress(FileNotFoundError):
        for path in directory.iterdir():
            wipe_credential(path)
            count += 1
    return count
