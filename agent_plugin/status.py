"""The state of this node in Redis, for whoever looks at many nodes; `storage_proxy.core.noticeboard` names the keys.

Redis is told, never asked: when it is down mounting goes on, and the next report that gets through brings everything up
to date. What happened meanwhile is told too, in order, as far as `EventLog` keeps it; the numbers show a gap.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from typing import cast

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.typing import EncodableT, FieldT

from storage_proxy import __version__
from storage_proxy.core import noticeboard
from storage_proxy.core.ids import MountKey
from storage_proxy.core.logs import get_logger, redact_text
from storage_proxy.core.noticeboard import AgentState
from storage_proxy.core.wire import MountState

from .attachments import Attachments
from .config import RedisSection
from .eventlog import EventLog, Numbered
from .journal import MountRecord
from .resources import Usage

log = get_logger(__name__)

_CALL_SECONDS = 2.0
_REPORT_SECONDS = 2 * _CALL_SECONDS
_PAUSE_SECONDS = 0.1  # between two reports, however much happens: one tells everything


class StatusPublisher:
    """Reports after every event and at every heartbeat. Use `run` in a task; it ends when cancelled.

    `usage`: what the process of a mount costs. `warnings`: what an operator should look at, if not only what the
    attachments say. `mounts_stay`: the mounts outlive this agent, so they are not withdrawn
    when it stops.
    """

    def __init__(
        self,
        config: RedisSection,
        attachments: Attachments,
        events: EventLog,
        usage: Callable[[MountKey], Usage | None],
        *,
        warnings: Callable[[], list[str]] | None = None,
        mounts_stay: bool = False,
    ) -> None:
        self._agent_id = events.agent_id
        self._config = config
        self._attachments = attachments
        self._events = events
        self._usage = usage
        self._warnings = warnings or attachments.warnings
        self._mounts_stay = mounts_stay
        self._started = time.time()
        self._told = 0  # the number of the last event that Redis has
        self._written: dict[str, object] = {}  # what Redis has, by key
        self.last_success: float | None = None
        self.last_error: str | None = None
        self.errors = 0  # reports that did not get through

    async def run(self) -> None:
        client = redis.Redis.from_url(
            self._config.url,
            socket_connect_timeout=_CALL_SECONDS,
            socket_timeout=_CALL_SECONDS,
            decode_responses=True,
            retry=Retry(NoBackoff(), 0),  # the next heartbeat tries again
        )
        try:
            while True:
                await _to_its_end(self._try(client, self.report))
                await asyncio.sleep(min(_PAUSE_SECONDS, self._config.heartbeat))
                await self._events.wait(self._events.last if self.last_error else self._told, self._config.heartbeat)
        finally:
            # A stopped agent says so, which tells it from one that vanished.
            await asyncio.shield(self._try(client, self.take_leave))
            await client.aclose()

    async def _try(self, client: redis.Redis, work: Callable[[redis.Redis], object]) -> None:
        try:
            async with asyncio.timeout(_REPORT_SECONDS):
                await work(client)  # type: ignore[misc]  # both are coroutine functions
        except Exception as err:  # also a bug here must not reach the mounts
            if not isinstance(err, (RedisError, OSError, TimeoutError)) and self.last_error is None:
                log.exception("the state cannot be told")
            error = redact_text(f"{type(err).__name__}: {err}")
            if self.last_error is None:
                log.info("Redis does not answer; the state is kept here and told later", error=error)
            self.last_error = error
            self.errors += 1
        else:
            if self.last_error is not None:
                log.info("Redis answers again")
            self.last_error, self.last_success = None, time.time()

    async def report(self, client: redis.Redis) -> None:
        """Everything, in one transaction, with the events since the last report."""
        await self._write(client, self.snapshot(), self.index())

    async def take_leave(self, client: redis.Redis) -> None:
        """The last word: stopped in order. Mounts that stay are shown until their time to live ends or the next agent
        has taken them over."""
        if self._mounts_stay:
            await self._write(client, self.snapshot(AgentState.STOPPED), self.index())
        else:
            await self._write(
                client, {self._name: {**self._node(AgentState.STOPPED), "mounts": 0, "volumes": "{}"}}, {}
            )

    async def _write(
        self, client: redis.Redis, hashes: Mapping[str, Mapping[str, object]], sets: Mapping[str, set[str]]
    ) -> None:
        """Of what did not change since the last report only the time to live is renewed; if Redis does not have it any
        more, everything is written."""
        events = self._events.after(self._told)
        content: dict[str, object] = {name: _texts(fields) for name, fields in hashes.items()} | dict(sets)
        # After a failure nobody knows what Redis has.
        known = self._written if self.last_error is None else {}
        gone = self._written.keys() - content.keys()
        renewed: list[int] = []  # places of the answers
        ttl, retention = int(self._config.ttl * 1000), int(self._config.retention * 1000)
        now = time.time()
        async with client.pipeline(transaction=True) as pipe:
            for name, value in content.items():
                if known.get(name) == value:
                    renewed.append(len(pipe))
                else:
                    pipe.delete(name)
                    if isinstance(value, dict):
                        pipe.hset(name, mapping=value)
                    else:
                        pipe.sadd(name, *sets[name])
                pipe.pexpire(name, retention if name == self._name else ttl)
            for name in gone:
                pipe.delete(name)
            pipe.zadd(noticeboard.AGENTS, {self._agent_id: now})
            # Twice, so that an agent with a clock of its own does not forget the others.
            pipe.zremrangebyscore(noticeboard.AGENTS, "-inf", now - 2 * self._config.retention)
            for event in events:
                # redis-py wants the widest types for keys and values of a mapping, which is invariant.
                entry = cast("dict[FieldT, EncodableT]", self._entry(event))
                pipe.xadd(noticeboard.EVENTS, entry, maxlen=noticeboard.MAX_EVENTS, approximate=True)
            if events:
                pipe.pexpire(noticeboard.EVENTS, retention)
            answers = await pipe.execute()
        if events:
            self._told = events[-1].number
        self._written = content
        if not all(answers[place] for place in renewed):
            self._written = {}
            await self._write(client, hashes, sets)

    def snapshot(self, state: AgentState = AgentState.RUNNING) -> dict[str, Mapping[str, object]]:
        """Key name -> fields. No secrets: there are none in plans and attachments."""
        hashes: dict[str, Mapping[str, object]] = {self._name: self._node(state)}
        for record, items in self._attachments.mounts():
            plan = record.plan
            hashes[noticeboard.mount(self._agent_id, record.key)] = {
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
                "device": record.device or "",
                "sessions": json.dumps(sorted({item.session for item in items})),
                "last_error": record.last_error or "",
                **self._health(record),
            }
            for item in items:
                member = noticeboard.attachment_member(item.session, item.vfid.hex)
                hashes[noticeboard.attachment(self._agent_id, member)] = {
                    "agent_id": self._agent_id,
                    "session_id": item.session,
                    "vfid": str(item.vfid),
                    "volume": plan.volume,
                    "mount_key": item.key,
                    "mode": plan.mode.value,
                    "target": item.target,
                    "state": item.state.value,
                    "since": _time(item.since),
                }
        return hashes

    def _health(self, record: MountRecord) -> dict[str, object]:
        """What is measured and seen of a living mount; what is not known is left out."""
        entry, usage = self._attachments.entry(record.key), self._usage(record.key)
        found: dict[str, object | None] = {"repairs": record.repairs}
        if entry is not None:
            found |= {"trouble": entry.trouble, "unresponsive": entry.unresponsive}
        if usage is not None and usage.process == record.process:
            found |= {
                "measured_at": _time(usage.at),
                "rss": usage.rss,
                "pss": usage.pss,
                "fds": usage.fds,
                "threads": usage.threads,
                "cpu_seconds": usage.cpu_seconds,
                "read": usage.read,
                "written": usage.written,
            }
        return {name: value for name, value in found.items() if value is not None}

    def index(self) -> dict[str, set[str]]:
        """Key name -> members: what there is of each volume, so that readers need not search."""
        sets: dict[str, set[str]] = {}
        for record, items in self._attachments.mounts():
            volume = record.plan.volume
            sets.setdefault(noticeboard.mounts(self._agent_id, volume), set()).add(record.key)
            for item in items:
                members = sets.setdefault(noticeboard.attachments(self._agent_id, volume), set())
                members.add(noticeboard.attachment_member(item.session, item.vfid.hex))
        return sets

    @property
    def _name(self) -> str:
        return noticeboard.agent(self._agent_id)

    def _node(self, state: AgentState) -> dict[str, object]:
        mounts = self._attachments.mounts()
        volumes: dict[str, dict[str, object]] = {}
        for volume in sorted({record.plan.volume for record, _ in mounts}):
            here = [(record, items) for record, items in mounts if record.plan.volume == volume]
            volumes[volume] = {
                "by_state": dict(sorted(Counter(record.state.value for record, _ in here).items())),
                "attachments": sum(len(items) for _, items in here),
                **_worst([record for record, _ in here]),
                "troubled": sorted(record.key for record, _ in here if self._troubled(record)),
            }
        config = self._config
        return {
            "agent_id": self._agent_id,
            "version": __version__,
            "pid": os.getpid(),
            "boot": self._events.boot,
            "started": _time(self._started),
            "state": state.value,
            "heartbeat": _time(time.time()),
            "heartbeat_interval": config.heartbeat,
            # The next report is sent after the interval and has this long to arrive.
            "stale_after": min(config.ttl, config.heartbeat + _PAUSE_SECONDS + _REPORT_SECONDS),
            "ttl": config.ttl,
            "retention": config.retention,
            "draining": int(self._attachments.draining),
            "mounts": len(mounts),
            "attachments": sum(len(items) for _, items in mounts),
            "volumes": json.dumps(volumes),
            "warnings": json.dumps(self._warnings()),
        }

    def _troubled(self, record: MountRecord) -> bool:
        entry = self._attachments.entry(record.key)
        said = [record.last_error, *((entry.trouble, entry.unresponsive) if entry is not None else ())]
        return record.state in (MountState.DEAD, MountState.FAILED) or any(text is not None for text in said)

    def _entry(self, event: Numbered) -> dict[str, str]:
        """One event for the stream. `boot` and `number` name it once, also when it had to be sent twice."""
        told = self._events.describe(event)
        fields = told.model_dump(mode="json", exclude={"id", "detail"}, exclude_none=True)
        if told.detail:
            fields["detail"] = json.dumps(told.detail, default=str)
        return {name: str(value) for name, value in fields.items()}


def _texts(fields: Mapping[str, object]) -> dict[FieldT, EncodableT]:
    return {field: str(value) for field, value in fields.items()}


async def _to_its_end(work: Coroutine[object, object, None]) -> None:
    """Also if this task is cancelled meanwhile: a report that is cut off half-way would be told twice."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


# The first that a mount of a volume is in says most about the volume.
_WORST_FIRST = (MountState.FAILED, MountState.DEAD, MountState.STAGING, MountState.DRAINING, MountState.LIVE)


def _worst(records: Sequence[MountRecord]) -> dict[str, object]:
    """The worst state of some mounts, since when one is in it, and the latest error of any."""
    state = next(state for state in _WORST_FIRST if any(record.state is state for record in records))
    errors = sorted((record.since, record.last_error) for record in records if record.last_error is not None)
    return {
        "worst_state": state.value,
        "worst_since": _time(min(record.since for record in records if record.state is state)),
        "last_error": errors[-1][1] if errors else None,
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
