"""The kernel's automounter: directories whose missing names are asked for when somebody looks them up.

Protocol 5 of `linux/auto_fs.h` and `linux/auto_dev-ioctl.h`. The kernel writes one packet per missing name into a pipe
and lets the process that looked it up wait; whoever reads the pipe makes a directory of that name, mounts something on
it, and says so through `/dev/autofs` (`ready`), or says which error the look-up ends with (`fail`). What is mounted is
used without anybody in between.

Processes of the daemon's process group are let through without being asked about ("oz mode"), so the daemon cannot
wait for itself. When nobody holds the reading end of the pipe any more, the next look-up turns its mount catatonic:
all that wait get ENOENT, new names too, and what is mounted stays usable. `take_over` brings such a mount back to life.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from storage_proxy.core.errors import MountNotPermitted

from .syscalls import MountFlag, mount

DEVICE = Path("/dev/autofs")
_FILESYSTEMS = Path("/proc/filesystems")

# struct autofs_v5_packet: version, type, token, device, inode, uid, gid, pid, tgid, length, then the name.
_PACKET = struct.Struct("=iiIIQIIIII")
PACKET_BYTES = 304  # with the name (256 bytes) and the padding of 64-bit machines; 300 on others
# struct autofs_dev_ioctl: two versions, size, descriptor, then a union of 8 bytes, then perhaps a path.
_HEAD = struct.Struct("=IIIi")
_HEAD_BYTES = 24
_VERSION = (1, 1)


def _command(number: int) -> int:
    return (3 << 30) | (_HEAD_BYTES << 16) | (0x93 << 8) | number  # _IOWR(0x93, number, struct autofs_dev_ioctl)


_OPEN_MOUNT = _command(0x74)
_READY = _command(0x76)
_FAIL = _command(0x77)
_SET_PIPE = _command(0x78)
_CATATONIC = _command(0x79)
_TIMEOUT = _command(0x7A)
_EXPIRE = _command(0x7C)


class PacketType(IntEnum):
    """What the kernel asks of an indirect mount."""

    MISSING = 3
    EXPIRE = 4


@dataclass(frozen=True, slots=True)
class Packet:
    """One question. `device` names the mount (as the kernel encodes it), `token` the answer; `uid` is who asks."""

    type: int
    token: int
    device: int
    uid: int
    pid: int
    name: bytes

    @classmethod
    def parse(cls, data: bytes) -> Packet:
        """Raises ValueError for what no kernel of protocol 5 sends."""
        if len(data) < _PACKET.size:
            raise ValueError(f"{len(data)} bytes are no packet")
        version, kind, token, device, _, uid, _, pid, _, length = _PACKET.unpack_from(data)
        if version != 5 or length > len(data) - _PACKET.size:
            raise ValueError(f"version {version}, name of {length} bytes")
        return cls(kind, token, device, uid, pid, data[_PACKET.size : _PACKET.size + length])


def available() -> str | None:
    """Why this host has no automounter, as a sentence for an operator; None if it has one."""
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))  # where it is a module, this loads it
    except OSError as err:
        if err.errno in (errno.EACCES, errno.EPERM):
            return f"{DEVICE} may not be opened by this process."
        if DEVICE.exists() or "\tautofs\n" not in _FILESYSTEMS.read_text():
            return "The kernel of this host has no autofs; load it with `modprobe autofs4` (CONFIG_AUTOFS_FS)."
        return f"There is no {DEVICE} on this host; in a container add --device {DEVICE}."
    if "\tautofs\n" not in _FILESYSTEMS.read_text():
        return "The kernel of this host has no autofs; load it with `modprobe autofs4` (CONFIG_AUTOFS_FS)."
    return None


class Autofs:
    """The control device and the pipe that all mounts of one daemon share. `close` it at the end.

    Calls that name a path must not run on an event loop; the others end at once, except `expire`.
    """

    def __init__(self) -> None:
        """Raises `MountNotPermitted` if this host has no automounter or does not let this process use it."""
        if reason := available():
            raise MountNotPermitted(reason, hint="Without it no [backend-ai] root can be served.")
        self._device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        # Held while automount points come and go: the kernel gives the number of one that went to the next that comes.
        self.changes = threading.Lock()
        self.questions, self._answers = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.questions, False)

    def close(self) -> None:
        """Closes the pipe: mounts that still stand become catatonic at their next look-up."""
        for fd in (self.questions, self._answers, self._device):
            os.close(fd)

    def mount(self, source: str, target: Path) -> None:
        """Mounts a directory whose missing names are asked for. The process group of the caller is exempt."""
        options = f"fd={self._answers},pgrp={os.getpgrp()},minproto=5,maxproto=5,indirect"
        mount(source, target, "autofs", MountFlag.NOSUID | MountFlag.NODEV, options)

    def open(self, target: Path, device: str) -> int:
        """A descriptor of the mount `device` ("major:minor", as in the mount table) at `target`, for the calls below.
        The caller closes it. Works whatever is mounted on top.
        """
        fd = self._call(_OPEN_MOUNT, -1, encoded(device), path=target)
        os.set_inheritable(fd, False)
        return fd

    def take_over(self, mount_fd: int) -> None:
        """Makes a mount of a former daemon ask this one. Whoever waited for an answer of the former gets ENOENT."""
        self._call(_CATATONIC, mount_fd)
        self._call(_SET_PIPE, mount_fd, self._answers)

    def silence(self, mount_fd: int) -> None:
        """Nobody will be asked any more: missing names are ENOENT at once, also for those who wait."""
        self._call(_CATATONIC, mount_fd)

    def ready(self, mount_fd: int, token: int) -> None:
        self._call(_READY, mount_fd, token)

    def fail(self, mount_fd: int, token: int, number: int) -> None:
        """The look-up ends with the error `number` (an errno)."""
        self._call(_FAIL, mount_fd, token, -abs(number))

    def expire(self, mount_fd: int, unused_for: float) -> bool:
        """Lets the kernel choose a name that nobody uses, and that nobody looked up for so many seconds (1 at least),
        and asks about it by a packet; look-ups of it wait for the answer. Returns when that was given: True if it was
        `ready`, False if there was no such name or the answer was `fail`. Blocks: never call it where packets are read.
        """
        self._call(_TIMEOUT, mount_fd, max(1, round(unused_for)))
        try:
            self._call(_EXPIRE, mount_fd)
        except OSError as err:
            if err.errno in (errno.EAGAIN, errno.EBUSY, errno.ENOENT):
                return False
            raise
        return True

    def _call(self, command: int, mount_fd: int, first: int = 0, second: int = 0, *, path: Path | None = None) -> int:
        tail = b"" if path is None else os.fsencode(path) + b"\0"
        size = _HEAD_BYTES + len(tail)
        buffer = bytearray(_HEAD.pack(*_VERSION, size, mount_fd) + struct.pack("=Ii", first, second) + tail)
        fcntl.ioctl(self._device, command, buffer, True)
        return int(_HEAD.unpack_from(buffer)[3])


def encoded(device: str) -> int:
    """ "major:minor" as the kernel puts a device number into 32 bits (new_encode_dev)."""
    major, minor = (int(part) for part in device.split(":"))
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
