"""The mount calls of Linux: typed system calls, the mount table, connections of the FUSE control file system."""

from .mountinfo import MountEntry, entries_at, entries_below, read_mountinfo, top_at, tops
from .syscalls import (
    Attribute,
    MountFlag,
    Propagation,
    clone_tree,
    enter_mount_namespace,
    make_undumpable,
    mount,
    move_mount,
    set_mount,
    set_propagation,
    unmount,
)

__all__ = [
    "Attribute",
    "MountEntry",
    "MountFlag",
    "Propagation",
    "clone_tree",
    "enter_mount_namespace",
    "entries_at",
    "entries_below",
    "make_undumpable",
    "mount",
    "move_mount",
    "read_mountinfo",
    "set_mount",
    "set_propagation",
    "top_at",
    "tops",
    "unmount",
]
