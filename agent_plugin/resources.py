"""What the mount processes cost: memory, descriptors, threads, CPU, bytes.

All of it is read from /proc in a thread, every 15 s and soon after a mount appears; several hundred processes take some
ten milliseconds. The proportional set size (PSS) is dearer, because the kernel walks the whole address space for it:
each process gets its turn every two minutes. What a figure can say is said in `Usage`; what a kernel does not tell is
None, never 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from storage_proxy.core.errors import MooringError
from storage_proxy.core.ids import MountKey
from storage_proxy.core.logs import get_logger
from storage_proxy.core.wire import MountState

from .events import Event
from .journal import MountRecord
from .kernel.abandon import off_loop
from .kernel.processes import count_fds, read_io, read_pss, read_stat
from .supervisor import ProcessID

log = get_logger(__name__)

SAMPLE_SECONDS = 15.0
_PSS_TURNS = 8  # a process has its PSS measured in every eighth sample
_DEADLINE = 10.0
_NEW_SECONDS = 1.0  # after a mount appeared; many that appear at once are measured together


@dataclass(frozen=True, slots=True)
class Usage:
    """One process at one moment. Sizes in bytes; counters grow from the start of this process.

    `pss`: its private memory and its share of the pages that several processes map (the program itself): what sums up
    to the memory that all mounts take. `rss` counts shared pages in full. `read` and `written` are what the process
    moved through read and write calls: what its users wrote and read (through the FUSE device) and its own copies in
    temporary files, so with s3fs a file of N bytes that is read the first time counts N and 2 N. They say how busy a
    mount is, not what went over the network: nobody counts that per process. `disk_*` is what storage had to move for
    those copies.
    """

    process: ProcessID
    at: float  # seconds since the epoch
    rss: int
    threads: int
    cpu_seconds: float
    fds: int | None = None
    pss: int | None = None
    read: int | None = None
    written: int | None = None
    disk_read: int | None = None
    disk_written: int | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the processes that were measured. `pss` counts the RSS of those whose PSS is not known."""

    processes: int = 0
    pss: int = 0
    rss: int = 0
    fds: int = 0
    threads: int = 0
    cpu_seconds: float = 0.0
    read: int = 0
    written: int = 0

    @classmethod
    def of(cls, usages: Iterable[Usage]) -> Totals:
        items = list(usages)
        return cls(
            processes=len(items),
            pss=sum(item.rss if item.pss is None else item.pss for item in items),
            rss=sum(item.rss for item in items),
            fds=sum(item.fds or 0 for item in items),
            threads=sum(item.threads for item in items),
            cpu_seconds=sum(item.cpu_seconds for item in items),
            read=sum(item.read or 0 for item in items),
            written=sum(item.written or 0 for item in items),
        )


class Resources:
    """Use `run` in a task, and `note` as a listener. `mounts`: `Attachments.mounts`."""

    def __init__(
        self, mounts: Callable[[], Sequence[tuple[MountRecord, object]]], *, interval: float = SAMPLE_SECONDS
    ) -> None:
        self._mounts = mounts
        self._interval = interval
        self._usages: dict[MountKey, Usage] = {}
        self._new = asyncio.Event()
        self._turn = 0

    def note(self, event: Event) -> None:
        if event.new is MountState.LIVE:
            self._new.set()

    def of(self, key: MountKey) -> Usage | None:
        """The last sample of the process that serves this key; None if there is none yet."""
        return self._usages.get(key)

    def totals(self) -> Totals:
        return Totals.of(self._usages.values())

    async def run(self) -> None:
        due = time.monotonic()
        while True:
            everything = time.monotonic() >= due
            if everything:
                due = time.monotonic() + self._interval
            try:
                await self.sample(everything=everything)
            except MooringError as err:
                log.warning("the mount processes could not be measured", error=str(err))
            except Exception:
                log.exception("the mount processes could not be measured")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(due - time.monotonic()):
                    await self._new.wait()
                    await asyncio.sleep(_NEW_SECONDS)
            self._new.clear()

    async def sample(self, *, everything: bool = True) -> None:
        """One round, or only those that have no figures yet. Processes that ended are forgotten."""
        living = {record.key: record.process for record, _ in self._mounts() if record.process is not None}
        known = {key: old for key, old in self._usages.items() if living.get(key) == old.process}
        self._turn = turn = (self._turn + everything) % _PSS_TURNS

        def work() -> dict[MountKey, Usage]:
            found = {}
            for key, process in living.items():
                old = known.get(key)
                if old is not None and not everything:
                    found[key] = old
                    continue
                pss = None if old is None else old.pss
                usage = measure(process, pss, again=pss is None or int(key[:4], 16) % _PSS_TURNS == turn)
                if usage is not None:
                    found[key] = usage
            return found

        self._usages = await off_loop("a look at the mount processes", _DEADLINE, work)


def measure(process: ProcessID, pss: int | None = None, *, again: bool = True) -> Usage | None:
    """None if this process runs no more. `pss` is kept unless it shall be measured `again`."""
    stat = read_stat(process.pid)
    if stat is None or stat.started != process.started:
        return None
    io = read_io(process.pid)
    return Usage(
        process=process,
        at=time.time(),
        rss=stat.rss,
        threads=stat.threads,
        cpu_seconds=stat.cpu_seconds,
        fds=count_fds(process.pid),
        pss=read_pss(process.pid) if again else pss,
        read=None if io is None else io.read,
        written=None if io is None else io.written,
        disk_read=None if io is None else io.disk_read,
        disk_written=None if io is None else io.disk_written,
    )
