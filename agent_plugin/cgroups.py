"""A control group of its own for every mount process.

So it does not die when the agent's unit is stopped, its memory does not count against the agent, and it can be given a
limit. Where the groups are depends on the host:

    systemd runs            a transient scope `mooring-TOKEN.scope` in `mooring.slice`, as `systemd-run --scope` makes
                            one, but for a process that runs already; directories beside its tree would be removed
    cgroup v2 with memory   directories `mooring-AGENT/TOKEN` beside the agent's own group
    cgroup v1 memory        the same in the memory hierarchy (also on hybrid hosts, where v2 has no memory controller)

Beside, not below: what is below counts against the agent, what is beside still obeys the limits of a surrounding
container. Without the right to do this nothing is refused; it is said once and shown as `problem`.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import subprocess
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from storage_proxy.core.errors import MooringError
from storage_proxy.core.ids import ByteSize
from storage_proxy.core.logs import get_logger

from .kernel import read_mountinfo
from .kernel.abandon import off_loop

log = get_logger(__name__)

_SECONDS = 10.0
_LEAVE_SECONDS = 2.0  # how long an ended process may still stand in its group
_PAUSE_SECONDS = 0.02
_REMEMBERED = 1000  # reasons of groups that are gone
_SYSTEMD = Path("/run/systemd/system")
_SLICE = "mooring.slice"


class Backend(Protocol):
    """Where groups are made. All calls may block for a while and raise OSError."""

    @property
    def kind(self) -> str: ...

    def enter(self, pid: int, token: str, limit: int | None) -> None: ...

    def oom_kills(self, token: str) -> int:
        """How many processes of the group the kernel has killed at its limit."""
        ...

    def leave(self, token: str, patience: float) -> bool:
        """Removes the group. False if after `patience` seconds something still runs in it."""
        ...

    def tokens(self) -> list[str]:
        """The groups that are there."""
        ...

    def close(self) -> None:
        """Removes what holds the groups, if there are none left."""
        ...


class Cgroups:
    """`enter` after the start of a process, `leave` after its end; `reason` tells in between whether it was killed for
    its memory. `limit` in bytes, None for none. Nothing here ever raises: a mount works without its group.
    """

    def __init__(self, agent_id: str, limit: int | None) -> None:
        self._limit = limit
        self._reasons: dict[str, str] = {}
        self._backend: Backend | None = None
        self.problem: str | None = None
        try:
            self._backend = _find_backend(agent_id)
        except _NotHere as err:
            self.problem = str(err)
            self._complain(self.problem)

    @property
    def kind(self) -> str:
        """How it is done on this host: systemd, v2, v1 or none."""
        return "none" if self._backend is None else self._backend.kind

    @property
    def limit(self) -> int | None:
        return self._limit

    def warnings(self) -> list[str]:
        """What an operator should look at: a limit that is set and cannot be kept."""
        if self._limit is None or self.problem is None:
            return []
        return [f"mount-memory-limit is not in force: {self.problem}"]

    async def enter(self, pid: int, token: str) -> None:
        """Puts a process that has just been started into a group of its own, with the limit."""
        backend = self._backend
        if backend is None:
            return
        try:
            await off_loop("a control group", _SECONDS, lambda: backend.enter(pid, token, self._limit))
        except ProcessLookupError:
            pass  # it has ended already; whoever waits for it will see
        except (OSError, MooringError) as err:
            self._fail(err)
        else:
            self.problem = None

    def reason(self, token: str) -> str | None:
        """Why the process of this start was killed, if that was its memory limit."""
        if token not in self._reasons and self._backend is not None and self._limit is not None:
            with contextlib.suppress(OSError, ValueError):
                if self._backend.oom_kills(token) > 0:
                    self._remember(token)
        return self._reasons.get(token)

    async def leave(self, token: str) -> None:
        """Removes the group of an ended process. Idempotent; also for groups that a former agent made."""
        backend = self._backend
        if backend is None:
            return
        self.reason(token)
        try:
            if not await off_loop(
                "the removal of a control group", _SECONDS, lambda: backend.leave(token, _LEAVE_SECONDS)
            ):
                log.info("a control group still has processes", token=token)
        except (OSError, MooringError) as err:
            log.info("a control group was not removed", token=token, error=str(err))

    async def sweep(self, tokens: Collection[str]) -> int:
        """Removes the groups of starts that nobody knows any more. Returns how many."""
        backend = self._backend
        if backend is None:
            return 0
        known = frozenset(tokens)

        def work() -> int:
            return sum(backend.leave(token, 0.0) for token in backend.tokens() if token not in known)

        try:
            return await off_loop("the removal of old control groups", _SECONDS, work)
        except (OSError, MooringError) as err:
            log.info("old control groups were not removed", error=str(err))
            return 0

    async def close(self) -> None:
        """Removes what holds the groups if it is empty; groups of living processes stay."""
        if self._backend is not None:
            with contextlib.suppress(OSError, MooringError):
                await off_loop("the removal of a control group", _SECONDS, self._backend.close)

    def _remember(self, token: str) -> None:
        limit = "unknown" if self._limit is None else str(ByteSize(self._limit))
        self._reasons[token] = f"out of memory: its limit is {limit} (mount-memory-limit)"
        while len(self._reasons) > _REMEMBERED:
            del self._reasons[next(iter(self._reasons))]

    def _fail(self, err: Exception) -> None:
        text = err.strerror if isinstance(err, OSError) and err.strerror else str(err)
        problem = f"the control group of a mount process cannot be made ({text})"
        if self.problem is None:
            self._complain(problem)
        self.problem = problem

    def _complain(self, problem: str) -> None:
        if self._limit is not None:
            log.warning("the memory limit of mount processes is not in force", reason=problem)
        else:
            log.info("mount processes have no control groups of their own", reason=problem)


class _NotHere(Exception):
    """Why this host gives no control groups."""


def _find_backend(agent_id: str) -> Backend:
    """The backend for this host. Raises `_NotHere`."""
    if _SYSTEMD.is_dir():
        if (program := shutil.which("busctl", path="/usr/bin:/bin")) is None:
            raise _NotHere("systemd runs here, but its program busctl is not installed")
        return SystemdScopes(program)
    try:
        place = find_hierarchy()
    except (OSError, ValueError) as err:
        raise _NotHere(f"the control groups of this host cannot be read ({err})") from None
    if place is None:
        raise _NotHere("no hierarchy with the memory controller is mounted")
    beside = place.own.parent if place.nested else place.own
    backend = Directories(beside / f"mooring-{agent_id}", place.version)
    try:
        backend.prepare()
    except OSError as err:
        raise _NotHere(f"no control groups can be made below {backend.base.parent} ({err.strerror})") from None
    return backend


# --- without systemd --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where this process is in the hierarchy with the memory controller. `nested`: `own` is not the root of what can be
    seen.
    """

    own: Path
    version: int
    nested: bool


def find_hierarchy(proc: Path = Path("/proc/self")) -> Hierarchy | None:
    """The hierarchy that accounts memory here; None if there is none. Raises OSError or ValueError."""
    groups: dict[str, str] = {}
    for line in (proc / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            groups[name] = path
    for entry in read_mountinfo():
        root = Path(entry.mount_point)
        if entry.fstype == "cgroup2" and "" in groups:
            with contextlib.suppress(OSError):
                if "memory" in (root / "cgroup.controllers").read_text().split():
                    return _placed(root, entry.root, groups[""], 2)
        if entry.fstype == "cgroup" and "memory" in entry.super_options and "memory" in groups:
            return _placed(root, entry.root, groups["memory"], 1)
    return None


def _placed(mount_point: Path, root: str, group: str, version: int) -> Hierarchy:
    """`root`: which group is mounted there. Inside a container that may be the container's own."""
    if root != "/" and (group == root or group.startswith(root + "/")):
        group = group[len(root) :]
    own = mount_point / group.lstrip("/")
    if ".." in own.parts or not own.is_dir():
        own = mount_point  # our group lies outside of what is mounted here
    return Hierarchy(own, version, nested=own != mount_point)


class Directories:
    """Directories of a cgroup file system that nobody else manages."""

    def __init__(self, base: Path, version: int) -> None:
        self.base = base
        self._version = version

    @property
    def kind(self) -> str:
        return f"v{self._version}"

    def prepare(self) -> None:
        """Makes the base; in v2 hands the memory controller down to it. Raises OSError without the right to."""
        self.base.mkdir(mode=0o755, exist_ok=True)
        if self._version == 2:
            try:
                for place in (self.base.parent, self.base):
                    control = place / "cgroup.subtree_control"
                    if "memory" not in control.read_text().split():
                        control.write_text("+memory")
            except OSError:
                with contextlib.suppress(OSError):
                    self.base.rmdir()
                raise

    def enter(self, pid: int, token: str, limit: int | None) -> None:
        try:
            self._enter(pid, token, limit)
        except FileNotFoundError:
            self._enter(pid, token, limit)  # somebody swept it away while it was still empty

    def _enter(self, pid: int, token: str, limit: int | None) -> None:
        self.prepare()
        group = self.base / token
        group.mkdir(mode=0o755, exist_ok=True)
        if limit is not None:
            self._set_limit(group, limit)
        (group / "cgroup.procs").write_text(str(pid))

    def _set_limit(self, group: Path, limit: int) -> None:
        if self._version == 2:
            (group / "memory.max").write_text(str(limit))
            with contextlib.suppress(FileNotFoundError):  # a kernel without swap accounting
                (group / "memory.swap.max").write_text("0")
            return
        (group / "memory.limit_in_bytes").write_text(str(limit))
        with contextlib.suppress(FileNotFoundError):
            (group / "memory.memsw.limit_in_bytes").write_text(str(limit))

    def oom_kills(self, token: str) -> int:
        name = "memory.events" if self._version == 2 else "memory.oom_control"
        return _counter((self.base / token / name).read_text(), "oom_kill")

    def leave(self, token: str, patience: float) -> bool:
        group = self.base / token
        end = time.monotonic() + patience
        while True:
            try:
                group.rmdir()
            except FileNotFoundError:
                return True
            except OSError as err:
                if err.errno != errno.EBUSY:
                    raise
                if time.monotonic() >= end:
                    return False
                time.sleep(_PAUSE_SECONDS)  # a process leaves its group a moment after its end is known
            else:
                return True

    def tokens(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return [place.name for place in self.base.iterdir() if place.is_dir()]
        return []

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.base.rmdir()


# --- with systemd -----------------------------------------------------------------------------------------------------


class SystemdScopes:
    """Transient scopes, asked of systemd over its bus by `busctl`, which comes with it."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._killed = 0  # of the whole slice, at the last look
        with contextlib.suppress(OSError, ValueError):
            self._killed = self._slice_kills()

    @property
    def kind(self) -> str:
        return "systemd"

    def enter(self, pid: int, token: str, limit: int | None) -> None:
        properties = [
            ("Description", "s", "S3 mount process of Mooring"),
            ("PIDs", "au", "1", str(pid)),
            ("Slice", "s", _SLICE),
            ("CollectMode", "s", "inactive-or-failed"),
            ("MemoryAccounting", "b", "true"),
        ]
        if limit is not None:
            properties += [("MemoryMax", "t", str(limit)), ("MemorySwapMax", "t", "0")]
        flat = [word for item in properties for word in item]
        self._call("StartTransientUnit", "ssa(sv)a(sa(sv))", _unit(token), "fail", str(len(properties)), *flat, "0")
        end = time.monotonic() + _LEAVE_SECONDS
        while not self._place(token).is_dir() and time.monotonic() < end:
            time.sleep(_PAUSE_SECONDS)  # the call only queues the job

    def oom_kills(self, token: str) -> int:
        """systemd removes the group as soon as it is empty; then the count of the slice must do, which holds those of
        all its groups: somebody in it was killed since the last look.
        """
        before, self._killed = self._killed, self._slice_kills()
        try:
            return _counter((self._place(token) / "memory.events").read_text(), "oom_kill")
        except OSError:
            return max(0, self._killed - before)

    def leave(self, token: str, patience: float) -> bool:
        return not self._place(token).is_dir()  # the scope ends with its process, by itself

    def tokens(self) -> list[str]:
        return []

    def close(self) -> None:
        """Nothing: systemd removes an empty slice."""

    def _slice_kills(self) -> int:
        return _counter((self._root() / "memory.events").read_text(), "oom_kill")

    def _place(self, token: str) -> Path:
        return self._root() / _unit(token)

    def _root(self) -> Path:
        for entry in read_mountinfo():
            if entry.fstype == "cgroup2":
                return Path(entry.mount_point) / _SLICE
        return Path("/sys/fs/cgroup/memory") / _SLICE

    def _call(self, method: str, *words: str) -> None:
        target = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
        try:
            answer = subprocess.run(
                [self._program, "--system", f"--timeout={_SECONDS / 2:g}", "call", *target, method, *words],
                capture_output=True,
                timeout=_SECONDS,
                stdin=subprocess.DEVNULL,
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise OSError(errno.ETIMEDOUT, "systemd does not answer") from None
        if answer.returncode != 0:
            text = answer.stderr.decode(errors="replace").strip()
            raise OSError(errno.EIO, f"systemd refused a scope: {text[:300]}")


def _unit(token: str) -> str:
    return f"mooring-{token}.scope"


def _counter(text: str, name: str) -> int:
    """The number after `name` in lines of "name number"; 0 if it is not there (Linux before 4.13)."""
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
