"""Where folders may be mounted inside a container."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from storage_proxy.core.errors import InvalidRequest

# Refused with everything below: the kernel's, the system's and the runtime's own places.
_SYSTEM_TREES = (
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/proc",
    "/run",
    "/sbin",
    "/sys",
    "/usr/bin",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/libexec",
    "/usr/libx32",
    "/usr/sbin",
    "/var/run",
)
# Refused themselves; a folder below them is fine.
_SYSTEM_DIRS = ("/usr", "/usr/local", "/var", "/var/lib")


def check_targets(targets: Sequence[str]) -> None:
    """`targets` are absolute and normal (`wire.TargetText`). Raises `InvalidRequest` for a system path, and for two
    targets of which one is, or lies inside, the other: the later mount would hide the earlier one."""
    for target in targets:
        if target in _SYSTEM_DIRS or any(_inside(target, tree) for tree in _SYSTEM_TREES):
            raise InvalidRequest(
                f"A folder cannot be mounted at {target!r}: it is part of the system.",
                hint="Choose a target such as /data or /home/work/NAME.",
                detail={"mounts": f"system path {target}"},
            )
    ordered = sorted(targets, key=lambda target: target.split("/"))
    for outer, inner in itertools.pairwise(ordered):
        if _inside(inner, outer):
            raise InvalidRequest(
                f"The targets {outer!r} and {inner!r} overlap.",
                hint="Give every folder of a session a place of its own.",
                detail={"mounts": f"{outer} and {inner} overlap"},
            )


def _inside(path: str, tree: str) -> bool:
    return path == tree or path.startswith(tree + "/")
