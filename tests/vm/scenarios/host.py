"""The agent of this machine, under systemd with the project's unit where systemd is, else as a process of ours."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from agent_plugin.config import AgentConfig
from agent_plugin.kernel import entries_below, unmount
from agent_plugin.supervisor import ProcessID
from storage_proxy.client.agent import AgentClient
from storage_proxy.core.crypto import SealingKey
from storage_proxy.core.errors import MooringError
from storage_proxy.core.tokens import SigningKey
from storage_proxy.core.wire import BindSpec, MountRequest
from tests.t4_agent.node import AgentProcess, Node, _toml
from tests.t4_agent.podman import Podman

ABILITIES = frozenset(os.environ.get("MOORING_VM_ABILITIES", "").split(","))
SLOWNESS = float(os.environ.get("MOORING_VM_SLOWNESS", "1"))
# Survives a power cut; /tmp does not everywhere.
PLACE = Path("/var/tmp/mooring-vm")
UNIT = "mooring-agent.service"
# Between two looks and between two reads; an emulated machine has no time for more.
_PAUSE = 0.05 * SLOWNESS


async def until(condition: Callable[[], Awaitable[bool]] | Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Polls a condition; the deadline stretches with the slowness of the machine."""
    end = time.monotonic() + seconds * SLOWNESS
    while True:
        answer = condition()
        if answer if isinstance(answer, bool) else await answer:
            return
        assert time.monotonic() < end, f"not within {seconds * SLOWNESS:.0f} s: {what}"
        await asyncio.sleep(_PAUSE)


@dataclass
class HostNode(Node):
    """A node at the places of the unit; what it knows survives the process that runs the scenarios."""

    def __post_init__(self) -> None:
        self.place.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.signing_key = SigningKey.ed25519_load_or_create(self.place / "grant.pem")
        self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.sealing_key = SealingKey.load_or_create(self.state / "sealing.key")

    @property
    def state(self) -> Path:
        return Path("/var/lib/mooring/agent")

    @property
    def runtime(self) -> Path:
        return Path("/run/mooring/agent")

    def config(self, **agent: Any) -> AgentConfig:
        """Patient: the machine may be emulated, and a slow answer is no hang there."""
        settings = {
            "state-dir": str(self.state),
            "runtime-dir": str(self.runtime),
            "stop-mounts-on-exit": False,
            "grace-period": 0.0,
            "mount-deadline": min(120.0, 20.0 * SLOWNESS),
            "watch-interval": max(1.0, SLOWNESS / 2),
            "hang-deadline": 5.0 * SLOWNESS,
            "repair-pause": 2.0,
            **{key.replace("_", "-"): value for key, value in agent.items()},
        }
        return super().config(**settings)

    def scratch(self) -> list[Path]:
        place = self.state / "scratch"
        return sorted(place.iterdir()) if place.is_dir() else []


class AgentService(Protocol):
    """Starting and stopping, as an operator does it."""

    log: Path

    async def start(self) -> AgentClient: ...
    async def terminate(self) -> int: ...
    async def kill(self) -> None: ...
    async def close(self) -> None: ...


class AgentUnit:
    """The unit of configs/systemd, as provision.sh installed it. It runs on between scenarios with equal settings."""

    def __init__(self, node: HostNode, **settings: Any) -> None:
        self._node = node
        self._killed = ""
        self._began = time.time()
        self.log = Path("/var/log/mooring-vm-agent.log")
        config, wanted = Path("/etc/mooring/agent.toml"), _toml(node.config(**settings))
        self._changed = not config.exists() or config.read_text() != wanted
        if self._changed:
            config.write_text(wanted)
            config.chmod(0o600)

    async def start(self) -> AgentClient:
        await systemctl("enable", UNIT)
        await systemctl("restart" if self._changed else "start", UNIT)
        self._changed = False
        return await self.answering()

    async def answering(self) -> AgentClient:
        """Also after systemd itself restarted it."""
        client = AgentClient(self._node.socket, timeout=60 * SLOWNESS)
        await until(lambda: answers(client), f"the agent answers; {await self.status()}")
        return client

    async def terminate(self) -> int:
        await systemctl("stop", UNIT)
        return 0

    async def kill(self) -> None:
        """SIGKILL to the agent alone; systemd starts it again by itself (see `started_again`)."""
        self._killed = await self._main_pid()
        await systemctl("kill", "--kill-whom=main", "--signal=KILL", UNIT)

    async def started_again(self) -> AgentClient:
        async def another() -> bool:
            return await self._main_pid() not in ("0", self._killed)

        await until(another, "systemd starts the agent again")
        return await self.answering()

    async def _main_pid(self) -> str:
        _, output = await command("systemctl", "show", "--property=MainPID", "--value", UNIT)
        return output.strip()

    async def status(self) -> str:
        _, output = await command("systemctl", "status", "--no-pager", "--lines=30", UNIT)
        return output

    async def close(self) -> None:
        arguments = ("--no-pager", "--output=cat", f"--since=@{self._began:.0f}", "--unit", UNIT)
        _, output = await command("journalctl", *arguments)
        self.log.write_text(output)

    async def stop(self) -> None:
        await command("systemctl", "stop", UNIT)


class PatientProcess(AgentProcess):
    """A process of ours, which may take its time on an emulated machine."""

    async def start(self, seconds: float = 60.0 * SLOWNESS) -> AgentClient:
        return await super().start(seconds)


async def answers(client: AgentClient) -> bool:
    try:
        await client.identity()
    except MooringError:
        return False
    return True


async def command(*argv: str, seconds: float = 120.0) -> tuple[int, str]:
    """Exit code and output; the deadline stretches with the slowness of the machine."""
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    async with asyncio.timeout(seconds * SLOWNESS):
        output, _ = await process.communicate()
    return process.returncode or 0, output.decode(errors="replace")


async def systemctl(*arguments: str) -> None:
    code, output = await command("systemctl", *arguments)
    assert code == 0, f"systemctl {' '.join(arguments)}: {output}"


@dataclass
class Host:
    """What a scenario works with: `node` makes grants and finds residue, `service` is the agent, `agent` calls it."""

    node: HostNode
    service: AgentService
    agent: AgentClient
    podman: Podman
    folder: str
    readers: list[Reader] = field(default_factory=list)

    async def attach(self, request: MountRequest | None = None, session: str | None = None) -> BindSpec:
        wanted = request or self.node.request(self.folder, "data")
        return await self.agent.attach(self.node.grant(wanted, session), timeout=60 * SLOWNESS)

    async def reader(self, spec: BindSpec, *, mount: str = "") -> Reader:
        """A container that reads its folder without pause; it has read well when this returns."""
        place = Path(tempfile.mkdtemp(prefix="log-", dir=self.node.place))
        log = place / "reads"
        script = (
            'exec >>/log/reads; while :; do if [ "$(cat /data/hello.txt 2>&1)" = "hello from data/" ]; '
            f"then echo ok; else echo failed; fi; sleep {_PAUSE}; done"
        )
        options = (f"--volume={place}:/log", f"--pidfile={place / 'pid'}")
        name = await self.podman.start(spec, command=("/bin/sh", "-c", script), mount=mount, options=options)
        process = ProcessID.of(int((place / "pid").read_text()))
        assert process is not None, "the container runs"
        reader = Reader(self, name, log, process)
        self.readers.append(reader)
        await reader.reads_well()
        return reader

    async def restart(self) -> None:
        """The agent stops in good order and comes again."""
        await self.agent.close()
        await self.service.terminate()
        self.agent = await self.service.start()

    async def state(self, key: str) -> str:
        return next((str(item.state) for item in await self.agent.mounts() if item.key == key), "absent")


@dataclass
class Reader:
    """A container whose shell reads a file, checks its content and writes `ok` or `failed`, up to 20 times a second."""

    host: Host
    name: str
    log: Path
    process: ProcessID

    def counts(self) -> tuple[int, int]:
        """Good reads, failed reads."""
        lines = self.log.read_text().split()
        return lines.count("ok"), lines.count("failed")

    async def reads_well(self, further: int = 3, seconds: float = 60) -> None:
        """Waits for some good reads from now on, the last of them without a failure between."""
        start = len(self.log.read_text().split()) if self.log.exists() else 0

        def well() -> bool:
            lines = self.log.read_text().split()[start:] if self.log.exists() else []
            return len(lines) >= further and lines[-further:] == ["ok"] * further

        try:
            await until(well, "the container reads its folder", seconds)
        except AssertionError:
            said = await self.host.podman.execute(self.name, "ls -ln /data; cat /data/hello.txt")
            raise AssertionError(f"the container does not read: {said}, {await self.host.agent.mounts()}") from None

    def is_the_same(self) -> bool:
        """It was never restarted: its first process is the one it began with."""
        return self.process.runs


def make_service(node: HostNode, **settings: Any) -> AgentService:
    if "systemd" in ABILITIES:
        return AgentUnit(node, **settings)
    node.runtime.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return PatientProcess(node, **settings)


@asynccontextmanager
async def running_host(node: HostNode, podman: Podman, folder: str, **settings: Any) -> AsyncIterator[Host]:
    """Everything runs; at the end nothing may be left, and the agent's log is on standard output."""
    service = make_service(node, **settings)
    made: Host | None = None
    clean = False
    try:
        made = Host(node, service, await service.start(), podman, folder)
        yield made
        if made.readers:
            await podman("rm", "--force", "--time", "0", *(reader.name for reader in made.readers))
        for item in await made.agent.attachments():
            await made.agent.detach_session(item.session_id)
        await until(lambda: node.residue() == {}, "nothing is left behind")
        clean = True
    finally:
        print(f"--- left: {node.residue()}")
        if made is not None:
            await made.agent.close()
        await service.close()
        print(f"--- the agent's log\n{_tail(service.log)}")
        if not clean:
            if isinstance(service, AgentUnit):
                await service.stop()
            wipe(node)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-12_000:] if log.exists() else ""


def take_down(place: Path) -> None:
    """Whatever is mounted at or below a path, and nobody uses any more."""
    while entries := entries_below(place):
        unmount(Path(entries[-1].mount_point), lazy=True)


def wipe(node: HostNode) -> None:
    """Whatever a failed scenario left, so that the next one fails for reasons of its own."""
    for pid in node.processes():
        os.kill(pid, signal.SIGKILL)
    for place in (node.runtime, node.place):
        take_down(place)
    for place in (node.place, node.state, node.runtime):
        shutil.rmtree(place, ignore_errors=True)
