"""What the nodes do with the volumes of a type: their mounts, and what happens to them."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from aiohttp import web

from ...client.storages import EventsLost, FeedItem, MountEvent, MountsWanted
from ...core.errors import DeadlineExceeded, Unsupported
from ...core.ids import parse_agent_id
from ...web import json_answer, read_query, require
from ..fields import RequestModel
from ..services import SERVICES

if TYPE_CHECKING:
    from ...cluster.storages import Storages

routes = web.RouteTableDef()

HEARTBEAT_SECONDS = 10.0
STALLED_SECONDS = 30.0


class StatusQuery(RequestModel):
    mounts: MountsWanted = MountsWanted.ALL


class EventsQuery(RequestModel):
    after: str | None = None


@routes.get("/storages/{type}/status")
@require("manager")
async def status(request: web.Request) -> web.Response:
    wanted = read_query(request, StatusQuery).mounts
    return json_answer(await _storages(request).status(request.match_info["type"], wanted))


@routes.get("/storages/{type}/status/{agent}")
@require("manager")
async def node_status(request: web.Request) -> web.Response:
    agent_id = parse_agent_id(request.match_info["agent"])
    return json_answer(await _storages(request).node(request.match_info["type"], agent_id))


@routes.get("/storages/{type}/events")
@require("manager")
async def events(request: web.Request) -> web.StreamResponse:
    """Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html): a client that comes back
    with the id of its last event goes on behind it."""
    after = request.headers.get("Last-Event-ID") or read_query(request, EventsQuery).after
    async with _storages(request).listen(request.match_info["type"], after) as events:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        with suppress(ConnectionError):  # the client went away
            await response.prepare(request)
            await _write(response, ": events follow\n\n")
            while not events.ended:
                items = await events.next(HEARTBEAT_SECONDS)
                await _write(response, "".join(map(_text, items)) or ": heartbeat\n\n")
        return response


def _storages(request: web.Request) -> Storages:
    found = request.app[SERVICES].storages
    if found is None:
        raise Unsupported(
            "This proxy does not know what the nodes do.",
            hint="Give it the Redis that the agents report to, as [redis] url.",
        )
    return found


def _text(item: FeedItem) -> str:
    if isinstance(item, MountEvent):
        return f"id: {item.id}\nevent: {item.kind}\ndata: {item.model_dump_json(exclude_none=True)}\n\n"
    kind = "lost" if isinstance(item, EventsLost) else "source"
    return f"event: {kind}\ndata: {item.model_dump_json()}\n\n"


async def _write(response: web.StreamResponse, text: str) -> None:
    try:
        async with asyncio.timeout(STALLED_SECONDS):
            await response.write(text.encode())
    except TimeoutError:
        raise DeadlineExceeded(f"The client took nothing for {STALLED_SECONDS:g} s.") from None
