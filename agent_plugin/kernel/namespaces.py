"""Who really holds a bind: the mount tables of other mount namespaces, read from /proc.

A container is a mount namespace with processes in it, whatever runtime made it, so asking the kernel works alike for
podman, Docker, containerd, systemd units and `unshare`. What cannot be seen this way: a namespace without a process
(kept by a descriptor or a bind of its file), and one that only a thread is in. Nothing here touches a mount point.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .mountinfo import MountEntry, parse_line, tops

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Holder:
    """A foreign mount namespace with a mount of a wanted device.

    `pid` and `started` (clock ticks after boot) name its oldest process; paths are as that process sees them.
    """

    namespace: int  # inode of its file in /proc/PID/ns
    pid: int
    started: int
    entries: tuple[MountEntry, ...]  # of the wanted devices
    # Everything mounted at the mount points of `entries`: what is on top of them decides what is seen.
    stacks: tuple[MountEntry, ...] = field(repr=False)

    def seen(self) -> list[MountEntry]:
        """Those `entries` that no other mount covers."""
        own = {entry.mount_id for entry in self.entries}
        return [top for top in tops(self.stacks).values() if top.mount_id in own]


def holders(devices: Collection[str]) -> list[Holder]:
    """Every other mount namespace with a mount of one of these devices ("major:minor"), oldest process first.

    Costs one readlink per process of the host and one read per namespace. Processes that end meanwhile, and those that
    we may not look at, are passed over. Slow for the loop: call it with `off_loop`.
    """
    wanted = frozenset(devices)
    if not wanted:
        return []
    found = []
    for namespace, pids in _members().items():
        # A process that ends between two reads must not hide its namespace: try the next oldest.
        for started, pid in sorted(pids):
            held = _held(pid, wanted)
            if held is None:
                continue
            entries = tuple(entry for entry in held if entry.device in wanted)
            if entries:
                found.append(Holder(namespace, pid, started, entries, tuple(held)))
            break
    return sorted(found, key=lambda holder: holder.started)


def _members() -> dict[int, list[tuple[int, int]]]:
    """Start time and pid of every process, by mount namespace; without our own namespace."""
    own = _namespace("self")
    members: dict[int, list[tuple[int, int]]] = {}
    for pid in _pids():
        namespace = _namespace(str(pid))
        if namespace in (None, own):
            continue
        started = start_time(pid)
        if started is not None and namespace is not None:
            members.setdefault(namespace, []).append((started, pid))
    return members


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir(PROC) if name.isdigit())


def _namespace(pid: str) -> int | None:
    """None for a process that is gone, a zombie, or not to be looked at."""
    try:
        text = os.readlink(f"{PROC}/{pid}/ns/mnt")  # noqa: PTH115 - as above
    except OSError:
        return None
    return int(text.removeprefix("mnt:[").removesuffix("]"))


def start_time(pid: int) -> int | None:
    """Clock ticks between boot and the start of a process, field 22 of proc(5) stat; None if it has ended."""
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name in parentheses may itself hold spaces and parentheses.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def _held(pid: int, wanted: frozenset[str]) -> list[MountEntry] | None:
    """All mounts at the mount points of wanted devices; None if the table cannot be read.

    Tables of several hundred mounts are mostly of others: only lines that matter are parsed.
    """
    try:
        text = (PROC / str(pid) / "mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    if not text:  # its process has just ended: no namespace is without a root
        return None
    lines = [(line, line.split(" ", 5)) for line in text.split("\n") if line]
    points = {fields[4] for _, fields in lines if fields[2] in wanted}
    return [parse_line(line) for line, fields in lines if fields[4] in points]
