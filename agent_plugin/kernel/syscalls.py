"""System calls that Python has no wrapper for, through ctypes. Each raises OSError with the errno and the path.

open_tree(2), move_mount(2) and mount_setattr(2) have the same number on every architecture. None of these functions
stats the mount it is given, so all work on dead and on frozen mounts; still they take kernel locks, so call them off
the loop.
"""

from __future__ import annotations

import ctypes
import os
from enum import IntEnum, IntFlag
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)

_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_MOUNT_SETATTR = 442

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_CLONE_NEWNS = 0x20000

_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_PR_SET_DUMPABLE = 4


class MountFlag(IntFlag):
    """Flags of mount(2)."""

    NONE = 0
    NOSUID = 2
    NODEV = 4
    NOEXEC = 8
    BIND = 4096
    UNBINDABLE = 1 << 17
    PRIVATE = 1 << 18
    SLAVE = 1 << 19
    SHARED = 1 << 20


class Propagation(IntEnum):
    """What a mount gives to, and takes from, its copies (mount_namespaces(7))."""

    PRIVATE = MountFlag.PRIVATE
    SHARED = MountFlag.SHARED
    SLAVE = MountFlag.SLAVE


class Attribute(IntFlag):
    """Attributes of one mount for mount_setattr(2)."""

    NONE = 0
    RDONLY = 1
    NOSUID = 2
    NODEV = 4
    NOEXEC = 8


class _MountAttr(ctypes.Structure):
    _fields_ = [
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    ]


def _check(result: int, where: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), where)
    return result


def mount(
    source: str, target: Path, fstype: str | None = None, flags: MountFlag = MountFlag.NONE, data: str | None = None
) -> None:
    """mount(2), for file systems of the kernel and for binds."""
    result = _LIBC.mount(
        os.fsencode(source),
        os.fsencode(target),
        fstype.encode() if fstype else None,
        ctypes.c_ulong(flags),
        data.encode() if data else None,
    )
    _check(result, str(target))


def unmount(target: Path, *, lazy: bool = False) -> None:
    """umount2(2) of the topmost mount at `target`. `lazy` takes it out of the tree now and ends it with its last
    user.
    """
    _check(_LIBC.umount2(os.fsencode(target), _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)), str(target))


def set_propagation(target: Path, propagation: Propagation) -> None:
    """mount --make-private, --make-shared or --make-slave."""
    mount("none", target, flags=MountFlag(propagation))


def clone_tree(source: Path) -> int:
    """A detached copy of the mount at `source` as a file descriptor; the caller closes it."""
    fd = _LIBC.syscall(
        _SYS_OPEN_TREE,
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(source)),
        ctypes.c_uint(_OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC),
    )
    return _check(fd, str(source))


def set_mount(tree: int, *, attributes: Attribute = Attribute.NONE, propagation: Propagation | None = None) -> None:
    """Adds attributes to, or changes the propagation of, a mount held by the descriptor `tree`."""
    attr = _MountAttr(attr_set=int(attributes), attr_clr=0, propagation=int(propagation or 0), userns_fd=0)
    result = _LIBC.syscall(
        _SYS_MOUNT_SETATTR,
        ctypes.c_int(tree),
        ctypes.c_char_p(b""),
        ctypes.c_uint(_AT_EMPTY_PATH),
        ctypes.byref(attr),
        ctypes.c_size_t(ctypes.sizeof(attr)),
    )
    _check(result, f"mount descriptor {tree}")


def move_mount(source: int | Path, target: int | Path) -> None:
    """Puts a detached tree (descriptor) or an attached mount (path) onto `target` (a path, or an O_PATH descriptor of
    the mount point), on top of whatever is there.
    """
    if isinstance(source, int):
        from_fd, from_path, flags = source, b"", _MOVE_MOUNT_F_EMPTY_PATH
    else:
        from_fd, from_path, flags = _AT_FDCWD, os.fsencode(source), 0
    if isinstance(target, int):
        to_fd, to_path, flags = target, b"", flags | _MOVE_MOUNT_T_EMPTY_PATH
    else:
        to_fd, to_path = _AT_FDCWD, os.fsencode(target)
    result = _LIBC.syscall(
        _SYS_MOVE_MOUNT,
        ctypes.c_int(from_fd),
        ctypes.c_char_p(from_path),
        ctypes.c_int(to_fd),
        ctypes.c_char_p(to_path),
        ctypes.c_uint(flags),
    )
    _check(result, str(target))


def enter_mount_namespace(pidfd: int) -> None:
    """Moves this process into the mount namespace of another one; root and working directory become the root of that
    namespace. The descriptor names the process, so none that got its pid later is entered.

    Only for a process with one thread that ends soon afterwards.
    """
    _check(_LIBC.setns(ctypes.c_int(pidfd), ctypes.c_int(_CLONE_NEWNS)), f"process descriptor {pidfd}")


def make_undumpable() -> None:
    """No core dump of this process and no ptrace by its user: its memory holds credentials."""
    _check(_LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")
