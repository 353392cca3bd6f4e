"""Many mounts, many sessions at once, and sessions that come and go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

from agent_plugin.kernel import read_mountinfo
from storage_proxy.client.agent import AgentClient
from storage_proxy.core.wire import BindSpec
from tests.t4_agent.node import new_session, until

from .costs import Idle, Meter, cpu_seconds, idle, memory_mib
from .peers import bare
from .stand import AgentRun, Stand, load, spread

_CONTAINER_STARTS = 5


async def many(stand: Stand, count: int, stages: Sequence[int], idle_seconds: float) -> dict[str, Any]:
    """`count` mounts of different keys, one after the other; before that the same by hand. Idle costs are measured
    without mounts and whenever as many as in `stages` are there."""
    by_hand = await asyncio.to_thread(_by_hand, stand, count)
    async with stand.agent(grace_period=0.0) as agent:
        with closing(Meter()) as meter:
            meter.enter(agent.process.pid)
            costs = [await _idle(stand, agent, meter, idle_seconds)]
            starts = {0: await _container_starts(stand)}
            specs: list[BindSpec] = []
            grants = [(number, stand.grant(stand.request(number))) for number in range(count)]
            attached: list[float] = []
            for number, grant in grants:
                began = time.perf_counter()
                specs.append(await agent.client.attach(grant))
                attached.append(1000 * (time.perf_counter() - began))
                if number + 1 in stages:
                    costs.append(await _idle(stand, agent, meter, idle_seconds))
            starts[count] = await _container_starts(stand, specs[-1])
            lines = len(read_mountinfo())
            detached = await _detach(agent.client, specs)
            left = stand.node.residue()
            whole = meter.whole
    mounted: list[float] = by_hand.pop("each")
    ratio = sorted(attached)[count // 2] / sorted(mounted)[count // 2]
    return {
        "mounts": count,
        "load": load(),
        "mount_table_lines": lines,
        "attach_ms": spread(attached),
        "attach_first_tenth_ms": spread(attached[: max(1, count // 10)])["median"],
        "attach_last_tenth_ms": spread(attached[-max(1, count // 10) :])["median"],
        "attach_total_s": round(sum(attached) / 1000, 2),
        "detach_ms": spread(detached),
        "detach_total_s": round(sum(detached) / 1000, 2),
        "by_hand": {"mount_ms": spread(mounted), **by_hand},
        "attach_to_mount_by_hand": round(ratio, 2),
        "idle_seconds": idle_seconds,
        "idle_counts_children": whole,
        "idle": [asdict(cost) for cost in costs],
        "container_start_ms": {str(mounts): spread(values) for mounts, values in starts.items()},
        "left_over": {name: len(found) for name, found in left.items() if isinstance(found, list)},
    }


def _by_hand(stand: Stand, count: int) -> dict[str, Any]:
    with bare(stand) as made:
        mounted = [1000 * made.mount(number) for number in range(count)]
        memory = memory_mib(made.pids())
        unmounted = [1000 * made.unmount(number) for number in range(count)]
    return {"each": mounted, "total_s": round(sum(mounted) / 1000, 2), **memory, "unmount_ms": spread(unmounted)}


async def _idle(stand: Stand, agent: AgentRun, meter: Meter, seconds: float) -> Idle:
    await asyncio.sleep(2.0)  # what the last attach left to do is no idling
    return await idle(meter, agent.process.pid, stand.node.processes(), seconds)


async def _container_starts(stand: Stand, *specs: BindSpec) -> list[float]:
    """Milliseconds of starting a container that ends at once."""
    if stand.podman is None:
        return []
    took = []
    for _ in range(_CONTAINER_STARTS):
        began = time.perf_counter()
        code, output = await stand.podman.run("exit 0", *specs, user="0:0")
        took.append(1000 * (time.perf_counter() - began))
        if code != 0:
            raise SystemExit(f"a container did not start: {output}")
    return took


async def _detach(client: AgentClient, specs: Sequence[BindSpec]) -> list[float]:
    took = []
    for spec in specs:
        began = time.perf_counter()
        await client.detach_session(spec.session_id)
        took.append(1000 * (time.perf_counter() - began))
    return took


async def herd(stand: Stand, count: int, rounds: int) -> dict[str, Any]:
    """`count` sessions that attach the same folder at the same instant, against one that does so alone."""
    alone: list[float] = []
    together: list[float] = []
    each: list[float] = []
    mounts: list[int] = []
    async with stand.agent(grace_period=0.0) as agent:

        async def one(grant: str) -> float:
            began = time.perf_counter()
            await agent.client.attach(grant)
            return 1000 * (time.perf_counter() - began)

        for _ in range(rounds):
            alone.append(await one(stand.grant(stand.request(0))))
            await _end_all(stand, agent)
            agent.forget_log()
            request = stand.request(0)
            grants = [stand.grant(request, new_session()) for _ in range(count)]
            began = time.perf_counter()
            each += await asyncio.gather(*map(one, grants))
            together.append(1000 * (time.perf_counter() - began))
            mounts.append(len(agent.logged("mounted")))
            if len(await agent.client.attachments()) != count:
                raise SystemExit("not every session is attached")
            await _end_all(stand, agent)
    return {
        "sessions": count,
        "rounds": rounds,
        "load": load(),
        "alone_ms": spread(alone),
        "all_ready_ms": spread(together),
        "each_ms": spread(each),
        "mounts_made": max(mounts),
    }


async def _end_all(stand: Stand, agent: AgentRun) -> None:
    for session in {item.session_id for item in await agent.client.attachments()}:
        await agent.client.detach_session(session)
    await until(lambda: stand.node.residue() == {}, "nothing is left", 60.0)


async def churn(stand: Stand, rate: float, seconds: float) -> dict[str, Any]:
    """`rate` sessions per second that attach the same folder and detach it at once, started by the clock, whether the
    former ones have ended or not."""
    attached: list[float] = []
    detached: list[float] = []
    failed: list[str] = []
    async with stand.agent(grace_period=45.0) as agent:
        request = stand.request(0)
        count = int(rate * seconds)
        grants = [(session := new_session(), stand.grant(request, session)) for _ in range(count)]

        async def one(session: str, grant: str) -> None:
            try:
                began = time.perf_counter()
                await agent.client.attach(grant)
                between = time.perf_counter()
                await agent.client.detach_session(session)
                attached.append(1000 * (between - began))
                detached.append(1000 * (time.perf_counter() - between))
            except Exception as err:
                failed.append(f"{type(err).__name__}: {err}")

        began, worked = time.monotonic(), cpu_seconds([agent.process.pid])
        async with asyncio.TaskGroup() as tasks:
            for number, (session, grant) in enumerate(grants):
                await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
                tasks.create_task(one(session, grant))
        took = time.monotonic() - began
        worked = cpu_seconds([agent.process.pid]) - worked
        mounts = len(agent.logged("mounted"))
        held = len(await agent.client.attachments())
        await agent.client.gc()
        await until(lambda: stand.node.residue() == {}, "nothing is left", 60.0)
    return {
        "wanted_per_second": rate,
        "seconds": round(took, 1),
        "load": load(),
        "achieved_per_second": round(len(attached) / took, 1),
        "failed": len(failed),
        "first_failure": failed[0] if failed else None,
        "agent_cpu_ms_each": round(1000 * worked / count, 2),
        "attach_ms": spread(attached),
        "detach_ms": spread(detached),
        "mounts_made": mounts,
        "attachments_left": held,
    }
