"""Wires the agent. Nothing else wires."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from storage_proxy.client import ManagerClient
from storage_proxy.core import logs
from storage_proxy.core.crypto import SealingKey
from storage_proxy.core.errors import ConfigError, MooringError
from storage_proxy.core.secrets import Secret, read_secret
from storage_proxy.web import HealthCheck, Listener, Server

from .api import AgentApi, DriverStatus, driver_status, make_app
from .attachments import Attachments
from .cgroups import Cgroups
from .config import AgentConfig
from .containers import Binds
from .containers.backendai import lead_process_group, volume_roots
from .containers.mend import mend
from .containers.volume_book import VolumeBook
from .containers.volume_plugin import make_plugin_app
from .containers.volumes import Volumes
from .drivers import Drivers
from .eventlog import EventLog
from .events import EventKind
from .grants import GrantVerifier
from .host import check_host
from .inspection import Inspector
from .journal import Journal
from .kernel import make_undumpable
from .kernel.abandon import off_loop
from .layout import Layout
from .metrics import AgentMetrics, make_metrics_app
from .mounter import Mounter
from .operations import Operations
from .probe import Prober
from .reconcile import Reconciler
from .renewal import ManagerGrants, Renewals
from .resources import Resources
from .status import StatusPublisher
from .strays import Strays
from .supervisor import trim_output
from .takeover import Takeover
from .watch import Watchdog

log = logs.get_logger(__name__)

_REGISTER_SECONDS = (1.0, 60.0)
_TRIM_SECONDS = 30.0

Work = Callable[[], Coroutine[Any, Any, None]]  # Any: what a coroutine is sent and yields, which nobody uses


def harden_process() -> None:
    """No core dumps of this process or of those it starts: their memory holds credentials."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    make_undumpable()


async def serve(config: AgentConfig) -> None:
    """Runs the agent until SIGTERM or SIGINT. Raises `MooringError` if it cannot start; then nothing is left behind."""
    logs.configure(component="agent", level=config.agent.log_level)
    os.umask(0o077)
    harden_process()
    check_host()
    if config.backend_ai.root:
        lead_process_group()
    async with running(config) as agent:
        await agent.server.run_until_signal()


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent whose parts run; `server` listens once it is entered."""

    attachments: Attachments
    renewals: Renewals
    server: Server


@asynccontextmanager
async def running(config: AgentConfig) -> AsyncIterator[Agent]:
    """Everything but the listening socket: state, reconciled mounts, background tasks."""
    async with AsyncExitStack() as stack:
        node = await _take_over(config, stack)
        volumes = await _adapters(node, stack)
        watch = _watch(node, volumes)
        async with asyncio.TaskGroup() as tasks:
            background = [tasks.create_task(work(), name=name) for name, work in watch.work.items()]
            try:
                yield Agent(node.attachments, watch.renewals, Server(_listeners(node, watch, volumes)))
            finally:
                for task in background:
                    task.cancel()


@dataclass(frozen=True, slots=True)
class _Node:
    """The mounts of this node, as they are after the start, and what they are made with."""

    config: AgentConfig
    token: Secret | None  # for the manager extension
    state: Path
    layout: Layout
    drivers: Drivers
    sealing_key: SealingKey
    verifier: GrantVerifier
    journal: Journal
    prober: Prober
    cgroups: Cgroups
    mounter: Mounter
    binds: Binds
    strays: Strays
    attachments: Attachments
    events: EventLog


async def _take_over(config: AgentConfig, stack: AsyncExitStack) -> _Node:
    """Locks the place, and takes over or takes away what a former agent left."""
    section = config.agent
    state = _state_dir(section.state_dir)
    scratch = state / "scratch"
    # The kernel's table has real paths; the directory itself may not be there yet.
    layout = Layout(section.runtime_dir.parent.resolve() / section.runtime_dir.name)
    drivers = Drivers(config.driver)
    sealing_key = SealingKey.load_or_create(state / "sealing.key")
    token = read_secret(config.manager.token_file) if config.manager is not None else None
    verifier = GrantVerifier(section.id, config.grants.public_key_files if config.grants else (), sealing_key)
    lock = layout.lock()
    stack.callback(layout.unlock, lock)
    layout.make_runtime()
    journal = await Journal.open(state / "journal.sqlite")
    stack.push_async_callback(journal.close)
    prober = await stack.enter_async_context(Prober())
    cgroups = Cgroups(section.id, section.mount_memory_limit)
    stack.push_async_callback(cgroups.close)
    mounter = Mounter(
        layout,
        drivers,
        prober,
        scratch,
        deadline=section.mount_deadline,
        ca_file=config.driver.s3fs.ca_file,
        cgroups=cgroups,
    )
    binds = Binds(layout)
    strays = Strays(layout, drivers, scratch)
    takeover = Takeover(layout, journal, strays, scratch)
    if section.stop_mounts_on_exit:
        found = await takeover.clean()
        layout.make_runtime()
        stack.push_async_callback(_leave_nothing, layout)
    layout.prepare()
    attachments = await stack.enter_async_context(
        Attachments(
            verifier=verifier,
            journal=journal,
            mounter=mounter,
            binds=binds,
            drivers=drivers,
            grace=section.grace_period,
            warn_mounts=section.warn_mounts,
            max_mounts=section.max_mounts,
            repair_attempts=section.repair_attempts,
            repair_pause=section.repair_pause,
            mend=_mend,
        )
    )
    events = EventLog(section.id)
    attachments.listen(events.note)
    if section.stop_mounts_on_exit:
        stack.push_async_callback(attachments.stop_all)
    else:
        found = await takeover.adopt(attachments, mounter, binds)
    found.tell()
    if found.detail:
        attachments.tell(EventKind.RECONCILED, **found.detail)
    await cgroups.sweep(attachments.tokens())
    return _Node(
        config=config,
        token=token,
        state=state,
        layout=layout,
        drivers=drivers,
        sealing_key=sealing_key,
        verifier=verifier,
        journal=journal,
        prober=prober,
        cgroups=cgroups,
        mounter=mounter,
        binds=binds,
        strays=strays,
        attachments=attachments,
        events=events,
    )


async def _adapters(node: _Node, stack: AsyncExitStack) -> Volumes | None:
    """Who asks for mounts besides the API: the volume plugin (returned), the paths of Backend.AI."""
    config, section = node.config, node.config.agent
    volumes = None
    if config.volume_plugin is not None:
        book = await VolumeBook.open(node.state / "volumes.json")
        stack.push_async_callback(book.close)
        volumes = await stack.enter_async_context(
            Volumes(
                config.volume_plugin,
                book,
                node.attachments,
                node.binds,
                node.drivers,
                interval=section.reconcile_interval,
            )
        )
    if config.backend_ai.root and config.manager is not None and node.token is not None:
        manager = await stack.enter_async_context(ManagerClient(config.manager.url, node.token))
        await stack.enter_async_context(
            volume_roots(
                config.backend_ai,
                agent_id=section.id,
                attachments=node.attachments,
                manager=manager,
                runtime=node.layout.runtime,
                keep=not section.stop_mounts_on_exit,
            )
        )
    return volumes


@dataclass(frozen=True, slots=True)
class _Watch:
    """Everything that looks at the mounts. `work`: what has to run, by name."""

    renewals: Renewals
    resources: Resources
    metrics: AgentMetrics
    publisher: StatusPublisher | None
    warnings: Callable[[], list[str]]
    work: dict[str, Work]


def _watch(node: _Node, volumes: Volumes | None) -> _Watch:
    config, section, attachments = node.config, node.config.agent, node.attachments
    grants = ManagerGrants(config.manager.url, config.manager.token_file) if config.manager else None
    renewals = Renewals(attachments, node.mounter, node.verifier, grants)

    def warnings() -> list[str]:
        found = renewals.warnings(attachments.warnings()) + node.cgroups.warnings()
        return found if volumes is None else found + volumes.warnings()

    resources = Resources(attachments.mounts)
    attachments.listen(resources.note)
    publisher = None
    if config.redis is not None:
        publisher = StatusPublisher(
            config.redis,
            attachments,
            node.events,
            resources.of,
            warnings=warnings,
            mounts_stay=not section.stop_mounts_on_exit,
        )
    watchdog = Watchdog(
        attachments,
        node.mounter,
        node.prober,
        node.layout.fusectl,
        interval=section.watch_interval,
        hang_deadline=section.hang_deadline,
        s3_check_interval=section.s3_check_interval,
    )
    reconciler = Reconciler(
        node.layout,
        node.journal,
        attachments,
        node.strays,
        interval=section.reconcile_interval,
        grace=section.grace_period,
        release_after=section.release_unheld_after,
        keeps=volumes.holds if volumes is not None else None,
    )
    metrics = AgentMetrics(
        section.id, attachments, resources, node.cgroups, watchdog, publisher, max_mounts=section.max_mounts
    )
    work: dict[str, Work] = {
        "trim logs": partial(_trim, node.layout),
        "reconcile": reconciler.run,
        "watchdog": watchdog.run,
        "resources": resources.run,
        "renewals": renewals.run,
    }
    if publisher is not None:
        work["status"] = publisher.run
    if config.manager is not None and node.token is not None:
        work["register"] = partial(_register, config.manager.url, node.token, section.id, node.sealing_key.public)
    return _Watch(renewals, resources, metrics, publisher, warnings, work)


def _listeners(node: _Node, watch: _Watch, volumes: Volumes | None) -> list[Listener]:
    config, section, attachments = node.config, node.config.agent, node.attachments
    api = AgentApi(
        agent_id=section.id,
        public_key=node.sealing_key.public,
        attachments=attachments,
        renewals=watch.renewals,
        max_mounts=section.max_mounts,
        pid=os.getpid(),
        drivers=lambda: _driver_states(node.drivers),
        warnings=watch.warnings,
        publisher=watch.publisher,
    )
    operations = Operations(attachments, Inspector(attachments, node.layout, watch.resources.of), node.events)
    checks = _health_checks(node.journal, node.drivers, watch.warnings, watch.publisher)
    app = make_app(api, {*section.allowed_uids, os.geteuid()}, checks, watch.metrics)
    app.add_routes(operations.routes())
    app.on_shutdown.append(operations.end_streams)
    listeners = [Listener(app, "agent API", socket=_socket_place(section.api_socket))]
    if config.volume_plugin is not None and volumes is not None:
        plugin = make_plugin_app(volumes, {*config.volume_plugin.allowed_uids, os.geteuid()})
        listeners.append(Listener(plugin, "volume plugin", socket=_socket_place(config.volume_plugin.socket)))
    if section.metrics_port is not None:
        app = make_metrics_app(watch.metrics, checks)
        listeners.append(Listener(app, "metrics", "127.0.0.1", section.metrics_port))
    return listeners


async def _mend(old_devices: Collection[str], source: Path) -> int:
    return sum(result.error is None for result in await mend(old_devices, source))


def _state_dir(path: Path) -> Path:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        (path / "scratch").mkdir(mode=0o700, exist_ok=True)
    except OSError as err:
        raise ConfigError(
            f"The state directory {path} cannot be made: {err.strerror}.", hint="Set another state-dir."
        ) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"The state directory {path} is not writable.", hint="Check its owner, or set another one.")
    return path.resolve()


def _socket_place(path: Path) -> Path:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


async def _leave_nothing(layout: Layout) -> None:
    await off_loop("the removal of the mount base", 10.0, layout.tear_down)


async def _trim(layout: Layout) -> None:
    while True:
        await asyncio.sleep(_TRIM_SECONDS)
        with contextlib.suppress(OSError):
            for path in layout.logs.iterdir():
                trim_output(path)


async def _register(url: str, token: Secret, agent_id: str, public_key: str) -> None:
    """Tells the manager extension where to seal to; again and again until it has heard."""
    pause, longest = _REGISTER_SECONDS
    async with ManagerClient(url, token) as manager:
        while True:
            try:
                await manager.register_agent(agent_id, public_key)
            except MooringError as err:
                log.info("not registered at the manager extension yet", error=str(err), again_in=pause)
                await asyncio.sleep(pause)
                pause = min(pause * 2, longest)
            else:
                log.info("registered at the manager extension", agent_id=agent_id)
                return


def _driver_states(drivers: Drivers) -> list[DriverStatus]:
    states = []
    for name in drivers.names:
        try:
            states.append(driver_status(drivers.get(name).check()))
        except MooringError as err:
            states.append(DriverStatus(name=name, available=False, error=str(err)))
    return states


def _health_checks(
    journal: Journal, drivers: Drivers, warnings: Callable[[], list[str]], publisher: StatusPublisher | None
) -> list[HealthCheck]:
    async def journal_works() -> None:
        await journal.mounts()

    async def driver_works() -> None:
        await off_loop("a look at the driver", 5.0, drivers.get(drivers.default).check)

    async def mounts_live() -> None:
        if found := warnings():
            raise MooringError(found[0])

    checks = [
        HealthCheck("agent", "journal", journal_works),
        HealthCheck("agent", "driver", driver_works),
        HealthCheck("agent", "mounts", mounts_live, critical=False),
    ]
    if publisher is not None:

        async def redis_answers() -> None:
            if publisher.last_error is not None:
                raise MooringError(publisher.last_error)

        checks.append(HealthCheck("agent", "redis", redis_answers, critical=False))
    return checks
