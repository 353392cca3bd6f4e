"""`StateDirectory`: everything a one-machine stack keeps between two starts, private to its owner.

    STATE/
      MOORING-STATE     says that this directory is ours; a non-empty directory without it is refused
      lock              held by the running `mooring up` (flock; the text is its pid)
      endpoints.json    where the running stack listens, 0600; only there while it runs
      config/           generated configuration of the daemons, 0600
      secrets/          generated secrets and keys, 0600; kept
      data/             S3 objects, SQLite files, the agent's journal; kept
      logs/             one file per process; the one before is NAME.log.1
      run/              pids of the children, scratch files of the job
      containers/       the container runtime's own storage

The mounts live outside of it, in `runtime_dir`: a short path (unix sockets) on a file system that a reboot empties.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ConfigError, InUse, MooringError, NoSpace
from ..core.ids import ByteSize
from ..core.secrets import Secret, read_or_create

MARKER = "MOORING-STATE"
LAYOUT_VERSION = "1"
MIN_FREE_BYTES = 64 * 1024 * 1024
STATE_VARIABLE = "MOORING_STATE"

_FOLDERS = ("config", "secrets", "data", "logs", "run", "containers")
_TEMPORARY = ("run", "config")  # made new by every start


def default_state_path(environ: Mapping[str, str] | None = None) -> Path:
    """`$MOORING_STATE`, else /var/lib/mooring for root, else `$XDG_STATE_HOME/mooring`."""
    env = os.environ if environ is None else environ
    if named := env.get(STATE_VARIABLE):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/lib/mooring")
    return Path(env.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mooring"


def disk_error(err: OSError, what: str) -> MooringError:
    """The error of the tree for a failed write of `what`: a full disk, or a directory that does not let us."""
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"The disk is full: {what} could not be written.", hint="Free space, then try again.")
    reason = os.strerror(err.errno) if err.errno else str(err)
    return ConfigError(
        f"{what} cannot be written ({reason}).", hint="Give --state DIR a directory that this user may write to."
    )


def check_free_space(path: Path, needed: int, purpose: str) -> int:
    """Free bytes of the file system of `path`; raises `NoSpace` below `needed`."""
    info = os.statvfs(path)
    free = info.f_bavail * info.f_frsize
    if free < needed:
        raise NoSpace(
            f"{path} has {ByteSize(free)} free, but {purpose} needs {ByteSize(needed)}.",
            hint="Free space there, or choose another disk with --state DIR.",
        )
    return free


@dataclass(frozen=True, slots=True)
class StateDirectory:
    """Paths and secrets of one stack. Make it with `open`, then hold `lock()` while anything runs."""

    path: Path
    runtime_dir: Path

    @classmethod
    def locate(cls, path: Path | None = None) -> StateDirectory:
        """Only the paths; touches nothing."""
        chosen = Path(os.path.abspath(path or default_state_path()))  # noqa: PTH100  # keeps symlinks as the user wrote them
        digest = hashlib.sha256(str(chosen).encode("utf-8", "surrogateescape")).hexdigest()[:10]
        if os.geteuid() == 0:
            runtime = Path("/run/mooring") / f"up-{digest}"
        elif base := os.environ.get("XDG_RUNTIME_DIR"):
            runtime = Path(base) / "mooring" / f"up-{digest}"
        else:
            runtime = chosen / "run" / "rt"
        return cls(chosen, runtime)

    @classmethod
    def open(cls, path: Path | None = None) -> StateDirectory:
        """Makes the directory or checks the existing one. Idempotent.

        Raises `ConfigError` (no right to write, somebody else's directory) or `NoSpace`.
        """
        state = cls.locate(path)
        try:
            state._prepare()
        except OSError as err:
            raise disk_error(err, f"State directory {state.path}") from None
        return state

    def _prepare(self) -> None:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        marker = self.path / MARKER
        if not marker.exists():
            strangers = sorted(item.name for item in self.path.iterdir() if item.name != "lost+found")
            if strangers:
                raise ConfigError(
                    f"{self.path} is not empty and is no Mooring state directory (it holds {strangers[0]!r}).",
                    hint="Give --state DIR an empty or a new directory.",
                )
            check_free_space(self.path, MIN_FREE_BYTES, "a stack")
            self.path.chmod(0o700)
            marker.write_text(f"{LAYOUT_VERSION}\n", encoding="ascii")
        elif (found := marker.read_text(encoding="ascii", errors="replace").strip()) != LAYOUT_VERSION:
            raise ConfigError(
                f"{self.path} has layout {found[:20]!r}, this version writes {LAYOUT_VERSION!r}.",
                hint="Use the version that made it, or another directory.",
            )
        else:
            check_free_space(self.path, MIN_FREE_BYTES, "a stack")
        for name in _FOLDERS:
            (self.path / name).mkdir(mode=0o700, exist_ok=True)
            (self.path / name).chmod(0o700)
        probe = self.path / "run" / ".writable"
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()

    # --- paths --------------------------------------------------------------------------------------------------------

    @property
    def config_dir(self) -> Path:
        return self.path / "config"

    @property
    def secrets_dir(self) -> Path:
        return self.path / "secrets"

    @property
    def data_dir(self) -> Path:
        return self.path / "data"

    @property
    def logs_dir(self) -> Path:
        return self.path / "logs"

    @property
    def run_dir(self) -> Path:
        return self.path / "run"

    @property
    def containers_dir(self) -> Path:
        return self.path / "containers"

    @property
    def endpoints_file(self) -> Path:
        return self.path / "endpoints.json"

    @property
    def processes_file(self) -> Path:
        return self.run_dir / "processes.json"

    @property
    def agent_runtime_dir(self) -> Path:
        """The agent's mounts, sockets and credential files."""
        return self.runtime_dir / "agent"

    def log_file(self, name: str) -> Path:
        return self.logs_dir / f"{name}.log"

    # --- secrets, lock, end -------------------------------------------------------------------------------------------

    def secret(self, name: str) -> Secret:
        """The generated secret `name`, made on first use and kept. Raises `NoSpace`, `ConfigError`."""
        path = self.secrets_dir / name
        try:
            return read_or_create(path)
        except OSError as err:
            raise disk_error(err, f"Secret file {path}") from None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held for the whole life of a stack; the kernel frees it when the process dies. Raises `InUse`."""
        path = self.path / "lock"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as err:
            raise disk_error(err, str(path)) from None
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "?"
                raise InUse(
                    f"A stack already runs on {self.path} (pid {holder}).",
                    hint="Stop it, or start another one with --state DIR and --port-base N.",
                ) from None
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(fd)

    def make_runtime_dir(self) -> None:
        """The private parent of the mounts. Raises `ConfigError`."""
        try:
            self.runtime_dir.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self.runtime_dir.mkdir(mode=0o700, exist_ok=True)
            self.runtime_dir.chmod(0o700)
        except OSError as err:
            raise disk_error(err, f"Runtime directory {self.runtime_dir}") from None

    def clear_temporary(self) -> None:
        """Removes what only a running stack needs. Nothing below the runtime directory may be mounted any more."""
        self.endpoints_file.unlink(missing_ok=True)
        for name in _TEMPORARY:
            shutil.rmtree(self.path / name, ignore_errors=True)
            (self.path / name).mkdir(mode=0o700, exist_ok=True)
        if self.runtime_dir.exists():
            shutil.rmtree(self.runtime_dir, ignore_errors=True)
        if self.runtime_dir.parent != self.run_dir:
            with suppress(OSError):  # other stacks may still use it
                self.runtime_dir.parent.rmdir()
