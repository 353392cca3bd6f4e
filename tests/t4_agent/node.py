"""A node for tests: short paths, a manager's signing key, grants, and an agent in this process or in one of its own."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from agent_plugin.attachments import Attachments
from agent_plugin.config import AgentConfig
from agent_plugin.kernel import MountEntry, entries_below, unmount
from agent_plugin.main import running
from storage_proxy.client.agent import AgentClient
from storage_proxy.core.crypto import SealingKey, seal
from storage_proxy.core.ids import AccessMode, QuotaScopeID, VFolderID
from storage_proxy.core.tokens import Purpose, SigningKey, TokenSigner
from storage_proxy.core.wire import Location, MountRequest, Ownership, S3Credential

AGENT_ID = "node-t4"
SCOPE = QuotaScopeID.parse(f"user:{uuid.UUID(int=7)}")


def skip_reason() -> str | None:
    """Why nothing can be mounted here, or None."""
    if os.geteuid() != 0:
        return "needs root to mount"
    if not Path("/dev/fuse").exists():
        return "there is no /dev/fuse"
    if shutil.which("s3fs") is None:
        return "s3fs is not installed"
    return None


async def until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Polls a condition; fails when it does not hold in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what}")
        await asyncio.sleep(0.01)


async def until_async(condition: Callable[[], Awaitable[bool]], what: str, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not await condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what}")
        await asyncio.sleep(0.02)


@dataclass
class Node:
    """`place` is short: a unix socket path has 107 bytes."""

    endpoint: str
    credential: S3Credential
    place: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="mooring-t4-")))

    def __post_init__(self) -> None:
        self.signing_key = SigningKey.ed25519_load_or_create(self.place / "grant.pem")
        (self.place / "state").mkdir(mode=0o700)
        self.sealing_key = SealingKey.load_or_create(self.place / "state" / "sealing.key")

    @property
    def runtime(self) -> Path:
        return self.place / "run"

    @property
    def socket(self) -> Path:
        return self.runtime / "agent.sock"

    def config(self, **agent: Any) -> AgentConfig:
        redis = agent.pop("redis", None)
        volume_plugin = agent.pop("volume_plugin", None)
        driver = agent.pop("driver", {})
        section = {
            "id": AGENT_ID,
            "state-dir": str(self.place / "state"),
            "runtime-dir": str(self.runtime),
            "grace-period": 0.0,
            "stop-mounts-on-exit": True,
            **{key.replace("_", "-"): value for key, value in agent.items()},
        }
        data: dict[str, Any] = {
            "agent": section,
            "grants": {"public-key-files": [str(self.place / "grant.pub")]},
            "driver": driver,
        }
        if redis is not None:
            data["redis"] = redis
        if volume_plugin is not None:
            data["volume-plugin"] = volume_plugin
        return AgentConfig.model_validate(data)

    def request(self, bucket: str, prefix: str = "", **changes: Any) -> MountRequest:
        """What a grant permits; `changes` replace parts of it. The credential is the server's administrator."""
        credential = changes.pop("credential", self.credential)
        credential_id = changes.pop("credential_id", "admin")
        receiver = changes.pop("receiver", self.sealing_key.public)
        context = changes.pop("context", credential_id)
        endpoint = changes.pop("endpoint", self.endpoint)
        values: dict[str, Any] = {
            "volume": "minio",
            "vfid": str(VFolderID.new(SCOPE)),
            "location": Location(endpoint=endpoint, bucket=bucket, prefix=prefix),
            "mode": AccessMode.READ_WRITE,
            "ownership": Ownership(uid=1000, gid=1000),
            "target": "/data",
            "credential_id": credential_id,
            "sealed_credential": seal(credential.to_sealable(), receiver, context),
        }
        return MountRequest.model_validate({**values, **changes})

    def grant(
        self,
        request: MountRequest,
        session: str | None = None,
        *,
        audience: str = f"agent:{AGENT_ID}",
        lifetime: float = 300.0,
        purpose: Purpose = Purpose.GRANT,
        key: SigningKey | None = None,
    ) -> str:
        signer = TokenSigner(audience, [key or self.signing_key])
        data = {"mount": request.model_dump(mode="json")}
        return signer.issue(purpose, session or new_session(), timedelta(seconds=lifetime), data)

    @asynccontextmanager
    async def agent(self, **settings: Any) -> AsyncIterator[AgentClient]:
        """An agent in this process, and a client of it."""
        async with self.manager(**settings) as (client, _):
            yield client

    @asynccontextmanager
    async def manager(self, **settings: Any) -> AsyncIterator[tuple[AgentClient, Attachments]]:
        """As `agent`, with what is behind the API."""
        async with running(self.config(**settings)) as agent, agent.server, AgentClient(self.socket) as client:
            yield client, agent.attachments

    # --- what is left -------------------------------------------------------------------------------------------------

    def mounts(self) -> list[MountEntry]:
        """FUSE mounts and their binds below the runtime directory."""
        return [entry for entry in entries_below(self.runtime) if entry.is_fuse]

    def processes(self) -> list[int]:
        """Mount processes of this node."""
        return processes_with(str(self.runtime / "stage"))

    def credentials(self) -> list[Path]:
        return _files(self.runtime / "creds")

    def scratch(self) -> list[Path]:
        return _files(self.place / "state" / "scratch")

    def staged(self) -> list[Path]:
        return _files(self.runtime / "stage")

    def residue(self) -> dict[str, object]:
        """Everything that should be gone when nothing is attached."""
        found: dict[str, object] = {
            "mounts": [entry.mount_point for entry in self.mounts()],
            "processes": self.processes(),
            "credentials": self.credentials(),
            "scratch": self.scratch(),
            "stage": self.staged(),
            "pool": _files(self.runtime / "pool"),
            "sessions": _files(self.runtime / "ses"),
        }
        return {name: value for name, value in found.items() if value}

    def destroy(self) -> None:
        """Whatever a failed test left."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        while entries := entries_below(self.place):
            unmount(Path(entries[-1].mount_point), lazy=True)
        shutil.rmtree(self.place, ignore_errors=True)


def new_session() -> str:
    return f"s-{secrets.token_hex(6)}"


def processes_with(path: str) -> list[int]:
    """Processes with an argument that starts with `path`."""
    wanted = os.fsencode(path)
    return [pid for pid in _pids() if any(argument.startswith(wanted) for argument in _arguments(pid))]


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _arguments(pid: int) -> list[bytes]:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def _files(place: Path) -> list[Path]:
    try:
        return sorted(place.iterdir())
    except FileNotFoundError:
        return []


class AgentProcess:
    """`mooring agent serve` as a process of its own, to be killed."""

    def __init__(self, node: Node, program: str = "storage_proxy agent serve", **settings: Any) -> None:
        self._node = node
        self._program = program.split()
        self._config = node.place / "agent.toml"
        self._config.write_text(_toml(node.config(**settings)))
        self.log = node.place / "agent.log"
        self._process: asyncio.subprocess.Process | None = None

    @property
    def config(self) -> Path:
        return self._config

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def wait(self, seconds: float = 30.0) -> int:
        """Until it has ended; its exit status."""
        assert self._process is not None
        async with asyncio.timeout(seconds):
            return await self._process.wait()

    async def start(self, seconds: float = 30.0) -> AgentClient:
        """Returns when it answers, which must be within so many seconds."""
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", *self._program, "--config", str(self._config)),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        client = AgentClient(self._node.socket)

        async def answers() -> bool:
            if self._process is not None and self._process.returncode is not None:
                raise AssertionError(f"the agent ended:\n{self.log.read_text()[-3000:]}")
            try:
                await client.identity()
            except Exception:
                return False
            return True

        try:
            await until_async(answers, "the agent answers", seconds)
        except BaseException:
            await client.close()
            raise
        return client

    async def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    async def terminate(self) -> int:
        assert self._process is not None
        self._process.terminate()
        async with asyncio.timeout(30):
            return await self._process.wait()

    async def close(self) -> None:
        if self._process is not None and self._process.returncode is None:
            await self.kill()


def _toml(config: AgentConfig) -> str:
    import tomlkit

    return tomlkit.dumps(config.model_dump(mode="json", by_alias=True, exclude_none=True))
