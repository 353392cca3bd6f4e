"""`Uml`: the image on Debian's user-mode kernel: up in seconds without hardware help, but without systemd or network.

Commands go through a directory of this host that the guest mounts (see uml-init.sh).
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
from pathlib import Path

from .image import Images
from .machine import Ability, Machine, MachineError, Result, call, kill_group, spawn, wait_for

_MEMORY_MIB = 3072
_BOOT_SECONDS = 120.0


class Uml(Machine):
    name = "uml"
    abilities = frozenset({Ability.POWER_CUT})
    slowness = 4.0

    def __init__(self, place: Path, images: Images) -> None:
        super().__init__(place)
        self._images = images
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count(1)
        self._job = place / "job"

    def start(self) -> None:
        shutil.rmtree(self._job, ignore_errors=True)
        self._job.mkdir()
        argv = [
            *("linux.uml", f"mem={_MEMORY_MIB}M", f"ubd0={self.place / 'disk.cow'},{self._images.disk}"),
            *("root=/dev/ubda", "rw", "con=null", "con0=null,fd:1", "ssl=null", f"umid=mooring-{os.getpid()}"),
            *("init=/sbin/mooring-vm-init", f"mooring.job={self._job}", f"uml_dir={self.place}"),
        ]
        # Its memory is a file in TMPDIR: on a disk it would be written back all the time.
        memory = Path("/dev/shm")
        env = {**os.environ, "TMPDIR": str(memory if memory.is_dir() else self.place)}
        self._process = spawn(argv, self.place / "console.log", env)
        try:
            wait_for(self._is_up, f"the user-mode kernel runs; see {self.place / 'console.log'}", _BOOT_SECONDS)
        except MachineError:
            self.stop()
            raise

    def _is_up(self) -> bool:
        self._check_alive()
        return (self._job / "up").exists()

    def _check_alive(self) -> None:
        if self._process is None or self._process.poll() is not None:
            raise MachineError(f"the user-mode kernel ended: {(self.place / 'console.log').read_text()[-2000:]}")

    def run(self, command: str, deadline: float = 300.0) -> Result:
        name = f"{next(self._numbers):04d}"
        part, done = self._job / f"{name}.part", self._job / f"{name}.rc"
        part.write_text(command + "\n")
        part.rename(self._job / f"{name}.sh")

        def ended() -> bool:
            self._check_alive()
            return done.exists()

        wait_for(ended, f"in the guest: {command[:300]}", deadline, pause=0.05)
        return Result(int(done.read_text()), (self._job / f"{name}.out").read_text(errors="replace"))

    def put(self, local: Path, remote: str) -> None:
        name = f"{next(self._numbers):04d}.data"
        shutil.copyfile(local, self._job / name)
        self.run(f"cp /job/{name} {shlex.quote(remote)} && rm /job/{name}").check(f"copying {local.name} in")

    def get(self, remote: str, local: Path) -> None:
        name = f"{next(self._numbers):04d}.data"
        self.run(f"cp {shlex.quote(remote)} /job/{name}").check(f"copying {remote} out")
        shutil.move(self._job / name, local)

    def cut(self) -> None:
        if self._process is not None:
            kill_group(self._process)
            self._process = None

    def stop(self) -> None:
        process = self._process
        if process is None:
            return
        try:
            (self._job / "halt").touch()
            process.wait(60)
        except subprocess.TimeoutExpired:
            pass
        finally:
            kill_group(process)
            self._process = None


def works() -> bool:
    """True if the user-mode kernel starts on this host at all."""
    return shutil.which("linux.uml") is not None and call(["linux.uml", "--version"]).code == 0
