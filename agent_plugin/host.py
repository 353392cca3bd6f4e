"""What a host must offer before anything is mounted on it. Each check raises with the cause and the remedy."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from storage_proxy.core.errors import MountNotPermitted

_FUSE = Path("/dev/fuse")
_CAP_SYS_ADMIN = 21


def check_fuse(device: Path = _FUSE) -> None:
    """Raises `MountNotPermitted` unless `device` is a FUSE device that this process may open."""
    try:
        if not stat.S_ISCHR(device.stat().st_mode):
            raise FileNotFoundError
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise MountNotPermitted(
            f"There is no {device} on this machine.",
            hint="Load the module (modprobe fuse); in a container add --device /dev/fuse.",
        ) from None
    except OSError as err:
        remedy = {errno.ENODEV: "Load the kernel module: modprobe fuse.", errno.ENXIO: "Load it: modprobe fuse."}
        raise MountNotPermitted(
            f"{device} cannot be opened: {err.strerror}.", hint=remedy.get(err.errno or 0, "Run as root.")
        ) from None


def check_capability(status: Path = Path("/proc/self/status")) -> None:
    """Raises `MountNotPermitted` without CAP_SYS_ADMIN."""
    for line in status.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff" and not int(value, 16) >> _CAP_SYS_ADMIN & 1:
            raise MountNotPermitted(
                "This process has no right to mount (CAP_SYS_ADMIN is missing).",
                hint="Run it as root; in a container add --cap-add SYS_ADMIN --device /dev/fuse.",
            )


def check_host() -> None:
    check_capability()
    check_fuse()
