"""Running `mooring up` as a user does: as a program of its own, watched from outside."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from storage_proxy.embedded.endpoints import Endpoints, find_endpoints
from storage_proxy.embedded.ports import PortPlan, is_free
from storage_proxy.embedded.process import start_time
from storage_proxy.embedded.residue import find, mounts_below, stack_processes
from storage_proxy.embedded.state import StateDirectory

SMALL = {"MOORING_JOB_BIG_BYTES": str(8 * 1024 * 1024)}
START_DEADLINE = 90.0
RUN_DEADLINE = 240.0


def until(condition: Callable[[], Any], deadline: float, what: str) -> Any:
    """Polls; returns the first true value."""
    end = time.monotonic() + deadline
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {deadline:g} s: {what}"
        time.sleep(0.03)
    return value


def free_base() -> int:
    """A port base whose ports are all free just now."""
    for _ in range(200):
        base = random.randrange(11_000, 22_000, 20)
        if all(is_free(port) for port, _ in PortPlan(base).listeners()):
            return base
    raise AssertionError("no free ports")


class Up:
    """One `mooring up`. Use as a context manager: what still runs at the end is killed and cleaned by hand."""

    def __init__(
        self,
        state: Path,
        *args: str,
        base: int | None = None,
        env: dict[str, str] | None = None,
        before: Sequence[str] = (),
        program: Sequence[str] = (sys.executable, "-m", "storage_proxy"),
        scratch: Path | None = None,
    ) -> None:
        self.state = StateDirectory.locate(state)
        self.base = base or free_base()
        scratch = scratch or state.parent
        self._older_sockets = self._sockets()
        self._out, self._err = scratch / f"{state.name}.out", scratch / f"{state.name}.err"
        self.began = time.monotonic()
        argv = [*before, *program, "up", "--state", str(state), "--port-base", str(self.base), *args]
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env={**os.environ, **(env or {})}, cwd="/"
            )

    def _sockets(self) -> set[Path]:
        """What the S3 server made in /tmp."""
        ports = {str(port) for port, _ in PortPlan(self.base).listeners()}
        return {path for path in Path("/tmp").glob("seaweedfs-*.sock") if path.stem.rpartition("-")[2] in ports}

    def __enter__(self) -> Up:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)

    @property
    def out(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace")

    @property
    def everything(self) -> str:
        logs = "".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in self.state.logs_dir.glob("*.log")
        )
        return f"--- out\n{self.out}\n--- err\n{self.err}\n{logs}"

    def events(self) -> list[dict[str, Any]]:
        """The JSON objects of `--json` so far."""
        return [json.loads(line) for line in self.out.splitlines(keepends=True) if line.endswith("\n")]

    def result(self, deadline: float = RUN_DEADLINE) -> dict[str, Any]:
        """The JSON object of `--once --json`, after a good end."""
        assert self.wait(deadline) == 0, self.everything
        found: dict[str, Any] = json.loads(self.out)
        return found

    def wait(self, deadline: float = RUN_DEADLINE) -> int:
        return self.process.wait(deadline)

    def ready(self, deadline: float = START_DEADLINE) -> Endpoints:
        """Waits until the stack is up."""

        def look() -> bool:
            assert self.process.poll() is None, self.everything
            return self.state.endpoints_file.exists()

        until(look, deadline, "endpoints.json")
        return find_endpoints(self.state.path)

    def says(self, text: str, deadline: float = START_DEADLINE) -> None:
        """Waits until `text` was written to standard error."""

        def look() -> bool:
            assert self.process.poll() is None, self.everything
            return text in self.err

        until(look, deadline, f"{text!r} on standard error")

    def stop(self, number: int = signal.SIGTERM, deadline: float = 60.0) -> int:
        self.process.send_signal(number)
        return self.process.wait(deadline)

    def pids(self) -> dict[str, int]:
        """The recorded children."""
        rows = json.loads(self.state.processes_file.read_bytes())["processes"]
        return {name: row["pid"] for name, row in rows.items()}

    def assert_nothing_left(self) -> None:
        left = until_empty(lambda: find(self.state))
        assert left == [], self.everything
        assert not self.state.runtime_dir.exists()
        assert list(self.state.run_dir.iterdir()) == []
        assert self._sockets() <= self._older_sockets


def until_empty(look: Callable[[], list[str]], deadline: float = 5.0) -> list[str]:
    end = time.monotonic() + deadline
    while (found := look()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


__all__ = ["SMALL", "Up", "free_base", "mounts_below", "stack_processes", "start_time", "until", "until_empty"]
