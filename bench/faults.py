"""What a container notices when a mount process is killed or stopped, or when the agent is restarted."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent_plugin.kernel import top_at
from storage_proxy.core.wire import BindSpec

from .peers import Bare, bare
from .readers import Outage, Reader, outage
from .stand import AgentRun, Stand, load, spread

# The agent counts a repaired mount that lives for less than 2 s as a failed attempt and pauses before the next one.
_LIVES = 2.5
_GIVE_UP = 15.0


@dataclass
class Target:
    """A mount, who reads it, and how to find its process. `crashes` are monotonic times."""

    name: str
    place: Path  # where the mount is seen on the host
    reader: Reader
    pid: Callable[[], Awaitable[int]]
    crashes: list[float] = field(default_factory=list)
    gone: bool = False
    whole: bool = True

    async def recovered(self, since: float, mount_id: int | None, seconds: float) -> bool:
        """Waits until the container reads again: after failed reads, or after the mount was replaced between two."""
        end = since + seconds
        while time.monotonic() < end:
            after = [sample for sample in self.reader.look() if sample.ended >= since]
            bad = [sample.ended for sample in after if not sample.good]
            good = [sample for sample in after if sample.good and (not bad or sample.begun >= bad[-1])]
            if bad and good:
                return True
            if good and not bad and self.mount_id() not in (None, mount_id):
                return await self.reader.good_since(time.monotonic(), end - time.monotonic())
            await asyncio.sleep(0.02)
        return False

    def mount_id(self) -> int | None:
        top = top_at(self.place)
        return None if top is None else top.mount_id

    def outages(self) -> list[Outage]:
        """One per crash, each up to the next one."""
        ends = [*self.crashes[1:], float("inf")]
        return [outage(self.reader.look(), begun, end) for begun, end in zip(self.crashes, ends, strict=True)]


async def crash(stand: Stand, count: int) -> dict[str, Any]:
    """kill -9 of mount processes in turn, each with a container that reads 20 times per second."""
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(stand.agent())
        by_hand = stack.enter_context(bare(stand))
        targets = [
            await _agent_target(stand, agent, stack, "agent, bind with rslave", 0, "rslave"),
            await _agent_target(stand, agent, stack, "agent, bind without rslave", 1, "rprivate"),
            await _loop_target(stand, by_hand, stack, "shell loop, folder bound", 2, parent=False),
            await _loop_target(stand, by_hand, stack, "shell loop, parent bound", 3, parent=True),
        ]
        for _ in range(count):
            for target in targets:
                if not target.gone:
                    await _kill(target)
        for target in targets:
            target.whole = await target.reader.same_process()
            target.reader.look()
        repairs = agent.logged("mount repaired")
        return {
            "crashes": count,
            "reads_per_second": 20,
            "load": load(),
            "targets": [_told(target) for target in targets],
            "agent_says_ms": spread([1000 * float(item["seconds"]) for item in repairs]),
            "of_it_until_staged_ms": spread([float(item["staged_ms"]) for item in repairs]),
        }


async def _kill(target: Target) -> None:
    await asyncio.sleep(max(0.0, (target.crashes[-1] + _LIVES if target.crashes else 0.0) - time.monotonic()))
    await asyncio.sleep(random.uniform(0.0, 0.05))  # anywhere between two reads
    before, pid = target.mount_id(), await target.pid()
    target.crashes.append(time.monotonic())
    os.kill(pid, signal.SIGKILL)
    target.gone = not await target.recovered(target.crashes[-1], before, _GIVE_UP)


def _told(target: Target) -> dict[str, Any]:
    outages = target.outages()
    seconds = [1000 * item.seconds for item in outages if item.seconds is not None]
    failed = [float(item.failed) for item in outages if item.seconds is not None]
    return {
        "name": target.name,
        "crashes": len(outages),
        "recovered": len(seconds),
        "until_reads_ms": spread(seconds),
        "failed_reads": spread(failed),
        "errors": dict(sum((Counter(item.errors) for item in outages), Counter[str]())),
        "same_container_process": target.whole,
    }


# --- targets ----------------------------------------------------------------------------------------------------------


async def _agent_target(
    stand: Stand, agent: AgentRun, stack: AsyncExitStack, name: str, number: int, propagation: str
) -> Target:
    spec = await stand.attach(agent.client, number)
    reader = await _reader(stand, stack, spec.source, propagation)

    async def pid() -> int:
        (found,) = [each.pid for each in await agent.client.mounts() if each.key == spec.mount_key]
        assert found is not None
        return found

    return Target(name, Path(spec.source), reader, pid)


async def _loop_target(
    stand: Stand, by_hand: Bare, stack: AsyncExitStack, name: str, number: int, *, parent: bool
) -> Target:
    place = await by_hand.loop(number)
    reader = await _reader(stand, stack, str(place.parent if parent else place), "rslave", place.name if parent else "")

    async def pid() -> int:
        return by_hand.pid(place)

    return Target(name, place, reader, pid)


async def _reader(stand: Stand, stack: AsyncExitStack, source: str, propagation: str, below: str = "") -> Reader:
    assert stand.podman is not None
    reader = await Reader.start(
        stand.podman,
        stand.node.place / "readers",
        f"type=bind,source={source},target=/data,bind-propagation={propagation}",
        f"/data/{below}".rstrip("/"),
    )
    stack.push_async_callback(reader.close)
    return reader


# --- a process that hangs ---------------------------------------------------------------------------------------------


async def stop(stand: Stand, count: int, patience: float) -> dict[str, Any]:
    """SIGSTOP of mount processes. The one by hand is killed after `patience` seconds: nobody else would free its
    reader."""
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(stand.agent())
        by_hand = stack.enter_context(bare(stand))
        ours = await _agent_target(stand, agent, stack, "agent", 0, "rslave")
        theirs = await _loop_target(stand, by_hand, stack, "shell loop, parent bound", 1, parent=True)
        victim = await theirs.pid()
        stopped = time.monotonic()
        os.kill(victim, signal.SIGSTOP)
        for _ in range(count):
            await asyncio.sleep(max(0.0, (ours.crashes[-1] + 2 * _LIVES if ours.crashes else 0.0) - time.monotonic()))
            await asyncio.sleep(random.uniform(0.0, 1.0))  # anywhere between two looks of the watchdog
            before, pid = ours.mount_id(), await ours.pid()
            ours.crashes.append(time.monotonic())
            os.kill(pid, signal.SIGSTOP)
            if not await ours.recovered(ours.crashes[-1], before, 60.0):
                raise SystemExit("the container does not read again")
        await asyncio.sleep(max(0.0, stopped + patience - time.monotonic()))
        freed = [sample for sample in theirs.reader.look() if sample.ended >= stopped and sample.begun <= stopped + 1]
        blocked = not any(sample.ended - sample.begun > 1 or not sample.good for sample in freed)
        os.kill(victim, signal.SIGKILL)
        outages = ours.outages()
        return {
            "stops": count,
            "load": load(),
            "reader_freed_s": spread([item.freed for item in _freed(ours)], 2),
            "until_reads_s": spread([item.seconds for item in outages if item.seconds is not None], 2),
            "recovered": sum(item.seconds is not None for item in outages),
            "failed_reads": spread([float(item.failed) for item in outages]),
            "same_container_process": await ours.reader.same_process(),
            "peer_blocked_for_s": round(patience, 1) if blocked else None,
        }


@dataclass(frozen=True, slots=True)
class _Freed:
    freed: float


def _freed(target: Target) -> list[_Freed]:
    """When the read that the stop had caught came back: the first long or failed one."""
    found = []
    for since in target.crashes:
        for sample in target.reader.samples:
            if sample.ended >= since and (not sample.good or sample.ended - sample.begun > 0.5):
                found.append(_Freed(sample.ended - since))
                break
    return found


# --- the agent --------------------------------------------------------------------------------------------------------


async def restart(stand: Stand, count: int) -> dict[str, Any]:
    """The agent ended in order and by kill -9, in turn, and started again at once, under containers that read."""
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(stand.agent())
        targets = [
            await _agent_target(stand, agent, stack, str(number), number, propagation)
            for number, propagation in enumerate(("rslave", "rslave", "rprivate"))
        ]
        began = time.monotonic()
        times: dict[str, list[float]] = {"SIGTERM": [], "SIGKILL": []}
        for number in range(2 * count):
            name = ("SIGTERM", "SIGKILL")[number % 2]
            await asyncio.sleep(1.0)
            left = time.monotonic()
            await (agent.process.terminate() if name == "SIGTERM" else agent.process.kill())
            await agent.start()
            times[name].append(1000 * (time.monotonic() - left))
        await asyncio.sleep(1.0)
        samples = [sample for target in targets for sample in target.reader.look() if sample.ended >= began]
        gaps = [
            late.ended - early.ended
            for target in targets
            for early, late in zip(target.reader.samples, target.reader.samples[1:], strict=False)
            if early.ended >= began
        ]
        return {
            "restarts": 2 * count,
            "containers": len(targets),
            "load": load(),
            "reads": len(samples),
            "failed_reads": sum(not sample.good for sample in samples),
            "longest_between_reads_ms": round(1000 * max(gaps, default=0.0), 1),
            "until_answers_ms": {name: spread(values) for name, values in times.items()},
            "mounts_live_on": _still(await agent.client.mounts(), [t.place for t in targets]),
        }


def _still(mounts: Sequence[Any], places: Sequence[Path]) -> bool:
    return len(mounts) == len(places) and all(mount.state == "live" and mount.repairs == 0 for mount in mounts)


def binds(specs: Sequence[BindSpec]) -> list[str]:
    return [spec.source for spec in specs]
