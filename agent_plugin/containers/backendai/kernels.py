"""Life-cycle events of Backend.AI's kernels (its word for a session's containers), read from its Redis or Valkey.

Events are hints: one that is missed, doubled or garbled changes nothing but when an unused folder is released. So they
are only looked at, in ways that leave no trace on the server and take nothing from Backend.AI's own readers:

* Anycast, the stream `events`: by XREAD without a consumer group. Whoever reads with a group gets each entry once and
  has to acknowledge it; readers without one see all entries and are not known to the server at all.
* Broadcast, the pub/sub channel `events_all`: every subscriber gets a copy.

Both are read because releases differ in which of them carries `kernel_terminated` (many send it on both). The fields
are JSON text in `payload` since August 2026, and positional arguments packed with msgpack in `args` before; within a
broadcast, which is JSON as a whole, these are base64 text.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import redis.asyncio as redis
from redis.exceptions import RedisError

from storage_proxy.core.logs import get_logger, redact_text

log = get_logger(__name__)

STREAM = "events"
CHANNEL = "events_all"
# After these a container of the kernel is gone, or never came.
_ENDS = frozenset({"kernel_terminated", "kernel_cancelled"})
_STARTS = frozenset({"kernel_started"})

_CONNECT_SECONDS = 5.0
_BLOCK_SECONDS = 5.0
_PAUSE_SECONDS = (1.0, 30.0)
_MAX_BODY = 256 * 1024


@dataclass(frozen=True, slots=True)
class KernelEvent:
    """`kernel_id` is empty if the event does not tell it in a way that is known here."""

    name: str
    kernel_id: str

    @property
    def ended(self) -> bool:
        return self.name in _ENDS


def parse_entry(fields: Mapping[bytes, bytes]) -> KernelEvent | None:
    """An entry of the stream; None for events that are not about kernels. Raises ValueError for what is no event."""
    if b"name" not in fields:
        raise ValueError("no name")
    name = fields[b"name"].decode()
    if not name.startswith("kernel_"):
        return None
    body: object = None
    if b"payload" in fields:
        body = _json(fields[b"payload"])
    elif b"args" in fields:
        body = _packed(fields[b"args"])
    return KernelEvent(name, _kernel_id(body))


def parse_broadcast(data: bytes) -> KernelEvent | None:
    """A message of the channel; as `parse_entry`."""
    message = _json(data)
    if not isinstance(message, Mapping) or not isinstance(message.get("name"), str):
        raise ValueError("no name")
    name = message["name"]
    if not name.startswith("kernel_"):
        return None
    body: object = None
    if "payload" in message:
        payload = message["payload"]
        body = _json(payload.encode()) if isinstance(payload, str) else payload
    elif isinstance(message.get("args"), str):
        body = _packed(base64.b64decode(message["args"], validate=True))
    return KernelEvent(name, _kernel_id(body))


def _json(data: bytes) -> Any:  # Any: JSON
    if len(data) > _MAX_BODY:
        raise ValueError(f"{len(data)} bytes")
    return json.loads(data)


def _packed(data: bytes) -> object:
    if len(data) > _MAX_BODY:
        raise ValueError(f"{len(data)} bytes")
    try:
        return msgpack.unpackb(data, strict_map_key=False)
    except Exception as err:  # its exceptions have no common base
        raise ValueError(f"not msgpack: {err}") from None


def _kernel_id(body: object) -> str:
    found = None
    if isinstance(body, Mapping):
        found = body.get("kernel_id")
    elif isinstance(body, (list, tuple)) and body:
        found = body[0]
    return found if isinstance(found, str) else ""


class KernelEvents:
    """Calls `tell(event)` for each kernel that started or ended. `run` it in a task; it ends when cancelled."""

    def __init__(self, url: str, tell: Callable[[KernelEvent], None]) -> None:
        self._url = url
        self._tell = tell
        self._complained = False
        self.last_error: str | None = None
        self.connected = asyncio.Event()

    async def run(self) -> None:
        pause, longest = _PAUSE_SECONDS
        while True:
            try:
                async with redis.Redis.from_url(
                    self._url,
                    socket_connect_timeout=_CONNECT_SECONDS,
                    socket_timeout=_BLOCK_SECONDS * 2,
                    health_check_interval=15,
                    protocol=2,
                ) as client:
                    await self._follow(client)
            except* (RedisError, OSError, TimeoutError) as group:
                error = redact_text("; ".join(f"{type(err).__name__}: {err}" for err in group.exceptions))
                if self.last_error is None:
                    log.info(
                        "the events of Backend.AI cannot be read; unused folders are released when idle", error=error
                    )
                self.last_error = error
            except* Exception:
                log.exception("the events of Backend.AI cannot be read")
            if self.connected.is_set():
                self.connected.clear()
                pause = _PAUSE_SECONDS[0]
            await asyncio.sleep(pause)
            pause = min(pause * 2, longest)

    async def _follow(self, client: redis.Redis) -> None:
        info = await client.xinfo_stream(STREAM) if await client.exists(STREAM) else None
        last = info["last-generated-id"] if info else b"0-0"
        async with client.pubsub(ignore_subscribe_messages=True) as channel:
            await channel.subscribe(CHANNEL)
            if self.last_error is not None:
                log.info("the events of Backend.AI can be read again")
            self.last_error = None
            self.connected.set()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read_stream(client, last), name="anycast events")
                group.create_task(self._read_channel(channel), name="broadcast events")

    async def _read_stream(self, client: redis.Redis, last: bytes) -> None:
        while True:
            # Any: redis-py types the answers of all its protocols at once; this is that of the one asked for.
            answer: Any = await client.xread({STREAM: last}, count=100, block=int(_BLOCK_SECONDS * 1000))
            for _, entries in answer or []:
                for entry_id, fields in entries:
                    last = entry_id
                    self._take(parse_entry, fields)

    async def _read_channel(self, channel: redis.client.PubSub) -> None:
        while True:
            message = await channel.get_message(timeout=_BLOCK_SECONDS)
            if message is not None and message["type"] == "message":
                self._take(parse_broadcast, message["data"])

    def _take(self, parse: Callable[[Any], KernelEvent | None], raw: Any) -> None:  # Any: what Redis holds
        try:
            event = parse(raw)
        except (ValueError, UnicodeDecodeError, AttributeError, TypeError, RecursionError) as err:
            if not self._complained:
                self._complained = True
                log.info(
                    "an event of Backend.AI was not understood; further ones are passed over", error=str(err)[:200]
                )
            return
        if event is not None and event.name in _ENDS | _STARTS:
            with contextlib.suppress(Exception):  # a hint; what comes of it is logged where it is done
                self._tell(event)
