"""Mount processes: started in sessions of their own, watched by pidfd, known again by pid and start time.

A mount process must outlive the agent (an agent that is upgraded must not end its sessions' mounts), so it is no daemon
of ours in any way that dies with us: own session, output into a file, no pipe. A pid alone names nobody after a
restart; pid and start time do.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from storage_proxy.core.errors import DriverMissing, MountFailed
from storage_proxy.core.logs import get_logger, redact_text
from storage_proxy.core.secrets import MASK, Secret

from .drivers.port import Launch
from .kernel.namespaces import start_time

log = get_logger(__name__)

LOG_BYTES = 64 * 1024
_LAST_LINES = 8
_LAST_CHARS = 1200


@dataclass(frozen=True, slots=True)
class ProcessID:
    """`started`: clock ticks between boot and the start of the process, field 22 of proc(5) stat."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> ProcessID | None:
        """None if no such process runs (a zombie counts as ended)."""
        started = start_time(pid)
        return None if started is None else cls(pid, started)

    @property
    def runs(self) -> bool:
        return ProcessID.of(self.pid) == self


class MountProcess:
    """One process. `ended` is set when it has exited; `status` is its exit status then (None if it was not our
    child).
    """

    def __init__(self, identity: ProcessID, pidfd: int, output: Path, child: subprocess.Popen[bytes] | None) -> None:
        self.identity = identity
        self.output = output
        self.ended = asyncio.Event()
        self.status: int | None = None
        self._pidfd = pidfd
        self._child = child
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pidfd, self._exited)

    @classmethod
    def start(cls, launch: Launch, output: Path) -> MountProcess:
        """Starts it. Raises `DriverMissing` if the program cannot be executed, `MountFailed` if the system refuses a
        process.
        """
        fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            child = subprocess.Popen(
                list(launch.argv),
                stdin=subprocess.DEVNULL,
                stdout=fd,
                stderr=fd,
                env=dict(launch.environment),
                cwd=launch.directory,
                start_new_session=True,
                close_fds=True,
                umask=0o077,
            )
        except FileNotFoundError:
            raise DriverMissing(f"The program {launch.argv[0]} is not there any more.", hint="Install it.") from None
        except OSError as err:
            raise MountFailed(
                f"The program {launch.argv[0]} cannot be started: {err.strerror}.",
                hint="Check memory and process limits.",
            ) from None
        finally:
            os.close(fd)
        identity = ProcessID.of(child.pid) or ProcessID(child.pid, 0)
        return cls(identity, os.pidfd_open(child.pid), output, child)

    @classmethod
    def adopt(cls, identity: ProcessID, output: Path) -> MountProcess | None:
        """A process that a former agent started; None if it is gone or the pid names another one now."""
        try:
            fd = os.pidfd_open(identity.pid)
        except OSError:
            return None
        # The descriptor holds on to whatever has the pid now, so this comparison cannot be overtaken.
        if not identity.runs:
            os.close(fd)
            return None
        return cls(identity, fd, output, None)

    @property
    def pid(self) -> int:
        return self.identity.pid

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        if self._child is not None:
            self.status = self._child.wait()
        self.ended.set()

    def let_go(self) -> None:
        """Stops watching, leaves the process alone."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        if self._child is not None and self._child.returncode is None:
            self._child.returncode = 0  # else Popen complains about a child that is meant to live on

    async def wait(self, seconds: float) -> bool:
        """True when it has exited within that time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.ended.wait()
        return self.ended.is_set()

    def send(self, number: signal.Signals) -> None:
        """Signals exactly this process, never one that got its pid later."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def stop(self, *, patience: float = 5.0) -> bool:
        """Waits for the exit that follows an unmount, then SIGTERM, then SIGKILL. False if even that did not end it.

        A process killed by SIGKILL stays as long as the kernel works for it; its connection should be aborted then.
        """
        if await self.wait(patience):
            return True
        for number, seconds in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
            log.info("mount process still runs", pid=self.pid, sending=number.name)
            self.send(number)
            if await self.wait(seconds):
                return True
        return False

    def last_words(self, *secrets: Secret) -> str:
        """The end of its output on one line, secrets masked."""
        return last_words(self.output, *secrets)


def last_words(output: Path, *secrets: Secret) -> str:
    try:
        with output.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    for secret in secrets:
        text = text.replace(secret.reveal(), MASK)
    lines = [line.strip() for line in redact_text(text).splitlines()]
    # Its greeting and its echo of options tell nothing.
    told = [line for line in lines if line and "[INF]" not in line and "LowSetLogLevel" not in line]
    return " | ".join(told[-_LAST_LINES:])[-_LAST_CHARS:]


def trim_output(output: Path, limit: int = LOG_BYTES) -> None:
    """Keeps the file of a talkative process small; it appends, so it goes on at the new end."""
    with contextlib.suppress(OSError):
        if output.stat().st_size > limit:
            os.truncate(output, 0)
