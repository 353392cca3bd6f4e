"""What the proxy counts. A registry of its own, so that nothing a library registers is shown."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..volumes.uploads import UploadService

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_BUCKETS = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0)


class ProxyMetrics:
    """One per process. Labels are route patterns, never paths or names from outside."""

    def __init__(self, uploads: UploadService) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mooring_proxy_requests",
            "Requests by API, method, route and status.",
            ("api", "method", "route", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "mooring_proxy_request_seconds",
            "Duration of requests, bodies included.",
            ("api", "route"),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.received = Counter(
            "mooring_proxy_received_bytes", "Bytes of files received from clients.", registry=self.registry
        )
        self.sent = Counter("mooring_proxy_sent_bytes", "Bytes of files sent to clients.", registry=self.registry)
        running = Gauge("mooring_proxy_uploads_running", "Upload requests at work now.", registry=self.registry)
        running.set_function(lambda: uploads.running)
        memory = Gauge("mooring_proxy_upload_memory_bytes", "Memory that uploads hold now.", registry=self.registry)
        memory.set_function(lambda: uploads.budget.used)
        waiting = Gauge("mooring_proxy_uploads_waiting", "Uploads that wait for memory.", registry=self.registry)
        waiting.set_function(lambda: uploads.budget.waiting)

    def middleware(self, api: str) -> Middleware:
        """Counts the requests of one application; outermost, so it sees the answers to errors too."""

        @web.middleware
        async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
            start = time.perf_counter()
            status = "aborted"
            try:
                response = await handler(request)
                status = str(response.status)
                return response
            finally:
                resource = request.match_info.route.resource
                route = resource.canonical if resource is not None else "unknown"
                self.requests.labels(api, request.method, route, status).inc()
                self.seconds.labels(api, route).observe(time.perf_counter() - start)

        return count

    def render(self) -> bytes:
        return generate_latest(self.registry)
