"""What a stack may leave behind, found in the kernel's own tables and taken away: mounts, processes, credential files.

Used after a stop (must find nothing) and before a start (cleans what a killed stack left, even if its agent cannot
start any more). Only mounts below the stack's own runtime directory are touched, and only programs that a stack starts
and that name or work in its directories; a person's shell or editor there is left alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..core.logs import get_logger
from .process import start_time
from .state import StateDirectory

log = get_logger(__name__)

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
# What a stack starts, besides our own daemons.
_PROGRAMS = frozenset({"weed", "redis-server", "s3fs", "podman", "conmon", "runc", "crun", "unshare"})
_POLL_SECONDS = 0.05

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo, as far as it matters here."""

    mount_id: int
    device: str  # "major:minor"; for FUSE the minor names the connection
    path: str
    fs_type: str

    @property
    def is_fuse(self) -> bool:
        return self.fs_type == "fuse" or self.fs_type.startswith("fuse.")


def mounts_below(folder: Path) -> list[Mount]:
    """Mounts at or below `folder`, in the order they were made (so undo them from the end)."""
    prefix = str(folder).rstrip("/")  # of "/" nothing is left, and every mount is below
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            before, _, after = line.partition(" - ")
            fields = before.split(" ")
            path = _unescape(fields[4])
            if path == prefix or path.startswith(prefix + "/"):
                found.append(Mount(int(fields[0]), fields[2], path, after.split(" ", 1)[0]))
    return found


def _unescape(text: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


def _own_line() -> set[int]:
    """This process and its ancestors: they may name the state directory too (`mooring up --state DIR`)."""
    line, pid = set(), os.getpid()
    while pid > 1 and pid not in line:
        line.add(pid)
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            break
        pid = int(stat.rpartition(b")")[2].split()[1])
    return line


def processes_naming(*paths: Path) -> dict[int, str]:
    """pid -> program of a stack's programs that name one of `paths`, or something below it, or work there."""
    needles = [os.fsencode(path) for path in paths]
    own = _own_line()
    found: dict[int, str] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) in own:
            continue
        try:
            words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        program = os.fsdecode(words[0].split(b" ")[0].rpartition(b"/")[2])
        if program not in _PROGRAMS and not _is_ours(words):
            continue
        with contextlib.suppress(OSError):  # Redis overwrites its command line, but works in its folder
            words.append(os.fsencode(Path(f"/proc/{entry}/cwd").readlink()))
        if any(_names(word, needle) for word in words for needle in needles) and start_time(int(entry)) is not None:
            found[int(entry)] = program
    return found


def _is_ours(words: list[bytes]) -> bool:
    """A daemon of ours, or a session without a container runtime."""
    return (b"serve" in words and b"--config" in words) or any(word.endswith(b"/embedded/enter.py") for word in words)


def _names(word: bytes, needle: bytes) -> bool:
    """True if `word` holds the path `needle`, not just a longer name that begins like it (/state and /state2)."""
    at = word.find(needle)
    while at >= 0:
        after = word[at + len(needle) : at + len(needle) + 1]
        if after in (b"", b"/", b",", b":", b" "):
            return True
        at = word.find(needle, at + 1)
    return False


def stack_processes(state: StateDirectory) -> dict[int, str]:
    """What runs for a stack, whoever its parent is by now."""
    parts = (
        state.runtime_dir,
        state.config_dir,
        state.data_dir,
        state.secrets_dir,
        state.containers_dir,
        state.run_dir,
    )
    return processes_naming(*parts)


def session_processes(state: StateDirectory) -> dict[int, str]:
    """pid -> program of what runs in a session of this stack, in a container or a mount namespace.

    Its command line is the user's own, so its mount table tells: the root of a session is a directory of ours.
    """
    # A mount table counts its root field from the root of a file system; the directory's name alone is unique.
    below = os.fsencode(f"/{state.runtime_dir.name}/sessions/")
    ours = Path("/proc/self/ns/mnt").stat().st_ino
    found: dict[int, str] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):  # ended, or not ours to look at
            process = Path("/proc", entry)
            if (process / "ns/mnt").stat().st_ino == ours:
                continue
            for line in (process / "mountinfo").read_bytes().splitlines():
                fields = line.split(b" ", 5)
                if fields[4] == b"/" and below in fields[3]:
                    found[int(entry)] = os.fsdecode((process / "comm").read_bytes().strip())
    return found


def credential_files(state: StateDirectory) -> list[Path]:
    """Files below the runtime directory's credential folder, and generated configuration (both hold secrets)."""
    found: list[Path] = []
    for folder in (state.agent_runtime_dir / "creds", state.config_dir):
        for base, _, names in os.walk(folder):
            found += [Path(base) / name for name in names]
    return sorted(found)


def find(state: StateDirectory) -> list[str]:
    """One sentence for each thing that a stopped stack should not have left; empty is what we promise."""
    folders = (state.runtime_dir, state.containers_dir, state.run_dir)
    result = [f"mount {mount.path} ({mount.fs_type})" for folder in folders for mount in mounts_below(folder)]
    processes = stack_processes(state) | session_processes(state)
    result += [f"process {pid} ({program})" for pid, program in sorted(processes.items())]
    result += [f"credential file {path}" for path in credential_files(state)]
    if state.endpoints_file.exists():
        result.append(f"file {state.endpoints_file}")
    return result


async def clean(state: StateDirectory, deadline: float = 8.0) -> list[str]:
    """Takes away what `find` finds, except the files (the state directory clears those). Returns what it did."""
    done: list[str] = []
    # Sessions first: the monitor of a container that is ended would leave the container running.
    sessions = session_processes(state)
    _signal(sessions, signal.SIGKILL)
    done += [f"ended process {pid} ({program}) of a session" for pid, program in sorted(sessions.items())]
    processes = stack_processes(state)
    _signal(processes, signal.SIGTERM)
    done += [f"ended process {pid} ({program})" for pid, program in sorted(processes.items())]
    await _until(lambda: not _running(processes), deadline / 2)
    # A FUSE server whose mount hangs ends only when the connection is cut, so mounts go before SIGKILL.
    for mount in reversed(mounts_below(state.runtime_dir) + mounts_below(state.containers_dir)):
        if mount.is_fuse:
            abort_fuse(mount)
        if _unmount(mount.path):
            done.append(f"unmounted {mount.path}")
    rest = stack_processes(state)
    _signal(rest, signal.SIGKILL)
    await _until(lambda: not _running(rest | sessions), deadline / 2)
    if done:
        log.info("cleaned what an earlier stack left", actions=done)
    return done


def _signal(processes: dict[int, str], number: signal.Signals) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _running(processes: dict[int, str]) -> bool:
    return any(start_time(pid) is not None for pid in processes)


async def _until(condition: Callable[[], bool], deadline: float) -> None:
    end = time.monotonic() + deadline
    while not condition() and time.monotonic() < end:  # noqa: ASYNC110  # not our children, nothing tells us
        await asyncio.sleep(_POLL_SECONDS)


def abort_fuse(mount: Mount) -> None:
    """Frees every process that waits for this FUSE server (fuse.rst, "abort"); without it even SIGKILL does not."""
    minor = mount.device.partition(":")[2]
    with contextlib.suppress(OSError):
        Path(f"/sys/fs/fuse/connections/{minor}/abort").write_text("1", encoding="ascii")


def _unmount(path: str) -> bool:
    result: int = _libc.umount2(os.fsencode(path), MNT_DETACH | UMOUNT_NOFOLLOW)
    if result != 0:
        log.warning("could not unmount", path=path, error=os.strerror(ctypes.get_errno()))
    return result == 0
