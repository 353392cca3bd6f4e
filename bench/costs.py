"""What processes cost: CPU time to the microsecond, memory."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from agent_plugin.kernel import read_mountinfo
from agent_plugin.kernel.processes import read_pss, read_stat

_MIB = 2**20


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU time of the living threads of these processes. /proc/PID/stat has it too, but only in steps of 10 ms."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):
                total += int(task.read_text().split()[0])
    return total / 1e9


def memory_mib(pids: Iterable[int]) -> dict[str, float]:
    """Sums; PSS shares out the pages that several processes map, so it is what they take together."""
    pids = list(pids)
    pss = sum(read_pss(pid) or 0 for pid in pids) / _MIB
    rss = sum(stat.rss for pid in pids if (stat := read_stat(pid)) is not None) / _MIB
    return {"pss_mib": round(pss, 1), "rss_mib": round(rss, 1)}


class Meter:
    """A control group (v2) for an agent, because it has short-lived children whose CPU time is lost elsewhere. Without
    one, only what still runs is counted, and `whole` is False.
    """

    def __init__(self) -> None:
        self._group: Path | None = None
        for entry in read_mountinfo():
            if entry.fstype == "cgroup2":
                group = Path(entry.mount_point) / f"mooring-bench-{secrets.token_hex(4)}"
                with contextlib.suppress(OSError):
                    group.mkdir()
                    self._group = group
                break

    @property
    def whole(self) -> bool:
        return self._group is not None

    def enter(self, pid: int) -> None:
        """The process, its threads, and what it starts from now on."""
        if self._group is not None:
            (self._group / "cgroup.procs").write_text(str(pid))

    def seconds(self, agent: int, mounts: Iterable[int]) -> float:
        """The CPU time of the agent and its children, without the mount processes."""
        if self._group is None:
            return cpu_seconds([agent, *_children(agent, set(mounts))])
        usage = next(
            int(line.split()[1])
            for line in (self._group / "cpu.stat").read_text().splitlines()
            if line.startswith("usage_usec")
        )
        inside = {int(line) for line in (self._group / "cgroup.procs").read_text().split()}
        return usage / 1e6 - cpu_seconds(inside & set(mounts))

    def close(self) -> None:
        """Removes the group; what runs in it goes up."""
        if self._group is not None:
            for line in (self._group / "cgroup.procs").read_text().split():
                with contextlib.suppress(OSError):
                    (self._group.parent / "cgroup.procs").write_text(line)
            with contextlib.suppress(OSError):
                self._group.rmdir()


def _children(pid: int, without: set[int]) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [child for child in map(int, task.read_text().split()) if child not in without]
    return found


@dataclass(frozen=True, slots=True)
class Idle:
    """Percent of one core over some seconds without any request, and the memory after them."""

    mounts: int
    agent_percent: float
    mounts_percent: float
    agent: dict[str, float]
    processes: dict[str, float]


async def idle(meter: Meter, agent: int, mounts: list[int], seconds: float) -> Idle:
    began = time.monotonic()
    before = meter.seconds(agent, mounts), cpu_seconds(mounts)
    await asyncio.sleep(seconds)
    after = meter.seconds(agent, mounts), cpu_seconds(mounts)
    took = time.monotonic() - began
    return Idle(
        mounts=len(mounts),
        agent_percent=round(100 * (after[0] - before[0]) / took, 2),
        mounts_percent=round(100 * (after[1] - before[1]) / took, 3),
        agent=memory_mib([agent, *_children(agent, set(mounts))]),
        processes=memory_mib(mounts),
    )
