"""`Machine`: a virtual machine with its own kernel, the same to use whatever runs it."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import IO, Self

# Where the tree lies in every machine, and what provision.sh makes of it.
GUEST_SOURCE = "/opt/mooring/src"
GUEST_PYTHON = "/opt/mooring/venv/bin/python"


class Ability(StrEnum):
    """What a scenario may need and not every machine gives."""

    SYSTEMD = "systemd"  # is the guest's init
    POWER_CUT = "power-cut"  # it can be killed and booted again with the same disk


class MachineError(Exception):
    """The machine itself failed: it did not boot, a command went past its deadline, a program is missing."""


@dataclass(frozen=True, slots=True)
class Result:
    """Exit code of a command, and its standard output and error in one text."""

    code: int
    output: str

    def check(self, what: str) -> str:
        """The output; raises `MachineError` unless the code is 0."""
        if self.code != 0:
            raise MachineError(f"{what}: exit code {self.code}\n{self.output[-4000:]}")
        return self.output


class Machine(ABC):
    """Use as a context manager; `start` boots, `stop` leaves no process and no file outside `place`.

    `place`: a directory of its own for overlays, logs and sockets. Durations are in seconds.
    """

    name: str
    abilities: frozenset[Ability] = frozenset()
    # How much longer than on bare metal a command may take; scenarios stretch their deadlines by it.
    slowness: float = 1.0

    def __init__(self, place: Path) -> None:
        self.place = place

    @abstractmethod
    def start(self) -> None:
        """Returns when commands can be run. After `cut` it boots again with the same disk. Raises `MachineError`."""

    @abstractmethod
    def run(self, command: str, deadline: float = 300.0) -> Result:
        """Runs a shell command as root. Raises `MachineError` when it does not end in time."""

    @abstractmethod
    def put(self, local: Path, remote: str) -> None:
        """Copies one file into the guest."""

    @abstractmethod
    def get(self, remote: str, local: Path) -> None:
        """Copies one file out of the guest."""

    @abstractmethod
    def stop(self) -> None:
        """Shuts down, by force if need be. Idempotent."""

    def cut(self) -> None:
        """Power cut: no sync, no shutdown. Only with `Ability.POWER_CUT`."""
        raise MachineError(f"{self.name} cannot cut the power")

    def install(self, archive: Path) -> None:
        """Puts the tree into the guest and sets the host up with it, as an operator would."""
        self.put(archive, "/tmp/source.tar")
        command = (
            f"rm -rf {GUEST_SOURCE} && mkdir -p {GUEST_SOURCE} && tar -xf /tmp/source.tar -C {GUEST_SOURCE} "
            f"&& rm /tmp/source.tar && bash {GUEST_SOURCE}/tests/vm/provision.sh"
        )
        self.run(command, 900).check("provision.sh")

    def describe(self) -> str:
        """For the report: what runs it, in a few words."""
        return self.name

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def wait_for(condition: Callable[[], bool], what: str, deadline: float, pause: float = 0.1) -> None:
    """Polls. Raises `MachineError` when the condition does not hold in time."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            raise MachineError(f"not within {deadline:.0f} s: {what}")
        time.sleep(pause)


def call(
    argv: Sequence[str],
    *,
    deadline: float = 120.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: Path | None = None,
    stdout: Path | None = None,
) -> Result:
    """Runs a program of this host. Raises `MachineError` when it does not end in time; then its group is killed.

    The output goes through a file, so that a daemon it leaves behind cannot keep this waiting for the end of a pipe.
    """
    with tempfile.TemporaryFile() as errors, contextlib.ExitStack() as files:
        source = files.enter_context((stdin or Path(os.devnull)).open("rb"))
        sink = files.enter_context(stdout.open("wb")) if stdout else errors
        process = subprocess.Popen(
            list(argv), stdin=source, stdout=sink, stderr=errors, env=env, cwd=cwd, start_new_session=True
        )
        try:
            code = process.wait(deadline)
        except subprocess.TimeoutExpired:
            kill_group(process)
            raise MachineError(f"not within {deadline:.0f} s: {shlex.join(argv)[:300]}\n{_text(errors)}") from None
        except BaseException:
            kill_group(process)
            raise
        return Result(code, _text(errors))


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def spawn(argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Starts a program of this host in a group of its own; it dies with this process."""
    with log.open("ab") as output:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=env,
            start_new_session=True,
        )


def kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
