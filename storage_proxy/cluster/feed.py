"""`EventFeed`: the events of all nodes, from one reading of the stream in Redis to any number of listeners.

A listener has a bounded queue. One that takes its events too slowly, or that comes back with the id of the last event
it knows, reads what it missed from the stream; only what the stream itself does not keep any more is lost, and the
listener is told so. While Redis is away listeners stay and are told that too.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio as redis
from pydantic import ValidationError
from redis.exceptions import RedisError

from ..client.storages import EventsLost, FeedItem, MountEvent, SourceChanged
from ..core import noticeboard
from ..core.errors import InvalidRequest, ServiceUnavailable
from ..core.logs import get_logger

log = get_logger(__name__)

CALL_SECONDS = 3.0
BLOCK_MS = 1000  # below the time-out of the socket
QUEUE = 1000  # events
MAX_LISTENERS = 200
_PAGE = 500
_PAUSES = (0.1, 5.0)

_AWAY = (RedisError, OSError, TimeoutError)

Place = tuple[int, int]  # an id of the stream as numbers, to be compared


def parse_id(text: str) -> Place:
    """`<milliseconds>-<number>`, or `0` for the beginning. Raises `InvalidRequest`."""
    first, _, second = text.partition("-")
    if not (first.isascii() and first.isdigit() and (second or "0").isascii() and (second or "0").isdigit()):
        raise InvalidRequest(
            f"{text[:40]!r} is not the id of an event.",
            hint="Give the id of the last event you have seen, or 0 for all that are kept.",
        )
    return int(first), int(second or 0)


class Listener:
    """One listener's queue; see `EventFeed.listen`."""

    def __init__(self, feed: EventFeed, after: Place, *, known: bool, limit: int) -> None:
        self._feed = feed
        self._place = after  # of the last event given out
        self._known = known  # everything after `after` was put into the queue, so what is missing was counted
        self._queue: deque[tuple[Place, MountEvent] | SourceChanged] = deque()
        self._limit = limit
        self._dropped = 0  # events that did not fit, since the last catching up
        self._dropped_to: Place = (0, 0)
        self._behind = not known
        self._wake = asyncio.Event()
        self.closed = False

    def put(self, item: tuple[Place, MountEvent] | SourceChanged) -> None:
        if len(self._queue) >= self._limit:
            oldest = self._queue.popleft()
            if isinstance(oldest, tuple):
                self._dropped, self._dropped_to, self._behind = self._dropped + 1, oldest[0], True
        self._queue.append(item)
        self._wake.set()

    def close(self) -> None:
        self.closed = True
        self._wake.set()

    async def next(self, seconds: float) -> list[FeedItem]:
        """What is new, in order; an empty list when nothing came within `seconds`, or when `closed`."""
        if not self._queue and not self._behind and not self.closed:
            self._wake.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._wake.wait()
            except TimeoutError:
                return []
        if self.closed:
            return []
        if self._behind:
            try:
                return await self._catch_up()
            except _AWAY:
                await asyncio.sleep(min(seconds, _PAUSES[1]))
                return []
        return self._take()

    def _take(self) -> list[FeedItem]:
        items: list[FeedItem] = []
        while self._queue:
            item = self._queue.popleft()
            if isinstance(item, SourceChanged):
                items.append(item)
            elif item[0] > self._place:
                self._place = item[0]
                items.append(item[1])
        return items

    async def _catch_up(self) -> list[FeedItem]:
        """The next page from the stream, after what was given out last."""
        dropped = self._dropped
        items: list[FeedItem] = []
        if self._place != (0, 0) and not await self._feed.kept(self._place):
            # What was given out last has left the stream, and so may have what came after it.
            count = None
            if self._known:
                count = dropped - await self._feed.count(self._dropped_to)
            if count is None or count > 0:
                items.append(EventsLost(count=count))
        page = await self._feed.page(self._place)
        items += [event for _, event in page]
        if page:
            self._place = page[-1][0]
        self._known = True
        if len(page) < _PAGE and self._dropped == dropped:
            self._behind, self._dropped = False, 0
            items += self._take()
        return items


class EventFeed:
    """Reads only while somebody listens."""

    def __init__(self, client: redis.Redis, *, queue: int = QUEUE) -> None:
        self._client: Any = client  # redis-py types its answers for both protocols at once
        self._queue = queue
        self._listeners: set[Listener] = set()
        self._tail: asyncio.Task[None] | None = None
        self._tip: Place = (0, 0)
        self._starting = asyncio.Lock()
        self._away = False
        self._closed = False

    @property
    def tip(self) -> str:
        """The id of the last event that was read."""
        return _text(self._tip)

    @property
    def listening(self) -> int:
        return len(self._listeners)

    @asynccontextmanager
    async def listen(self, after: str | None = None) -> AsyncIterator[Listener]:
        """Listens from now on, or from the event after the one with the id `after`.

        Raises `InvalidRequest` for what is no id, `ServiceUnavailable` if Redis does not answer or too many listen.
        """
        place = None if after is None else parse_id(after)
        if len(self._listeners) >= MAX_LISTENERS:
            raise ServiceUnavailable(f"{MAX_LISTENERS} programs listen already.", hint="Try again later.")
        try:
            tip = await self._start()
        except _AWAY as err:
            raise ServiceUnavailable(
                f"Redis does not answer ({type(err).__name__}), so there are no events.", hint="Start Redis."
            ) from None
        listener = Listener(self, tip if place is None else place, known=place is None, limit=self._queue)
        listener.closed = self._closed
        if self._away:
            listener.put(SourceChanged(available=False))
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)
            if not self._listeners and self._tail is not None:
                self._tail.cancel()
                self._tail = None

    async def close(self) -> None:
        """Ends all listening at once."""
        self._closed = True
        for listener in self._listeners:
            listener.close()
        if self._tail is not None:
            self._tail.cancel()
            self._tail = None

    async def _start(self) -> Place:
        """Where the stream ends now; from there on everything reaches the listeners."""
        async with self._starting:
            if self._tail is None and not self._closed:
                async with asyncio.timeout(CALL_SECONDS):
                    last = await self._client.xrevrange(noticeboard.EVENTS, count=1)
                self._tip = parse_id(last[0][0]) if last else (0, 0)
                self._tail = asyncio.create_task(self._follow(), name="follow events")
            return self._tip

    async def _follow(self) -> None:
        pause, longest = _PAUSES
        self._away = False
        while True:
            try:
                async with asyncio.timeout(CALL_SECONDS):
                    answer = await self._client.xread({noticeboard.EVENTS: _text(self._tip)}, _PAGE, BLOCK_MS)
            except _AWAY as err:
                if not self._away:
                    log.info("Redis does not answer; events will be late", error=type(err).__name__)
                    self._tell(SourceChanged(available=False))
                self._away = True
                await asyncio.sleep(pause)
                pause = min(pause * 2, longest)
                continue
            if self._away:
                log.info("Redis answers again")
                self._tell(SourceChanged(available=True))
            self._away, pause = False, _PAUSES[0]
            for name, fields in answer[0][1] if answer else []:
                self._tip = parse_id(name)
                if (event := _event(name, fields)) is not None:
                    self._tell((self._tip, event))

    def _tell(self, item: tuple[Place, MountEvent] | SourceChanged) -> None:
        for listener in self._listeners:
            listener.put(item)

    async def kept(self, place: Place) -> bool:
        """Whether nothing after `place` has left the stream: it, or something before it, is still there."""
        async with asyncio.timeout(CALL_SECONDS):
            return bool(await self._client.xrange(noticeboard.EVENTS, "-", _text(place), count=1))

    async def count(self, to: Place) -> int:
        """How many events up to `to` are in the stream."""
        async with asyncio.timeout(CALL_SECONDS):
            return len(await self._client.xrange(noticeboard.EVENTS, "-", _text(to)))

    async def page(self, after: Place) -> list[tuple[Place, MountEvent]]:
        async with asyncio.timeout(CALL_SECONDS):
            found = await self._client.xrange(noticeboard.EVENTS, f"({_text(after)}", "+", count=_PAGE)
        events = ((parse_id(name), _event(name, fields)) for name, fields in found)
        return [(place, event) for place, event in events if event is not None]


def _text(place: Place) -> str:
    return f"{place[0]}-{place[1]}"


def _event(name: str, fields: Mapping[str, str]) -> MountEvent | None:
    """None for an entry that this version does not understand."""
    try:
        return MountEvent.model_validate(
            {
                **fields,
                "id": name,
                "detail": json.loads(fields.get("detail", "{}")),
            }
        )
    except (ValidationError, ValueError):
        log.info("an event cannot be read", id=name)
        return None
