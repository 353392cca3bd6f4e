"""What people do without an agent: s3fs with the same options, started by hand or by a shell loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agent_plugin.config import S3fsConfig
from agent_plugin.drivers import Launch
from agent_plugin.drivers.s3fs import S3fsDriver
from agent_plugin.kernel import Propagation, entries_below, mount, set_propagation, top_at, unmount
from storage_proxy.core.secrets import write_private
from tests.t4_agent.node import processes_with

from .stand import Stand

# As a service manager would: whenever the program ends, its dead mount is taken away and it is started again.
_LOOP = 'place=$1; shift; while :; do umount -l "$place" 2>/dev/null; "$@"; done'


@dataclass
class Bare:
    """Mount points below `place`, on a shared mount as an administrator would make one."""

    stand: Stand
    place: Path
    driver: S3fsDriver
    _loops: list[subprocess.Popen[bytes]]

    def launch(self, number: int, mount_point: Path) -> Launch:
        """As the agent starts it, in the foreground."""
        scratch = self.place.with_name("bare-scratch") / mount_point.name
        scratch.mkdir(parents=True, exist_ok=True)
        credential = self.place.with_name("bare-key")
        if not credential.exists():
            write_private(credential, self.driver.credential_file(self.stand.credential).reveal().encode())
        plan = self.stand.plan(number)
        return self.driver.launch(plan, mount_point=mount_point, credential=credential, scratch=scratch)

    def mount(self, number: int) -> float:
        """Mounts a folder and stats its root; seconds until that was answered. s3fs goes to the background itself."""
        place = self.point(number)
        launch = self.launch(number, place)
        began = time.perf_counter()
        words = [word for word in launch.argv if word != "-f"]
        subprocess.run(words, check=True, capture_output=True, env=dict(launch.environment), cwd=launch.directory)
        os.stat(place)  # noqa: PTH116 - answered when s3fs has checked its bucket
        return time.perf_counter() - began

    def unmount(self, number: int) -> float:
        """Seconds until it is out of the mount table."""
        began = time.perf_counter()
        unmount(self.point(number))
        return time.perf_counter() - began

    def point(self, number: int) -> Path:
        place = self.place / f"n{number}"
        place.mkdir(exist_ok=True)
        return place

    async def loop(self, number: int) -> Path:
        """A shell loop that keeps a folder mounted; the mount point, ready."""
        place = self.place / f"loop{number}" / "folder"
        place.mkdir(parents=True)
        launch = self.launch(number, place)
        self._start_loop(launch, place)
        end = time.monotonic() + 30
        while (top := top_at(place)) is None or not top.is_fuse:
            if time.monotonic() > end:
                raise SystemExit("s3fs did not mount")
            await asyncio.sleep(0.01)
        await asyncio.to_thread(os.stat, place)
        return place

    def _start_loop(self, launch: Launch, place: Path) -> None:
        quiet = subprocess.DEVNULL
        self._loops.append(
            subprocess.Popen(
                ["/bin/sh", "-c", _LOOP, "sh", str(place), *launch.argv],
                env=dict(launch.environment),
                cwd=launch.directory,
                stdin=quiet,
                stdout=quiet,
                stderr=quiet,
                start_new_session=True,
            )
        )

    def pid(self, place: Path) -> int:
        """The mount process at a mount point."""
        (pid,) = [pid for pid in processes_with(str(place)) if Path(f"/proc/{pid}/comm").read_text().strip() == "s3fs"]
        return pid

    def pids(self) -> list[int]:
        return [pid for pid in processes_with(str(self.place)) if Path(f"/proc/{pid}/comm").read_text() == "s3fs\n"]


@contextmanager
def bare(stand: Stand) -> Iterator[Bare]:
    """Nothing of it is left afterwards."""
    place = stand.node.place / "bare"
    place.mkdir()
    mount("bench", place, "tmpfs", data="mode=0755")
    set_propagation(place, Propagation.PRIVATE)
    set_propagation(place, Propagation.SHARED)
    made = Bare(stand, place, S3fsDriver(S3fsConfig()), [])
    try:
        yield made
    finally:
        for loop in made._loops:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(loop.pid, signal.SIGKILL)  # the shell and its s3fs
            loop.wait()
        for entry in reversed(entries_below(place)):
            unmount(Path(entry.mount_point), lazy=True)
        place.rmdir()
