"""The state of this node in Redis, for whoever looks at many nodes.

    mooring:agent:{agent}                           hash: heartbeat, version, pid, counts, warnings
    mooring:mount:{agent}:{key}                     hash: one mount
    mooring:attachment:{agent}:{session}:{folder}   hash: one attachment (folder: 32 hex digits)
    channel mooring:events:{agent}                  JSON of each transition

Every key has a time to live and is written anew at each heartbeat, so what is not renewed is stale and vanishes. Redis
is told, never asked: when it is down mounting goes on, and the next report that gets through brings everything up to
date.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import redis.asyncio as redis
from redis.exceptions import RedisError

from storage_proxy import __version__
from storage_proxy.core.logs import get_logger, redact_text

from .attachments import Attachments, Transition
from .config import RedisSection

log = get_logger(__name__)

_CALL_SECONDS = 2.0
_MAX_EVENTS = 1000  # transitions kept while Redis is away; older ones are told by the state itself


class StatusPublisher:
    """Reports at every transition and at every heartbeat. Use `run` in a task; it ends when cancelled."""

    def __init__(self, agent_id: str, config: RedisSection, attachments: Attachments) -> None:
        self._agent_id = agent_id
        self._config = config
        self._attachments = attachments
        self._events: deque[Transition] = deque(maxlen=_MAX_EVENTS)
        self._changed = asyncio.Event()
        self._written: set[str] = set()
        self.last_success: float | None = None
        self.last_error: str | None = None
        attachments.listen(self._note)

    def _note(self, step: Transition) -> None:
        self._events.append(step)
        self._changed.set()

    async def run(self) -> None:
        client = redis.Redis.from_url(
            self._config.url,
            socket_connect_timeout=_CALL_SECONDS,
            socket_timeout=_CALL_SECONDS,
            decode_responses=True,
        )
        try:
            while True:
                await self._try(client, self.report)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._config.heartbeat):
                        await self._changed.wait()
        finally:
            # A stopped agent says so: its keys go at once instead of becoming stale.
            await asyncio.shield(self._try(client, self.withdraw))
            await client.aclose()

    async def _try(self, client: redis.Redis, work: Callable[[redis.Redis], object]) -> None:
        try:
            async with asyncio.timeout(_CALL_SECONDS * 2):
                await work(client)  # type: ignore[misc]  # both are coroutine functions
        except Exception as err:  # also a bug here must not reach the mounts
            if not isinstance(err, (RedisError, OSError, TimeoutError)) and self.last_error is None:
                log.exception("the state cannot be told")
            error = redact_text(f"{type(err).__name__}: {err}")
            if self.last_error is None:
                log.info("Redis does not answer; the state is kept here and told later", error=error)
            self.last_error = error
        else:
            if self.last_error is not None:
                log.info("Redis answers again")
            self.last_error, self.last_success = None, time.time()

    async def report(self, client: redis.Redis) -> None:
        """Everything, in one transaction; then the transitions since the last report."""
        self._changed.clear()
        events = list(self._events)
        hashes = self.snapshot()
        gone = self._written - hashes.keys()
        ttl_ms = int(self._config.ttl * 1000)
        async with client.pipeline(transaction=True) as pipe:
            for name, fields in hashes.items():
                pipe.delete(name)
                pipe.hset(name, mapping={field: str(value) for field, value in fields.items()})
                pipe.pexpire(name, ttl_ms)
            for name in gone:
                pipe.delete(name)
            for step in events:
                pipe.publish(f"mooring:events:{self._agent_id}", json.dumps(self._event(step)))
            await pipe.execute()
        for _ in events:
            self._events.popleft()
        self._written = set(hashes)

    async def withdraw(self, client: redis.Redis) -> None:
        if self._written:
            await client.delete(*self._written)
            self._written = set()

    def snapshot(self) -> dict[str, Mapping[str, object]]:
        """Key name -> fields. No secrets: there are none in plans and attachments."""
        now = _time(time.time())
        mounts = self._attachments.mounts()
        warnings = self._attachments.warnings()
        hashes: dict[str, Mapping[str, object]] = {
            f"mooring:agent:{self._agent_id}": {
                "agent_id": self._agent_id,
                "version": __version__,
                "pid": os.getpid(),
                "heartbeat": now,
                "mounts": len(mounts),
                "attachments": sum(len(items) for _, items in mounts),
                "warnings": json.dumps(warnings),
            }
        }
        for record, items in mounts:
            plan = record.plan
            hashes[f"mooring:mount:{self._agent_id}:{record.key}"] = {
                "key": record.key,
                "agent_id": self._agent_id,
                "volume": plan.volume,
                "endpoint": plan.location.endpoint,
                "bucket": plan.location.bucket,
                "prefix": plan.location.prefix,
                "mode": plan.mode.value,
                "driver": plan.driver,
                "state": record.state.value,
                "since": _time(record.since),
                "pid": record.process.pid if record.process else "",
                "sessions": json.dumps(sorted({item.session for item in items})),
                "last_error": record.last_error or "",
                "heartbeat": now,
            }
            for item in items:
                hashes[f"mooring:attachment:{self._agent_id}:{item.session}:{item.vfid.hex}"] = {
                    "agent_id": self._agent_id,
                    "session_id": item.session,
                    "vfid": str(item.vfid),
                    "volume": plan.volume,
                    "mount_key": item.key,
                    "mode": plan.mode.value,
                    "target": item.target,
                    "state": item.state.value,
                    "since": _time(item.since),
                    "heartbeat": now,
                }
        return hashes

    def _event(self, step: Transition) -> dict[str, object]:
        return {
            "at": _time(step.at),
            "agent_id": self._agent_id,
            "key": step.key,
            "volume": step.plan.volume,
            "bucket": step.plan.location.bucket,
            "prefix": step.plan.location.prefix,
            "from": step.old.value,
            "to": step.new.value,
            "error": step.error,
        }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
