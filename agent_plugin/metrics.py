"""What the agent tells Prometheus. A registry of its own, so that nothing a library registers is shown.

What happens is counted as it happens (events); what is there is read when somebody asks. Labels are states, names of
volumes and drivers, and the first 12 digits of mount keys: never a bucket, a path or a session. So there are never more
series than `max-mounts` allows. Every name is explained in docs/metrics.md.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

from aiohttp import web
from aiohttp.typedefs import Middleware
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from storage_proxy import __version__
from storage_proxy.core.ids import MountKey
from storage_proxy.core.wire import MountState
from storage_proxy.web import HealthCheck, edge_middleware, health_routes, public, require

from .attachments import Attachments
from .cgroups import Cgroups
from .events import Event, EventKind
from .peers import LOCAL
from .resources import Resources, Usage
from .status import StatusPublisher
from .watch import Watchdog

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MOUNT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
_REPAIR_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_REQUEST_BUCKETS = (0.005, 0.02, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_MOUNT_LABELS = ("key", "volume", "driver")


class AgentMetrics:
    """One per agent. `publisher` is None when nothing is told to Redis."""

    def __init__(
        self,
        agent_id: str,
        attachments: Attachments,
        resources: Resources,
        cgroups: Cgroups,
        watchdog: Watchdog,
        publisher: StatusPublisher | None,
        *,
        max_mounts: int,
    ) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Histogram(
            "mooring_agent_request_seconds",
            "Duration of API requests; attaching is POST /v1/attachments.",
            ("method", "route", "status"),
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self.transitions = Counter(
            "mooring_agent_transitions", "State changes of mounts.", ("from", "to"), registry=registry
        )
        self.mount_seconds = Histogram(
            "mooring_agent_mount_seconds",
            "Time from the decision to mount until the mount is usable.",
            buckets=_MOUNT_BUCKETS,
            registry=registry,
        )
        self.repair_seconds = Histogram(
            "mooring_agent_repair_seconds",
            "Time from the death of a mount until its sessions can use it again.",
            buckets=_REPAIR_BUCKETS,
            registry=registry,
        )
        self.repaired_containers = Counter(
            "mooring_agent_repaired_containers",
            "Folders of containers that were repaired from inside, because mounts do not propagate to them.",
            registry=registry,
        )
        self.renewals = Counter(
            "mooring_agent_renewals", "Credentials of living mounts that were renewed.", registry=registry
        )
        self.unresponsive = Counter(
            "mooring_agent_unresponsive", "Times that a mount process did not answer.", registry=registry
        )
        self.trouble = Counter(
            "mooring_agent_s3_trouble", "Times that a living mount was found to be refused by S3.", registry=registry
        )
        self.findings = Counter(
            "mooring_agent_reconcile_findings",
            "Differences between journal, mount table, processes and containers that were repaired.",
            ("finding",),
            registry=registry,
        )
        self._staging: dict[MountKey, float] = {}
        self._troubled: set[MountKey] = set()
        ProcessCollector(registry=registry)
        registry.register(_Present(agent_id, attachments, resources, cgroups, watchdog, publisher, max_mounts))
        attachments.listen(self._note)

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _note(self, event: Event) -> None:
        if event.kind is EventKind.STATE and event.old is not None and event.new is not None:
            self._note_state(event, event.old, event.new)
        elif event.kind is EventKind.REPAIRED:
            self.repair_seconds.observe(_number(event.detail.get("seconds")))
            self.repaired_containers.inc(_number(event.detail.get("containers")))
        elif event.kind is EventKind.RENEWED:
            self.renewals.inc()
        elif event.kind is EventKind.UNRESPONSIVE:
            self.unresponsive.inc()
        elif event.kind is EventKind.TROUBLE and event.key is not None:
            if event.error is None:
                self._troubled.discard(event.key)
            elif event.key not in self._troubled:
                self._troubled.add(event.key)
                self.trouble.inc()
        elif event.kind is EventKind.RECONCILED:
            for name, value in event.detail.items():
                if _number(value) > 0:
                    self.findings.labels(name).inc(_number(value))

    def _note_state(self, event: Event, old: MountState, new: MountState) -> None:
        self.transitions.labels(old.value, new.value).inc()
        if event.key is None:
            return
        begun = self._staging.pop(event.key, None)
        if new is MountState.STAGING:
            self._staging[event.key] = time.monotonic()
        elif new is MountState.LIVE and begun is not None:
            self.mount_seconds.observe(time.monotonic() - begun)
        elif new is MountState.ABSENT:
            self._troubled.discard(event.key)

    def middleware(self) -> Middleware:
        """Measures the requests of the API; outermost, so it sees the answers to errors too."""

        @web.middleware
        async def measure(request: web.Request, handler: Handler) -> web.StreamResponse:
            begun = time.perf_counter()
            status = "aborted"
            try:
                response = await handler(request)
                status = str(response.status)
                return response
            finally:
                resource = request.match_info.route.resource
                route = resource.canonical if resource is not None else "unknown"
                self.requests.labels(request.method, route, status).observe(time.perf_counter() - begun)

        return measure


class _Present(Collector):
    """What is there at the moment of asking."""

    def __init__(
        self,
        agent_id: str,
        attachments: Attachments,
        resources: Resources,
        cgroups: Cgroups,
        watchdog: Watchdog,
        publisher: StatusPublisher | None,
        max_mounts: int,
    ) -> None:
        self._agent_id = agent_id
        self._attachments = attachments
        self._resources = resources
        self._cgroups = cgroups
        self._watchdog = watchdog
        self._publisher = publisher
        self._max_mounts = max_mounts

    def describe(self) -> Iterable[Metric]:
        return self.collect()

    def collect(self) -> Iterable[Metric]:
        yield from self._node()
        yield from self._mounts()
        yield from self._processes()

    def _node(self) -> Iterable[Metric]:
        info = GaugeMetricFamily(
            "mooring_agent_info", "Always 1; the labels say who this is.", labels=("agent", "version", "cgroups")
        )
        info.add_metric((self._agent_id, __version__, self._cgroups.kind), 1)
        yield info
        yield GaugeMetricFamily(
            "mooring_agent_max_mounts", "Mounts above which attaching is refused.", value=self._max_mounts
        )
        yield GaugeMetricFamily(
            "mooring_agent_draining",
            "1 while the whole node refuses new attachments.",
            value=float(self._attachments.draining is True),
        )
        yield GaugeMetricFamily(
            "mooring_agent_memory_limit_bytes",
            "Memory that one mount process may use; 0 without a limit, or where it cannot be kept.",
            value=0 if self._cgroups.limit is None or self._cgroups.problem else self._cgroups.limit,
        )
        yield GaugeMetricFamily(
            "mooring_agent_watch_pass_seconds",
            "Time that the last look at all mount processes took.",
            value=self._watchdog.pass_seconds,
        )
        yield CounterMetricFamily(
            "mooring_agent_status_errors",
            "Reports that did not reach Redis.",
            value=0 if self._publisher is None else self._publisher.errors,
        )

    def _mounts(self) -> Iterable[Metric]:
        states: dict[MountState, int] = dict.fromkeys(
            (state for state in MountState if state is not MountState.ABSENT), 0
        )
        volumes: dict[str, int] = {}
        silent = troubled = 0
        sessions = GaugeMetricFamily(
            "mooring_agent_mount_attachments", "Attachments that use this mount.", labels=_MOUNT_LABELS
        )
        repairs = CounterMetricFamily(
            "mooring_agent_mount_repairs", "Repairs of this mount since it was first mounted.", labels=_MOUNT_LABELS
        )
        for record, items in self._attachments.mounts():
            labels = (record.key[:12], record.plan.volume, record.plan.driver)
            states[record.state] += 1
            volumes[record.plan.volume] = volumes.get(record.plan.volume, 0) + len(items)
            sessions.add_metric(labels, len(items))
            repairs.add_metric(labels, record.repairs)
            entry = self._attachments.entry(record.key)
            if entry is not None:
                silent += entry.unresponsive is not None
                troubled += entry.trouble is not None
        mounts = GaugeMetricFamily("mooring_agent_mounts", "Mounts by state.", labels=("state",))
        for state, count in states.items():
            mounts.add_metric((state.value,), count)
        attached = GaugeMetricFamily("mooring_agent_attachments", "Attachments by volume.", labels=("volume",))
        for volume, count in volumes.items():
            attached.add_metric((volume,), count)
        yield mounts
        yield attached
        yield sessions
        yield repairs
        yield GaugeMetricFamily(
            "mooring_agent_unresponsive_mounts", "Mounts whose process does not answer now.", value=silent
        )
        yield GaugeMetricFamily(
            "mooring_agent_troubled_mounts", "Living mounts that S3 refuses, or that cannot reach it.", value=troubled
        )

    def _processes(self) -> Iterable[Metric]:
        found = [
            ((record.key[:12], record.plan.volume, record.plan.driver), usage)
            for record, _ in self._attachments.mounts()
            if (usage := self._resources.of(record.key)) is not None
        ]
        for name, text, value in _GAUGES:
            gauge = GaugeMetricFamily(f"mooring_agent_mount_{name}", text, labels=_MOUNT_LABELS)
            _fill(gauge, found, value)
            yield gauge
        for name, text, value in _COUNTERS:
            counter = CounterMetricFamily(f"mooring_agent_mount_{name}", text, labels=_MOUNT_LABELS)
            _fill(counter, found, value)
            yield counter


_Figure = Callable[[Usage], float | None]

_GAUGES: tuple[tuple[str, str, _Figure], ...] = (
    ("pss_bytes", "Memory of the mount process, shared pages in proportion.", lambda usage: usage.pss),
    ("rss_bytes", "Memory of the mount process, shared pages in full.", lambda usage: usage.rss),
    ("fds", "Open file descriptors of the mount process.", lambda usage: usage.fds),
    ("threads", "Threads of the mount process.", lambda usage: usage.threads),
)
_COUNTERS: tuple[tuple[str, str, _Figure], ...] = (
    ("cpu_seconds", "CPU time of the mount process.", lambda usage: usage.cpu_seconds),
    ("read_bytes", "Bytes that the mount process got from read calls.", lambda usage: usage.read),
    ("written_bytes", "Bytes that the mount process gave to write calls.", lambda usage: usage.written),
    ("disk_read_bytes", "Bytes read from disk for the mount process.", lambda usage: usage.disk_read),
    ("disk_written_bytes", "Bytes written to disk for the mount process.", lambda usage: usage.disk_written),
)


def _fill(
    family: GaugeMetricFamily | CounterMetricFamily, found: Iterable[tuple[tuple[str, ...], Usage]], value: _Figure
) -> None:
    for labels, usage in found:
        number = value(usage)
        if number is not None:
            family.add_metric(labels, number)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def metrics_route(metrics: AgentMetrics, *, local: bool) -> web.RouteDef:
    """`local`: for the unix socket, where callers are known; else for everybody who reaches the port."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=metrics.render(), headers={"Content-Type": _CONTENT_TYPE})

    return web.get("/metrics", require(LOCAL)(answer) if local else public(answer))


def make_metrics_app(metrics: AgentMetrics, checks: Sequence[HealthCheck]) -> web.Application:
    """For a port on the loopback address: metrics and health, nothing that changes anything."""
    app = web.Application(middlewares=[edge_middleware])
    app.add_routes(route for route in health_routes("agent", checks) if route.path in _HEALTH)
    app.add_routes([metrics_route(metrics, local=False)])
    return app


_HEALTH: Collection[str] = ("/livez", "/readyz")
