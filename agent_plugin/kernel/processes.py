"""What /proc tells about another process: cheap, never blocks, touches no mount. Field numbers are those of proc(5)."""

from __future__ import annotations

import os
from dataclasses import dataclass

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICK = 1.0 / os.sysconf("SC_CLK_TCK")
_BUFFER = 8192


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """One line of /proc/PID/stat. `state` is one letter: R runs, S sleeps, D waits for the kernel, T was stopped by a
    signal, t by a debugger, Z has ended. `started` in clock ticks after boot: with the pid it names a process for ever.
    """

    state: str
    cpu_seconds: float
    threads: int
    started: int
    rss: int

    @property
    def stopped(self) -> bool:
        return self.state == "T"


@dataclass(frozen=True, slots=True)
class ProcessIO:
    """/proc/PID/io in bytes. `read` and `written` count what went through read and write calls, whatever the other end
    was (FUSE device, temporary file), but not sockets used with recv and send; `disk_*` what storage had to move, less
    what was deleted before it got there.
    """

    read: int
    written: int
    disk_read: int
    disk_written: int


@dataclass(frozen=True, slots=True)
class ThreadStat:
    """`switches`: how often it went to sleep or was taken off its CPU. It does not grow in a thread that waits for a
    lock; in one that waits for a silent server the timers of its client make it grow.
    """

    state: str
    switches: int

    @property
    def at_work(self) -> bool:
        """It runs or wants to, waits for the kernel (a disk), or a debugger holds it."""
        return self.state in ("R", "D", "t")


def read_stat(pid: int) -> ProcessStat | None:
    """None if there is no such process."""
    raw = _read(f"/proc/{pid}/stat")
    if raw is None:
        return None
    # The name in parentheses may itself hold spaces and parentheses. What follows starts with field 3.
    fields = raw[raw.rindex(b")") + 2 :].split()
    return ProcessStat(
        state=chr(fields[0][0]),
        cpu_seconds=(int(fields[11]) + int(fields[12])) * _TICK,
        threads=int(fields[17]),
        started=int(fields[19]),
        rss=int(fields[21]) * _PAGE,
    )


def read_io(pid: int) -> ProcessIO | None:
    """None if there is no such process, or the kernel does not count."""
    raw = _read(f"/proc/{pid}/io")
    if not raw:
        return None
    values = {name: int(value) for name, _, value in (line.partition(b": ") for line in raw.splitlines())}
    return ProcessIO(
        read=values[b"rchar"],
        written=values[b"wchar"],
        disk_read=values[b"read_bytes"],
        disk_written=max(0, values[b"write_bytes"] - values[b"cancelled_write_bytes"]),
    )


def read_pss(pid: int) -> int | None:
    """Proportional set size in bytes: private pages plus its share of those that several processes map.

    The kernel walks the whole address space for it, so this takes many times as long as the other calls here. None if
    there is no such process, or the kernel was built without it.
    """
    raw = _read(f"/proc/{pid}/smaps_rollup")
    if not raw:
        return None
    for line in raw.splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return None


def count_fds(pid: int) -> int | None:
    """Open file descriptors; None if there is no such process."""
    place = f"/proc/{pid}/fd"
    try:
        # Since Linux 6.2 the size of the directory is their number; before it is 0.
        return os.stat(place).st_size or len(os.listdir(place))  # noqa: PTH116 - called for hundreds of processes
    except OSError:
        return None


def read_threads(pid: int) -> dict[int, ThreadStat]:
    """Every thread by its id; empty if there is no such process."""
    found: dict[int, ThreadStat] = {}
    try:
        names = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for name in names:
        raw = _read(f"/proc/{pid}/task/{name}/status")
        if raw is None:
            continue
        state, switches = "", 0
        for line in raw.splitlines():
            if line.startswith(b"State:"):
                state = chr(line.split()[1][0])
            elif b"voluntary_ctxt_switches:" in line:
                switches += int(line.rpartition(b":")[2])
        found[int(name)] = ThreadStat(state, switches)
    return found


def _read(path: str) -> bytes | None:
    """The whole of a small file of /proc in one call; None if the process is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, _BUFFER)
    except OSError:
        return None
    finally:
        os.close(fd)
