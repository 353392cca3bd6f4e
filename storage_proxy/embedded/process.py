"""Child processes of the stack: started, watched, restarted, stopped; and what a killed stack left is found again.

Every child runs in its own session (so that Ctrl-C in the terminal reaches only `mooring up`, which stops them in
order) and is told by the kernel when its parent dies (PR_SET_PDEATHSIG), so even `kill -9` of the parent ends them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..core.errors import DeadlineExceeded, InternalError, MooringError, PortTaken, ServiceUnavailable, walk
from ..core.logs import get_logger, redact_text
from ..core.secrets import write_private
from .state import disk_error

log = get_logger(__name__)

T = TypeVar("T")

PR_SET_PDEATHSIG = 1
LOG_ROTATE_BYTES = 8 * 1024 * 1024
TAIL_BYTES = 16 * 1024
_POLL_SECONDS = 0.05

# Children get a plain environment: nothing that would change their configuration (MOORING_*) or give the S3 server a
# hidden administrator (AWS_*).
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TZ", "USER", "LOGNAME", "VIRTUAL_ENV")

_libc = ctypes.CDLL(None, use_errno=True)


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    env = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    env.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    return {**env, **(extra or {})}


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> Callable[[], None]:
    """A `preexec_fn`: the child gets `number` when its parent dies. The mark survives exec."""
    parent = os.getpid()

    def prepare() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it died between fork and prctl
            os._exit(1)

    return prepare


def start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of `pid`; with the pid it names one process for good. None: it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


class ProcessRegistry:
    """STATE/run/processes.json: the children by pid and start time, written before anybody waits for them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, dict[str, int]] = {}

    def add(self, name: str, pid: int) -> None:
        started = start_time(pid)
        if started is not None:
            self._rows[name] = {"pid": pid, "start_time": started}
            self._save()

    def remove(self, name: str) -> None:
        if self._rows.pop(name, None) is not None:
            self._save()

    def _save(self) -> None:
        try:
            write_private(self._path, json.dumps({"boot_id": boot_id(), "processes": self._rows}).encode())
        except OSError as err:
            raise disk_error(err, str(self._path)) from None

    def recorded(self) -> dict[str, int]:
        """name -> pid of the recorded processes that still run (this boot, same start time)."""
        try:
            data = json.loads(self._path.read_bytes())
            if data["boot_id"] != boot_id():
                return {}
            return {
                str(name): int(row["pid"])
                for name, row in data["processes"].items()
                if start_time(int(row["pid"])) == int(row["start_time"])
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    async def kill_leftovers(self, deadline: float = 8.0) -> list[str]:
        """Ends the children of a stack that was killed: SIGTERM first, so that the agent unmounts. Returns names."""
        found = self.recorded()
        for pid in found.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        await self._gone(deadline)
        for pid in self.recorded().values():
            _kill_session(pid)
        await self._gone(5.0)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        return sorted(found)

    async def _gone(self, deadline: float) -> None:
        end = time.monotonic() + deadline
        while self.recorded() and time.monotonic() < end:  # noqa: ASYNC110  # not our children, nothing tells us
            await asyncio.sleep(_POLL_SECONDS)


def _kill_session(pid: int) -> None:
    """SIGKILL to the process and to its group, which it leads."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def error_from_child(name: str, returncode: int | None, tail: str) -> MooringError:
    """The error that a child ended with, as one of our own.

    Our daemons write their error as one JSON line (its problem body) or as a sentence; others only have last words.
    """
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            data = json.loads(line)
            if isinstance(data, dict) and (found := _from_problem(name, returncode, data)) is not None:
                return found
    ended = f"exit code {returncode}" if returncode is not None and returncode >= 0 else _signal_name(returncode)
    words = redact_text(lines[-1]).removeprefix("error: ")[:400] if lines else "it wrote nothing"
    if "address already in use" in tail.lower():
        return PortTaken(f"{name}: {words}", hint="Stop that program, or choose other ports with --port-base N.")
    for cls in walk():
        if cls.exit_code == returncode and cls.exit_code not in (1, 2):
            return cls(f"{name}: {words}")
    return ServiceUnavailable(f"{name} ended with {ended}; its last line: {words}")


def _from_problem(name: str, returncode: int | None, data: dict[str, Any]) -> MooringError | None:
    body = data.get("error") if isinstance(data.get("error"), dict) else data
    if not isinstance(body, dict) or not isinstance(body.get("msg"), str) or "error_code" not in body:
        return None
    hint = body.get("hint")
    # Several classes may share a code; the title is unique among the ones that a start can end with.
    same = [cls for cls in walk() if cls.code == body["error_code"]]
    same = [cls for cls in same if cls.exit_code == returncode] or same
    same = [cls for cls in same if cls.title == body.get("title")] or same
    if not same:
        return None
    return same[0](f"{name}: {body['msg']}", hint=str(hint) if hint else None)


def _signal_name(returncode: int | None) -> str:
    if returncode is None:
        return "no exit code"
    with contextlib.suppress(ValueError):
        return signal.Signals(-returncode).name
    return f"signal {-returncode}"


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Waits first, first*2, first*4, ... up to `longest` seconds; gives up after `limit` deaths in `window` seconds."""

    first: float = 0.5
    longest: float = 30.0
    limit: int = 6
    window: float = 120.0


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One child: how it is started, when it counts as ready, how long it may take to start and to stop (seconds)."""

    name: str
    argv: Sequence[str]
    log_file: Path
    ready: Callable[[], Awaitable[None]]  # raises while it is not; called again and again
    start_deadline: float = 15.0
    stop_deadline: float = 15.0
    cwd: Path | None = None
    env: Mapping[str, str] = field(default_factory=child_environment)
    restart: RestartPolicy = RestartPolicy()
    before_start: Callable[[], None] | None = None  # called before every start, also a restart


class ManagedProcess:
    """A child under watch. `start`, then `supervise` until `stop`."""

    def __init__(self, spec: ProcessSpec, registry: ProcessRegistry) -> None:
        self.spec = spec
        self._registry = registry
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self._log_start = 0
        self.restarts = 0

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        """Returns when the child is ready. Raises the child's own error if it ends, `DeadlineExceeded` if it is late;
        in both cases, and when cancelled, the child is gone."""
        self._stopping = False
        await self._launch()

    async def _launch(self) -> None:
        try:
            await self._spawn()
            await self._wait_ready()
        except BaseException:
            await self._end()
            raise

    async def _spawn(self) -> None:
        spec = self.spec
        if spec.before_start is not None:
            spec.before_start()
        try:
            self._rotate_log()
            output = os.open(spec.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as err:
            raise disk_error(err, f"Log file {spec.log_file}") from None
        try:
            self._log_start = os.fstat(output).st_size
            self._process = await asyncio.create_subprocess_exec(
                *spec.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=spec.cwd or "/",
                env=dict(spec.env),
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        except OSError as err:
            raise ServiceUnavailable(f"{spec.name}: {spec.argv[0]} cannot be started ({err.strerror}).") from None
        finally:
            os.close(output)
        self._registry.add(spec.name, self._process.pid)

    async def _wait_ready(self) -> None:
        process = self._process
        assert process is not None  # noqa: S101  # _spawn set it
        ended = asyncio.create_task(process.wait(), name=f"{self.name} ends")
        last: BaseException | None = None
        try:
            async with asyncio.timeout(self.spec.start_deadline):
                while True:
                    if ended.done():
                        raise self._error(process.returncode)
                    try:
                        await self.spec.ready()
                    except (MooringError, OSError, TimeoutError) as err:
                        last = err
                    else:
                        return
                    await asyncio.wait([ended], timeout=_POLL_SECONDS)
        except TimeoutError:
            words = self.last_words()
            raise DeadlineExceeded(
                f"{self.name} was not ready within {self.spec.start_deadline:g} s"
                f" ({last or 'no answer'}){'; its last line: ' + words if words else ''}.",
                hint=f"See {self.spec.log_file}.",
            ) from None
        finally:
            ended.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ended

    async def supervise(self) -> None:
        """Restarts the child with back-off whenever it ends, until `stop`. Raises `ServiceUnavailable` in the end."""
        policy = self.spec.restart
        deaths: deque[float] = deque()
        error: MooringError | None = None
        while True:
            process = self._process
            if process is not None:
                code = await process.wait()
                if self._stopping:
                    return
                self._registry.remove(self.name)
                error = self._error(code)
            now = time.monotonic()
            deaths.append(now)
            while deaths and now - deaths[0] > policy.window:
                deaths.popleft()
            if len(deaths) > policy.limit:
                raise ServiceUnavailable(
                    f"{self.name} ended {len(deaths)} times within {policy.window:g} s, so the stack stops."
                    f" The last time: {error}",
                    hint=f"See {self.spec.log_file}.",
                )
            wait = min(policy.first * 2 ** (len(deaths) - 1), policy.longest)
            log.warning("process ended, starting it again", process=self.name, error=str(error), wait_seconds=wait)
            await asyncio.sleep(wait)
            if self._stopping:
                return
            try:
                await self._launch()
                self.restarts += 1
            except MooringError as err:
                error = err

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL after the deadline. Idempotent; finishes even if the caller is cancelled meanwhile."""
        self._stopping = True
        await self._end()

    async def _end(self) -> None:
        process = self._process
        if process is None:
            return
        await finish(self._stop(process))

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(self.spec.stop_deadline):
                    await process.wait()
            except TimeoutError:
                log.warning("process did not stop in time, killing it", process=self.name)
                _kill_session(process.pid)
                await process.wait()
        self._process = None
        with contextlib.suppress(MooringError):  # a full disk must not keep the rest from stopping
            self._registry.remove(self.name)

    def _error(self, returncode: int | None) -> MooringError:
        return error_from_child(self.name, returncode, self._tail())

    def last_words(self) -> str:
        lines = [line.strip() for line in self._tail().splitlines() if line.strip()]
        return redact_text(lines[-1])[:300] if lines else ""

    def _tail(self) -> str:
        try:
            with self.spec.log_file.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._log_start, size - TAIL_BYTES))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""

    def _rotate_log(self) -> None:
        path = self.spec.log_file
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size > LOG_ROTATE_BYTES:
                path.replace(path.with_name(path.name + ".1"))


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` to its end even if the caller is cancelled meanwhile; the cancellation is raised afterwards."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as err:
            if task.cancelled():
                raise
            cancelled = err
        except Exception:
            break  # raised again by result()
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result


def require_main_thread() -> None:
    """PR_SET_PDEATHSIG is tied to the thread that forks: children must be started from the one that lives longest."""
    import threading

    if threading.current_thread() is not threading.main_thread():
        raise InternalError("The stack must be started from the main thread.")
