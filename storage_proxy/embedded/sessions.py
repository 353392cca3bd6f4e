"""Running a command in a session on this machine: in a container, or in a mount namespace where no container works.

Both give the command a tiny root of its own (a static busybox), the binds of the session, a uid and gid, no network and
no more rights than that user has. Which one is used is found out once, by a real run, and said with its reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ..core.errors import ConfigError, DeadlineExceeded, MountNotPermitted
from ..core.logs import get_logger, redact_text
from ..core.secrets import write_private
from ..core.wire import BindSpec
from .process import child_environment, die_with_parent, finish
from .residue import mounts_below, processes_naming
from .state import StateDirectory, disk_error

log = get_logger(__name__)

PROBE_DEADLINE_SECONDS = 10.0
REMOVE_DEADLINE_SECONDS = 10.0
SETTLE_DEADLINE_SECONDS = 5.0
MAX_OUTPUT_BYTES = 4 * 1024 * 1024
SESSION_PATH = "/bin:/usr/bin:/sbin:/usr/sbin"

_PT_INTERP = 3


class Runtime(StrEnum):
    """The text is what results and tables show."""

    PODMAN = "podman"
    NAMESPACE = "mount namespace"


@dataclass(frozen=True, slots=True)
class RuntimeChoice:
    """`reason`: why it is not podman, or which OCI runtime podman drives."""

    runtime: Runtime
    reason: str
    oci_runtime: str = ""


@dataclass(frozen=True, slots=True)
class SessionCommand:
    """What to run: `binds` as the agent returned them, `deadline` in seconds."""

    argv: Sequence[str]
    binds: Sequence[BindSpec]
    uid: int = 0
    gid: int = 0
    deadline: float = 300.0
    capture: bool = True  # False: the command writes to the caller's own standard output and error
    interactive: bool = False  # the caller's standard input is passed on
    workdir: str = "/"


@dataclass(frozen=True, slots=True)
class SessionResult:
    exit_code: int
    stdout: str
    stderr: str
    seconds: float


class SessionRunner:
    """Runs commands for one stack. `choose` first; `run` may be called several times, also at the same time."""

    def __init__(self, state: StateDirectory) -> None:
        self._state = state
        self._choice: RuntimeChoice | None = None

    async def choose(self) -> RuntimeChoice:
        """Finds out what works here, once. Raises `ConfigError` without a static busybox, `MountNotPermitted` when
        neither a container nor a mount namespace can be made."""
        if self._choice is None:
            self._choice = await self._probe()
            log.info("session runtime", runtime=self._choice.runtime.value, reason=self._choice.reason)
        return self._choice

    async def _probe(self) -> RuntimeChoice:
        find_busybox()
        reason = await self._probe_podman()
        if isinstance(reason, RuntimeChoice):
            return reason
        choice = RuntimeChoice(Runtime.NAMESPACE, reason)
        trial = SessionCommand(argv=["/bin/true"], binds=[], uid=1000, gid=1000, deadline=PROBE_DEADLINE_SECONDS)
        result = await self._run_namespace(trial)
        if result.exit_code != 0:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise MountNotPermitted(
                f"No session can be run here: {reason}; and a mount namespace is refused ({last[:200]}).",
                hint="Run as root with CAP_SYS_ADMIN, or install podman.",
            )
        return choice

    async def _probe_podman(self) -> RuntimeChoice | str:
        """The choice, or why podman does not do."""
        if shutil.which("podman") is None:
            return "podman is not installed"
        oci_runtimes = [name for name in ("runc", "crun") if shutil.which(name)]
        if not oci_runtimes:
            return "podman has no OCI runtime (neither runc nor crun is installed)"
        reason = ""
        for name in oci_runtimes:
            self._write_containers_conf(name)
            trial = SessionCommand(argv=["/bin/true"], binds=[], uid=1000, gid=1000, deadline=PROBE_DEADLINE_SECONDS)
            try:
                result = await self._run_podman(trial)
            except DeadlineExceeded:
                reason = f"podman with {name} did not finish a trial run within {PROBE_DEADLINE_SECONDS:g} s"
                continue
            if result.exit_code == 0:
                return RuntimeChoice(Runtime.PODMAN, f"with {name}", name)
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            reason = f"podman with {name} failed a trial run ({redact_text(last)[:200]})"
        return reason

    async def run(self, command: SessionCommand) -> SessionResult:
        """Runs to the end; nothing of the session is left afterwards, also on cancellation.

        Raises `DeadlineExceeded`. A command that fails is no error: see `exit_code` (125: the runtime itself failed).
        """
        choice = await self.choose()
        return await (self._run_podman(command) if choice.runtime is Runtime.PODMAN else self._run_namespace(command))

    async def remove_leftovers(self) -> None:
        """Removes containers that a killed stack left running (they survive their starter).

        Again until no podman of this stack runs: one that was just starting a container may do so after the first time.
        """
        if not self._podman_root.is_dir() or shutil.which("podman") is None or not self._conf.exists():
            return
        end = time.monotonic() + REMOVE_DEADLINE_SECONDS
        while True:
            await self._podman_quietly("rm", "--force", "--all", "--time", "0")
            if not processes_naming(self._podman_run) or time.monotonic() > end:
                return
            await asyncio.sleep(0.1)

    # --- the root file system -----------------------------------------------------------------------------------------

    @property
    def _sessions_dir(self) -> Path:
        return self._state.runtime_dir / "sessions"

    def _make_root(self, name: str, command: SessionCommand) -> Path:
        """A root of its own for every session, so that mount points made in it go with it."""
        folder = self._sessions_dir / name
        root = folder / "root"
        try:
            for sub in ("bin", "etc", "dev", "proc", "sys", "tmp", "run", "var/tmp", "root", "home/work"):
                (root / sub).mkdir(mode=0o755, parents=True)
            (root / "tmp").chmod(0o1777)
            busybox = find_busybox()
            shutil.copyfile(busybox, root / "bin" / "busybox")
            (root / "bin" / "busybox").chmod(0o755)
            for applet in _applets(busybox):
                (root / "bin" / applet).symlink_to("busybox")
            (root / "usr").mkdir(mode=0o755)
            (root / "usr" / "bin").symlink_to("../bin")
            users = {0: "root", command.uid: "root" if command.uid == 0 else "work"}
            groups = {0: "root", command.gid: "root" if command.gid == 0 else "work"}
            passwd = [f"{user}:x:{uid}:{command.gid if uid else 0}::/home/work:/bin/sh" for uid, user in users.items()]
            (root / "etc" / "passwd").write_text("\n".join(passwd) + "\n", encoding="ascii")
            group = [f"{text}:x:{gid}:" for gid, text in groups.items()]
            (root / "etc" / "group").write_text("\n".join(group) + "\n", encoding="ascii")
            for bind in command.binds:
                (root / bind.target.lstrip("/")).mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as err:
            shutil.rmtree(folder, ignore_errors=True)
            raise disk_error(err, f"Session directory {folder}") from None
        return root

    def _remove_root(self, name: str) -> None:
        folder = self._sessions_dir / name
        if not mounts_below(folder):  # never delete through a bind into somebody's data
            shutil.rmtree(folder, ignore_errors=True)

    # --- podman -------------------------------------------------------------------------------------------------------

    @property
    def _podman_root(self) -> Path:
        return self._state.containers_dir / "root"

    @property
    def _podman_run(self) -> Path:
        return self._state.runtime_dir / "podman" / "run"

    @property
    def _conf(self) -> Path:
        return self._state.containers_dir / "containers.conf"

    def _write_containers_conf(self, oci_runtime: str) -> None:
        """Everything podman keeps, below our directories: nothing of the machine's own podman is seen or changed.

        The limits are lowered because podman otherwise raises them, which needs CAP_SYS_RESOURCE.
        """
        base = self._state.containers_dir
        text = f"""[containers]
default_ulimits = ["nofile=1024:4096", "nproc=4096:4096"]
netns = "none"
log_driver = "none"
[engine]
runtime = {json.dumps(oci_runtime)}
cgroup_manager = "cgroupfs"
events_logger = "none"
lock_type = "file"
static_dir = {json.dumps(str(base / "static"))}
tmp_dir = {json.dumps(str(self._state.runtime_dir / "podman" / "tmp"))}
volume_path = {json.dumps(str(base / "volumes"))}
"""
        try:
            write_private(self._conf, text.encode())
        except OSError as err:
            raise disk_error(err, str(self._conf)) from None

    def _podman(self, *words: str) -> list[str]:
        # vfs: a session brings its root as a directory, so no image layers exist and no overlay mount is left.
        store = ["--root", str(self._podman_root), "--runroot", str(self._podman_run)]
        return ["podman", *store, "--storage-driver", "vfs", *words]

    def _podman_env(self) -> dict[str, str]:
        # podman 5 warns about a host with the older cgroups, on the standard error that belongs to the command.
        return child_environment({"CONTAINERS_CONF": str(self._conf), "PODMAN_IGNORE_CGROUPSV1_WARNING": "1"})

    async def _run_podman(self, command: SessionCommand) -> SessionResult:
        name = f"mooring-{uuid.uuid4().hex[:12]}"
        root = self._make_root(name, command)
        argv = self._podman("run", "--rm", "--name", name, "--network", "none", "--read-only")
        argv += ["--cap-drop", "all", "--security-opt", "no-new-privileges", "--pids-limit", "1024"]
        argv += [
            "--user",
            f"{command.uid}:{command.gid}",
            "--workdir",
            command.workdir,
            "--env",
            f"PATH={SESSION_PATH}",
        ]
        argv += ["--env", "HOME=/tmp"]
        if command.interactive:
            argv += ["--interactive"]
        for bind in command.binds:
            argv += ["--mount", bind.podman_mount()]
        argv += ["--rootfs", str(root), *command.argv]
        try:
            return await _execute(argv, self._podman_env(), command)
        except BaseException:
            # The container is no child of podman's client: it would go on running.
            await finish(self._podman_quietly("rm", "--force", "--ignore", "--time", "0", name))
            raise
        finally:
            await finish(_settled(Path(name), self._podman_run))
            self._remove_root(name)

    async def _podman_quietly(self, *words: str) -> None:
        trial = SessionCommand(argv=[], binds=[], deadline=REMOVE_DEADLINE_SECONDS)
        with contextlib.suppress(DeadlineExceeded):
            result = await _execute(self._podman(*words), self._podman_env(), trial)
            if result.exit_code != 0:
                log.warning("podman did not remove a container", error=result.stderr.strip()[-300:])

    # --- mount namespace ----------------------------------------------------------------------------------------------

    async def _run_namespace(self, command: SessionCommand) -> SessionResult:
        name = f"ns-{uuid.uuid4().hex[:12]}"
        root = self._make_root(name, command)
        spec = {
            "root": str(root),
            "binds": [(bind.source, bind.target, bind.read_only) for bind in command.binds],
            "uid": command.uid,
            "gid": command.gid,
            "workdir": command.workdir,
            "argv": list(command.argv),
            "env": {"PATH": SESSION_PATH, "HOME": "/tmp"},  # noqa: S108  # the session's own /tmp
        }
        # -I -S: only the standard library, whatever the environment says.
        argv = [sys.executable, "-I", "-S", str(Path(__file__).with_name("enter.py")), json.dumps(spec)]
        try:
            return await _execute(argv, child_environment(), command)
        finally:
            self._remove_root(name)


async def _settled(name: Path, run_root: Path) -> None:
    """Waits for the container's monitor and its clean-up, which end a little later than podman itself.

    The monitor carries the container's name. The clean-up carries only its id, which podman 5 has forgotten by now, so
    any clean-up of this stack's podman is waited for; it takes a fraction of a second.
    """
    end = time.monotonic() + SETTLE_DEADLINE_SECONDS
    while (processes_naming(name) or _cleans_up(run_root)) and time.monotonic() < end:  # noqa: ASYNC110  # not ours
        await asyncio.sleep(0.02)


def _cleans_up(run_root: Path) -> bool:
    wanted = {b"cleanup", os.fsencode(run_root)}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
                # The monitor has the same words among its own: they are what it will start.
                if wanted <= set(words) and not words[0].endswith(b"conmon"):
                    return True
    return False


async def _execute(argv: Sequence[str], env: dict[str, str], command: SessionCommand) -> SessionResult:
    """Runs a program with the deadline of `command`; it and its group are gone when this returns or raises."""
    begin = time.monotonic()
    pipe = asyncio.subprocess.PIPE if command.capture else None
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=None if command.interactive else asyncio.subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        env=env,
        # A person's Ctrl-C must not end podman before we remove the container; only a shared terminal keeps the group.
        start_new_session=not command.interactive,
        preexec_fn=die_with_parent(signal.SIGKILL),
    )
    try:
        async with asyncio.timeout(command.deadline):
            if command.capture:
                async with asyncio.TaskGroup() as group:
                    out = group.create_task(_read(process.stdout))
                    err = group.create_task(_read(process.stderr))
                code = await process.wait()
                texts = out.result(), err.result()
            else:
                code = await process.wait()
                texts = "", ""
    except TimeoutError:
        raise DeadlineExceeded(
            f"The command in the session did not end within {command.deadline:g} s.", hint="Give it more time."
        ) from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                if command.interactive:
                    process.kill()
                else:
                    os.killpg(process.pid, signal.SIGKILL)
            await finish(process.wait())
    return SessionResult(code if code >= 0 else 128 - code, *texts, time.monotonic() - begin)


async def _read(stream: asyncio.StreamReader | None) -> str:
    """Everything, but keeps at most `MAX_OUTPUT_BYTES` of it."""
    kept = bytearray()
    while stream is not None and (chunk := await stream.read(64 * 1024)):
        kept += chunk[: MAX_OUTPUT_BYTES - len(kept)]
    return kept.decode("utf-8", "surrogateescape")


# --- the busybox ------------------------------------------------------------------------------------------------------


def find_busybox() -> Path:
    """A statically linked busybox: it needs no libraries inside the session. Raises `ConfigError`."""
    for place in (shutil.which("busybox"), "/bin/busybox", "/usr/bin/busybox", "/usr/lib/busybox/busybox"):
        if place is not None and is_static(Path(place)):
            return Path(place)
    raise ConfigError(
        "No statically linked busybox is installed; sessions need it as their root file system.",
        hint="Run: apt-get install busybox-static.",
    )


def is_static(program: Path) -> bool:
    """True for an ELF file that asks for no interpreter (elf(5): no PT_INTERP program header)."""
    try:
        with program.open("rb") as file:
            head = file.read(64)
            if len(head) < 64 or head[:4] != b"\x7fELF" or head[4] != 2:
                return False
            order = "<" if head[5] == 1 else ">"
            (offset,) = struct.unpack_from(order + "Q", head, 32)
            size, count = struct.unpack_from(order + "HH", head, 54)
            file.seek(offset)
            table = file.read(size * count)
    except OSError:
        return False
    return all(struct.unpack_from(order + "I", table, size * number)[0] != _PT_INTERP for number in range(count))


@functools.cache
def _applets(busybox: Path) -> tuple[str, ...]:
    listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, timeout=10, check=False)
    return tuple(name for name in listed.stdout.split() if name.isprintable() and "/" not in name and name != "busybox")
