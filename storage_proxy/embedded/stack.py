"""`Stack`: the parts of a one-machine installation, started in order, watched, stopped in reverse.

    S3 (weed) -> Redis -> storage proxy -> manager extension -> agent

Each is an ordinary process with its own log. The daemons bring their databases to the newest schema by themselves. A
part that ends is started again with back-off; one that keeps ending takes the stack down with its reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import aiohttp

from ..client.agent import AgentClient
from ..core.errors import MooringError, ServiceUnavailable
from ..core.logs import get_logger
from ..core.secrets import Secret
from ..core.wire import S3Credential
from ..s3 import Endpoint
from .configs import AGENT_ID, VOLUME, StackParts, Written, write_configs
from .endpoints import AgentEndpoint, Endpoints, ManagerEndpoint, ProxyEndpoint, S3Endpoint
from .ports import HOST, PortPlan
from .process import ManagedProcess, ProcessRegistry, ProcessSpec, child_environment, finish
from .redis import redis_process
from .residue import clean
from .sessions import SessionRunner
from .state import StateDirectory
from .weed import WeedConfig, WeedIdentity, WeedPorts, WeedServer

log = get_logger(__name__)

BUCKET = "mooring"
DATASETS_BUCKET = "datasets"
HEALTH_DEADLINE_SECONDS = 6.0
RECLAIM_DEADLINE_SECONDS = 10.0
SESSIONS_END_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class OwnS3:
    """The operator's object store, in place of the embedded one."""

    endpoint: Endpoint
    credential: S3Credential
    bucket: str
    allow_plain_http: bool = False


@dataclass(frozen=True, slots=True)
class StackOptions:
    """What a start may choose. `mounts` False leaves the agent out (this machine may not mount)."""

    s3: OwnS3 | None = None
    redis_url: Secret | None = None
    database_url: Secret | None = None
    mounts: bool = True


@dataclass(frozen=True, slots=True)
class Part:
    """One line of the table "what runs where"."""

    name: str
    where: str
    pid: int | None
    log_file: Path | None


@dataclass(frozen=True, slots=True)
class Dataset:
    """Where the job finds an existing bucket directory, and the key that may only read it."""

    bucket: str
    prefix: str
    credential: S3Credential
    limited: bool


@dataclass(slots=True)
class Stack:
    """Hold the lock of `state` from before `clean_leftovers` until after `stop`."""

    state: StateDirectory
    ports: PortPlan
    options: StackOptions
    timings: dict[str, float] = field(default_factory=dict)
    _processes: list[ManagedProcess] = field(default_factory=list)
    _where: dict[str, str] = field(default_factory=dict)

    async def clean_leftovers(self) -> list[str]:
        """Takes away what a killed stack left on this state directory. Returns what that was, for people."""
        registry = ProcessRegistry(self.state.processes_file)
        # Containers first: they are nobody's children and hold the mounts.
        await SessionRunner(self.state).remove_leftovers()
        done = [f"ended {name}" for name in await registry.kill_leftovers()]
        done += await clean(self.state)
        self.state.clear_temporary()
        return done

    async def start(self, say: Callable[[str], None] = lambda _: None) -> Endpoints:
        """All parts or none: on any error, and when cancelled, what was started is stopped again."""
        try:
            return await self._start(say)
        except BaseException:
            await self.stop()
            raise

    async def _start(self, say: Callable[[str], None]) -> Endpoints:
        state, ports = self.state, self.ports
        state.make_runtime_dir()
        registry = ProcessRegistry(state.processes_file)
        embedded = self.options.s3 is None
        if embedded:
            weed = self._weed()
            # After kill -9 its first write may take long: a damaged volume is set aside first. With a full disk it does
            # not end by itself; killing it loses no acknowledged object.
            spec = ProcessSpec(
                name="s3",
                argv=weed.argv,
                env=weed.environment,
                cwd=weed.working_dir,
                log_file=state.log_file("s3"),
                ready=weed.ready,
                start_deadline=40.0,
                stop_deadline=8.0,
                before_start=weed.prepare,
            )
            await self._start_part(ManagedProcess(spec, registry), weed.endpoint_url, "the S3 server", say)
        redis_url = self.options.redis_url
        if redis_url is None:
            process, redis_url = redis_process(state, registry, ports.redis)
            await self._start_part(process, f"{HOST}:{ports.redis}", "Redis", say)
        own = self.options.s3 or self.embedded_s3()
        parts = StackParts(
            endpoint=own.endpoint,
            credential=own.credential,
            bucket=own.bucket,
            embedded_s3=embedded,
            redis_url=redis_url,
            database_url=self.options.database_url,
            allow_plain_http=own.allow_plain_http,
        )
        written = write_configs(state, ports, parts)
        internal = f"http://{HOST}:{ports.internal_api}"
        manager = f"http://{HOST}:{ports.manager}"
        proxy = self._daemon("proxy", written.proxy, lambda: _http_ready(f"{internal}/readyz"), registry)
        await self._start_part(proxy, f"http://{HOST}:{ports.client_api}", "the storage proxy", say)
        extension = self._daemon("manager", written.manager, lambda: _http_ready(f"{manager}/readyz"), registry)
        await self._start_part(extension, manager, "the manager extension", say)
        socket = state.agent_runtime_dir / "agent.sock"
        if self.options.mounts:
            agent = self._daemon("agent", written.agent, lambda: _agent_ready(socket), registry)
            await self._start_part(agent, str(socket), "the agent", say)
        endpoints = self._endpoints(parts, written, socket)
        endpoints.save(state.endpoints_file)
        return endpoints

    async def _start_part(self, process: ManagedProcess, where: str, what: str, say: Callable[[str], None]) -> None:
        say(f"starting {what}")
        begin = time.monotonic()
        self._processes.append(process)
        await process.start()
        self._where[process.name] = where
        self.timings[f"start_{process.name}"] = round(time.monotonic() - begin, 2)

    def _daemon(
        self, name: str, config: Path, ready: Callable[[], Awaitable[None]], registry: ProcessRegistry
    ) -> ManagedProcess:
        argv = [sys.executable, "-m", "storage_proxy", name, "serve", "--config", str(config)]
        # A traceback belongs into the daemon's own log.
        env = child_environment({"MOORING_DEBUG": "1"})
        spec = ProcessSpec(
            name=name, argv=argv, env=env, log_file=self.state.log_file(name), ready=ready, start_deadline=30.0
        )
        return ManagedProcess(spec, registry)

    def _weed(self) -> WeedServer:
        admin, reader = self.embedded_s3().credential, self._reader()
        ports = self.ports
        identities = [
            WeedIdentity("mooring", admin),
            WeedIdentity("datasets-reader", reader, (f"Read:{DATASETS_BUCKET}", f"List:{DATASETS_BUCKET}")),
        ]
        return WeedServer(
            WeedConfig(
                dir=self.state.data_dir / "s3",
                ports=WeedPorts(
                    s3=ports.s3,
                    master=ports.weed_master,
                    volume=ports.weed_volume,
                    filer=ports.weed_filer,
                    admin=ports.weed_admin,
                ),
                identities=identities,
                log_file=self.state.log_file("s3"),
                bucket=BUCKET,
            )
        )

    def embedded_s3(self) -> OwnS3:
        endpoint = Endpoint(f"http://{HOST}:{self.ports.s3}")
        return OwnS3(endpoint, self._key("s3-secret-key", "mooring"), BUCKET)

    def _reader(self) -> S3Credential:
        return self._key("s3-datasets-secret-key", "datasets")

    def _key(self, name: str, purpose: str) -> S3Credential:
        secret = self.state.secret(name)
        # An access key is a name, not a secret; this one stays the same as long as the secret does.
        digest = hashlib.sha256(secret.reveal().encode()).hexdigest()[:12]
        return S3Credential(access_key=f"{purpose}-{digest}", secret_key=secret)

    def dataset(self, name: str) -> Dataset:
        """The embedded server has a key that may only read datasets; elsewhere there is only the operator's own."""
        if self.options.s3 is None:
            return Dataset(DATASETS_BUCKET, f"datasets/{name}/", self._reader(), limited=True)
        own = self.options.s3
        return Dataset(own.bucket, f"datasets/{name}/", own.credential, limited=False)

    def _endpoints(self, parts: StackParts, written: Written, socket: Path) -> Endpoints:
        ports = self.ports
        return Endpoints(
            pid=os.getpid(),
            started_at=datetime.now(UTC),
            state=self.state.path,
            s3=S3Endpoint(
                url=parts.endpoint.url,
                region=parts.endpoint.region,
                bucket=parts.bucket,
                access_key=parts.credential.access_key,
                secret_key=parts.credential.secret_key,
                embedded=parts.embedded_s3,
            ),
            redis_url=parts.redis_url,
            proxy=ProxyEndpoint(
                manager_url=f"http://{HOST}:{ports.manager_api}",
                client_url=f"http://{HOST}:{ports.client_api}",
                internal_url=f"http://{HOST}:{ports.internal_api}",
                secret=written.proxy_secret,
            ),
            manager=ManagerEndpoint(
                url=f"http://{HOST}:{ports.manager}", token=written.user_token, admin_token=written.admin_token
            ),
            agent=AgentEndpoint(id=AGENT_ID, socket=socket),
            volumes=[VOLUME],
            logs={process.name: process.spec.log_file for process in self._processes},
            user_id=written.user_id,
        )

    @property
    def parts(self) -> list[Part]:
        """What runs where, in the order of the start."""
        rows = []
        if self.options.s3 is not None:
            rows.append(Part("s3", f"{self.options.s3.endpoint.url} (yours)", None, None))
        rows += [
            Part(process.name, self._where.get(process.name, ""), process.pid, process.spec.log_file)
            for process in self._processes
        ]
        if self.options.redis_url is not None:
            rows.append(Part("redis", "given by --redis-url", None, None))
        return rows

    async def reclaim_space(self) -> None:
        """Has the embedded S3 server give deleted bytes back to the disk now, not at its next round. Best effort."""
        if self.options.s3 is not None:
            return
        url = f"http://{HOST}:{self.ports.weed_master}/vol/vacuum?garbageThreshold=0.2"
        timeout = aiohttp.ClientTimeout(total=RECLAIM_DEADLINE_SECONDS)
        try:
            async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as answer:
                await answer.read()
        except (aiohttp.ClientError, TimeoutError) as err:
            log.info("the S3 server did not reclaim space", error=type(err).__name__)

    async def supervise(self) -> None:
        """Runs until cancelled. Raises `ServiceUnavailable` when a part cannot be kept running."""
        async with asyncio.TaskGroup() as group:
            for process in self._processes:
                group.create_task(process.supervise(), name=f"supervise {process.name}")

    async def stop(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Stops in reverse and removes what only a running stack needs. Idempotent; ends even if cancelled."""
        await finish(self._stop(say))

    async def _stop(self, say: Callable[[str], None]) -> None:
        begin = time.monotonic()
        self.state.endpoints_file.unlink(missing_ok=True)
        if self._processes:
            # Sessions end with the stack. Containers are nobody's children, so they are asked for by name.
            await SessionRunner(self.state).remove_leftovers()
            await self._sessions_ended()
        for process in reversed(self._processes):
            say(f"stopping {process.name}")
            part = time.monotonic()
            await process.stop()
            self.timings[f"stop_{process.name}"] = round(time.monotonic() - part, 2)
        self._processes.clear()
        if self.options.s3 is None:
            self._weed().clean()
        await clean(self.state)  # what an agent that had to be killed left
        (self.state.data_dir / "s3" / "s3.json").unlink(missing_ok=True)
        self.state.clear_temporary()
        self.timings["stop"] = round(time.monotonic() - begin, 2)

    async def _sessions_ended(self) -> None:
        """Lets the programs whose sessions were ended just now detach and revoke, while that is still possible."""
        if not any(process.name == "agent" and process.pid for process in self._processes):
            return
        end = time.monotonic() + SESSIONS_END_SECONDS
        with contextlib.suppress(MooringError):
            async with AgentClient(self.state.agent_runtime_dir / "agent.sock", timeout=2.0) as agent:
                while await agent.attachments() and time.monotonic() < end:  # noqa: ASYNC110  # polls another process
                    await asyncio.sleep(0.1)


async def _http_ready(url: str) -> None:
    """Raises `ServiceUnavailable` until the daemon says that it is ready."""
    timeout = aiohttp.ClientTimeout(total=HEALTH_DEADLINE_SECONDS)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as answer:
            if answer.status != 200:
                raise ServiceUnavailable(f"{url} answers {answer.status}: {_unhealthy(await answer.read())}")
    except (aiohttp.ClientError, TimeoutError) as err:
        raise ServiceUnavailable(f"{url} does not answer ({type(err).__name__}).") from None


def _unhealthy(body: bytes) -> str:
    """The failed checks of a health answer."""
    try:
        checks = json.loads(body)["connectivity"]["connectivity_checks"]
        return "; ".join(f"{item['component_id']}: {item['error_message']}" for item in checks if item["error_message"])
    except (ValueError, KeyError, TypeError):
        return "not ready"


async def _agent_ready(socket: Path) -> None:
    async with AgentClient(socket, timeout=HEALTH_DEADLINE_SECONDS) as client:
        await client.status()
