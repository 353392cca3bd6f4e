"""`/livez`: the loop answers. `/readyz`: every critical check passes. `/health`: the same details, always 200."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from aiohttp import web

from .. import __version__
from ..core.errors import MooringError
from .auth import public

CHECK_DEADLINE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """One thing to look at. `check` raises when it is not well; it is given 5 s."""

    group: str
    name: str
    check: Callable[[], Awaitable[None]]
    critical: bool = True


async def _run(check: HealthCheck) -> dict[str, object]:
    error: str | None = None
    try:
        async with asyncio.timeout(CHECK_DEADLINE_SECONDS):
            await check.check()
    except TimeoutError:
        error = f"no answer within {CHECK_DEADLINE_SECONDS:g} s"
    except MooringError as err:
        error = str(err)
    except Exception as err:
        error = f"{type(err).__name__}"
    return {
        "service_group": check.group,
        "component_id": check.name,
        "is_healthy": error is None,
        "critical": check.critical,
        "last_checked_at": datetime.now(UTC).isoformat(),
        "error_message": error,
    }


def health_routes(component: str, checks: Sequence[HealthCheck]) -> list[web.RouteDef]:
    """The three routes; all are public and belong on an internal port."""

    @public
    async def livez(_: web.Request) -> web.Response:
        return _answer({"status": "ok", "version": __version__, "component": component}, 200)

    async def report() -> tuple[bool, dict[str, object]]:
        results = await asyncio.gather(*(_run(check) for check in checks))
        ready = all(item["is_healthy"] for item in results if item["critical"])
        healthy = all(item["is_healthy"] for item in results)
        return ready, {
            "status": "ok" if healthy else "degraded" if ready else "error",
            "version": __version__,
            "component": component,
            "connectivity": {
                "overall_healthy": healthy,
                "connectivity_checks": list(results),
                "timestamp": datetime.now(UTC).isoformat(),
            },
        }

    @public
    async def readyz(_: web.Request) -> web.Response:
        ready, body = await report()
        return _answer(body, 200 if ready else 503)

    @public
    async def health(_: web.Request) -> web.Response:
        _ready, body = await report()
        return _answer(body, 200)

    return [web.get("/livez", livez), web.get("/readyz", readyz), web.get("/health", health)]


def _answer(body: dict[str, object], status: int) -> web.Response:
    return web.Response(status=status, text=json.dumps(body), content_type="application/json")
