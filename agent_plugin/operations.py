"""The operator's part of the agent API: look at one mount, repair it, drain, follow what happens."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Collection
from contextlib import suppress

from aiohttp import web

from storage_proxy.client.mounts import (
    DrainingMount,
    DrainRequest,
    DrainStatus,
    RepairAnswer,
    RepairRequest,
    ResumeRequest,
)
from storage_proxy.core.errors import DeadlineExceeded, MountFailed
from storage_proxy.core.ids import MountKey
from storage_proxy.core.wire import MountState, Wire
from storage_proxy.web import json_answer, read_json, read_query, require

from .attachments import NODE, Attachments
from .eventlog import EventLog
from .inspection import Inspector
from .peers import LOCAL

HEARTBEAT_SECONDS = 10.0
STALLED_SECONDS = 30.0
# Between two looks at what is still attached; sessions that leave a mount to others tell no event.
_LOOK_SECONDS = 0.5


class EventsQuery(Wire):
    """`since`: the id of the last event that is known; `0`, or one of a former run: all that are kept."""

    since: str | None = None


class Operations:
    """The handlers."""

    def __init__(self, attachments: Attachments, inspector: Inspector, events: EventLog) -> None:
        self._attachments = attachments
        self._inspector = inspector
        self._events = events

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/mounts/{key}", self.show),
            web.post("/v1/mounts/{key}/repair", self.repair),
            web.get("/v1/drain", self.drain_status),
            web.post("/v1/drain", self.drain),
            web.delete("/v1/drain", self.resume),
            web.get("/v1/events", self.events),
        ]

    @require(LOCAL)
    async def show(self, request: web.Request) -> web.Response:
        return json_answer(await self._inspector.look(self._inspector.find(request.match_info["key"])))

    @require(LOCAL)
    async def repair(self, request: web.Request) -> web.Response:
        """Waits for the outcome."""
        key = self._inspector.find(request.match_info["key"])
        body = await read_json(request, RepairRequest)
        begun = time.monotonic()
        given_up = body.force and await self._attachments.lost(key, "It was given up by an operator.")
        repaired = await self._attachments.repair(key) or given_up
        entry = self._attachments.entry(key)
        state = MountState.ABSENT if entry is None else entry.state
        if state is MountState.FAILED and entry is not None and entry.record is not None:
            raise MountFailed(f"The mount has failed: {entry.record.last_error}", hint="See `mooring mounts show`.")
        seconds = round(time.monotonic() - begun, 3)
        return json_answer(RepairAnswer(key=key, repaired=repaired, state=state, seconds=seconds))

    # --- drain --------------------------------------------------------------------------------------------------------

    @require(LOCAL)
    async def drain_status(self, _: web.Request) -> web.Response:
        return json_answer(self._drain_status(self._attachments.drains))

    @require(LOCAL)
    async def drain(self, request: web.Request) -> web.Response:
        """Refuses new attachments from now on; answers when none of the old ones is left, or after `wait` seconds."""
        body = await read_json(request, DrainRequest)
        keys = None if body.keys is None else {self._find_drained(text) for text in body.keys}
        if not self._refused(keys):
            await self._attachments.drain(keys)
        asked = {NODE} if keys is None else keys
        end = time.monotonic() + body.wait
        while not (status := self._drain_status(asked)).done:
            left = end - time.monotonic()
            if left <= 0 or self._events.closed:
                break
            await self._events.wait(self._events.last, min(left, _LOOK_SECONDS))
        return json_answer(status)

    @require(LOCAL)
    async def resume(self, request: web.Request) -> web.Response:
        body = await read_json(request, ResumeRequest)
        await self._attachments.resume(None if body.keys is None else {self._find_drained(text) for text in body.keys})
        return json_answer(self._drain_status(self._attachments.drains))

    def _find_drained(self, text: str) -> MountKey:
        """As `Inspector.find`, but a mount that is drained may be gone by now."""
        found = [key for key in self._attachments.drains - {NODE} if text and key.startswith(text.lower())]
        return found[0] if len(found) == 1 else self._inspector.find(text)

    def _refused(self, keys: Collection[MountKey] | None) -> bool:
        """Whether that was asked for before: asking again for the progress tells no new event."""
        return ({NODE} if keys is None else set(keys)) <= self._attachments.drains

    def _drain_status(self, asked: Collection[MountKey]) -> DrainStatus:
        """Of what was `asked` for; what is drained apart from that is in `draining` and `keys` too."""
        mounts = [
            DrainingMount(
                key=record.key,
                bucket=record.plan.location.bucket,
                prefix=record.plan.location.prefix,
                state=record.state,
                attachments=len(items),
                sessions=sorted({item.session for item in items}),
            )
            for record, items in self._attachments.mounts()
            if NODE in asked or record.key in asked
        ]
        left = sum(mount.attachments for mount in mounts)
        return DrainStatus(
            draining=self._attachments.draining,
            keys=sorted(self._attachments.drains - {NODE}),
            attachments=left,
            mounts=mounts,
            done=bool(asked) and left == 0,
        )

    # --- events -------------------------------------------------------------------------------------------------------

    @require(LOCAL)
    async def events(self, request: web.Request) -> web.StreamResponse:
        """One JSON object a line, until the agent stops: events, `{"kind": "lost"}` where some are missing,
        `{"kind": "heartbeat"}` when nothing happens."""
        since = read_query(request, EventsQuery).since
        place = self._events.last if since is None else self._events.place(since)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
        with suppress(ConnectionError):  # the client went away
            await response.prepare(request)
            await _write(response, '{"kind":"heartbeat"}\n')
            while not self._events.closed:
                await self._events.wait(place, HEARTBEAT_SECONDS)
                lines = []
                for numbered in self._events.after(place):
                    if numbered.number > place + 1:
                        lines.append(json.dumps({"kind": "lost", "count": numbered.number - place - 1}))
                    place = numbered.number
                    lines.append(self._events.describe(numbered).model_dump_json(exclude_none=True))
                await _write(response, "".join(f"{line}\n" for line in lines) or '{"kind":"heartbeat"}\n')
        return response

    async def end_streams(self, _: web.Application) -> None:
        """For the application's shutdown: streams would hold it up until its deadline."""
        self._events.close()


async def _write(response: web.StreamResponse, text: str) -> None:
    try:
        async with asyncio.timeout(STALLED_SECONDS):
            await response.write(text.encode())
    except TimeoutError:
        raise DeadlineExceeded(f"The client took nothing for {STALLED_SECONDS:g} s.") from None
