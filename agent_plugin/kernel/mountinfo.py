"""The kernel mount table, `/proc/self/mountinfo`: the only way to ask about a mount without touching it.

`os.path.ismount`, `mountpoint(1)` and `df` stat the mount point, so they lie about a dead FUSE mount and hang on a
frozen one. The format is that of proc(5); white space and backslashes in paths are written as octal escapes (`\\040`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")
_REMEMBERED = 4096  # lines: more than the table of a node with its full number of mounts


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line. Several entries may share a `mount_point`: they are stacked (see `top_at`)."""

    mount_id: int
    parent_id: int
    device: str  # "major:minor"; the minor of a FUSE mount is its connection number
    root: str
    mount_point: str
    options: tuple[str, ...]
    tags: tuple[str, ...]  # "shared:N", "master:N", "propagate_from:N", "unbindable"
    fstype: str
    source: str
    super_options: tuple[str, ...]

    @property
    def is_shared(self) -> bool:
        return any(tag.startswith("shared:") for tag in self.tags)

    @property
    def is_fuse(self) -> bool:
        return self.fstype == "fuse" or self.fstype.startswith("fuse.")

    @property
    def read_only(self) -> bool:
        """True if the mount or its superblock refuses writes."""
        return "ro" in self.options or "ro" in self.super_options

    @property
    def connection(self) -> int:
        """The number of a FUSE connection below the control file system."""
        return int(self.device.partition(":")[2])


def unescape(text: str) -> str:
    """Undoes the kernel's octal escapes, byte by byte: a path is bytes, shown here as Python shows file names."""
    if "\\" not in text:
        return text
    raw = text.encode("utf-8", "surrogateescape")
    plain = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8) & 0xFF]), raw)
    return plain.decode("utf-8", "surrogateescape")


def escape(text: str) -> str:
    """What the kernel writes for a path: the reverse of `unescape`."""
    return _SPECIAL.sub(lambda match: f"\\{ord(match[0]):03o}", text)


_SPECIAL = re.compile(r"[ \t\n\\#]")


# The table is read several times per attach and at every change, and nearly all of its lines were there the last time.
@lru_cache(_REMEMBERED)
def parse_line(line: str) -> MountEntry:
    """Raises ValueError for a line that is not one of mountinfo."""
    left, sep, right = line.rstrip("\n").partition(" - ")
    fields = left.split(" ")
    rest = right.split(" ")
    if not sep or len(fields) < 6 or len(rest) < 3:
        raise ValueError(f"not a mountinfo line: {line[:200]!r}")
    return MountEntry(
        mount_id=int(fields[0]),
        parent_id=int(fields[1]),
        device=fields[2],
        root=unescape(fields[3]),
        mount_point=unescape(fields[4]),
        options=tuple(fields[5].split(",")),
        tags=tuple(fields[6:]),
        fstype=rest[0],
        source=unescape(rest[1]),
        super_options=tuple(rest[2].split(",")),
    )


def parse_mountinfo(text: str) -> list[MountEntry]:
    return [parse_line(line) for line in text.split("\n") if line]


def read_mountinfo() -> list[MountEntry]:
    """Every mount of this mount namespace, in the order they were made. Reads only /proc; never blocks on a mount."""
    # A path may hold bytes that are not UTF-8.
    return parse_mountinfo(MOUNTINFO.read_text(encoding="utf-8", errors="surrogateescape"))


def entries_at(path: Path | str, table: Iterable[MountEntry] | None = None) -> list[MountEntry]:
    """What is mounted at exactly `path`: a stack, in no promised order (see `top_at`)."""
    text = str(path)
    return [entry for entry in (read_mountinfo() if table is None else table) if entry.mount_point == text]


def top_at(path: Path | str, table: Iterable[MountEntry] | None = None) -> MountEntry | None:
    """The mount that is seen at `path`: the one of its stack that no other is mounted on. None if nothing is
    mounted.
    """
    stack = entries_at(path, table)
    covered = {entry.parent_id for entry in stack}
    return next((entry for entry in reversed(stack) if entry.mount_id not in covered), None)


def tops(table: Iterable[MountEntry]) -> dict[str, MountEntry]:
    """What is seen at each mount point of a table: `top_at` for all of them at once."""
    stacks: dict[str, list[MountEntry]] = {}
    for entry in table:
        stacks.setdefault(entry.mount_point, []).append(entry)
    found: dict[str, MountEntry] = {}
    for point, stack in stacks.items():
        top = stack[0] if len(stack) == 1 else top_at(point, stack)
        if top is not None:
            found[point] = top
    return found


def entries_below(path: Path | str, table: Iterable[MountEntry] | None = None) -> list[MountEntry]:
    """What is mounted at `path` or below it, in the order of mounting."""
    text = str(path)
    prefix = text.rstrip("/") + "/"
    return [
        entry
        for entry in (read_mountinfo() if table is None else table)
        if entry.mount_point == text or entry.mount_point.startswith(prefix)
    ]
