"""What operators do through the API: look, repair, drain, follow events."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import pytest

from agent_plugin.eventlog import KEPT, EventLog
from agent_plugin.events import Event, EventKind
from agent_plugin.inspection import Inspector
from agent_plugin.layout import Layout
from agent_plugin.resources import Resources
from storage_proxy.cli import checks
from storage_proxy.client.agent import AgentClient
from storage_proxy.client.storages import EventsLost, FeedItem, MountEvent
from storage_proxy.core.errors import InvalidIdentifier, InvalidRequest, NotFound, ServiceUnavailable
from storage_proxy.core.ids import MountKey
from storage_proxy.core.wire import MountState

from .node import Node, until, until_async

pytestmark = [pytest.mark.root, pytest.mark.asyncio]


class Following:
    """Takes events in the background, so that nothing is missed between two looks."""

    def __init__(self, events: AsyncGenerator[FeedItem, None]) -> None:
        self.items: list[FeedItem] = []
        self.task = asyncio.create_task(self._follow(events))

    async def _follow(self, events: AsyncGenerator[FeedItem, None]) -> None:
        async with aclosing(events):
            async for item in events:
                self.items.append(item)

    @property
    def steps(self) -> list[tuple[str | None, str | None]]:
        return [(item.old, item.new) for item in self.items if isinstance(item, MountEvent) and item.kind == "state"]

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


# --- looking ----------------------------------------------------------------------------------------------------------


async def test_a_mount_is_shown_with_all_that_is_known(node: Node, folder: str) -> None:
    async with node.manager() as (agent, manager):
        request = node.request(folder, "data")
        specs = [await agent.attach(node.grant(request)) for _ in range(2)]
        (pid,) = node.processes()
        found = await agent.mount(specs[0].mount_key)
        assert (found.key, found.state, found.place) == (specs[0].mount_key, MountState.LIVE, f"s3://{folder}/data/")
        assert (found.pid, found.volume, found.endpoint, found.layers) == (pid, "minio", node.endpoint, 1)
        assert (found.ownership.uid, found.credential_id, found.repairs) == (1000, "admin", 0)
        assert {item.session_id for item in found.attachments} == {spec.session_id for spec in specs}
        assert {(item.source, item.layers, item.state) for item in found.attachments} == {
            (spec.source, 1, "bound") for spec in specs
        }
        assert found.holders == [], "no container"
        assert (found.former, found.trouble, found.unresponsive, found.refuses) == ([], None, None, False)
        assert Path(found.path).is_mount()
        resources = Resources(manager.mounts)
        await resources.sample()
        usage = (await Inspector(manager, Layout(node.runtime), resources.of).look(MountKey(found.key))).usage
        assert usage is not None
        assert usage.rss > 1024 * 1024
        assert usage.threads > 0


@pytest.mark.semantics(5)
async def test_what_is_shown_holds_no_secret(node: Node, folder: str) -> None:
    async with node.agent() as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        text = (await agent.call("GET", f"/v1/mounts/{spec.mount_key}")).decode()
        text += (await agent.call("GET", "/v1/drain")).decode()
        async with aclosing(agent.events(since="0")) as events:
            text += (await anext(events)).model_dump_json()
        assert "staging" in text
        assert node.credential.secret_key.reveal() not in text
        assert node.credential.access_key not in text


async def test_a_mount_is_found_by_the_beginning_of_its_key(node: Node, folder: str) -> None:
    async with node.agent() as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        for text in (spec.mount_key, spec.mount_key[:6], spec.mount_key[:9].upper()):
            assert (await agent.mount(text)).key == spec.mount_key
        for text in (spec.mount_key[:5], "x" * 8, f"{spec.mount_key}0", "..%2F..%2Fetc"):
            with pytest.raises(InvalidIdentifier):
                await agent.mount(text)
        other = format(int(spec.mount_key[:8], 16) ^ 1, "08x")
        with pytest.raises(NotFound, match=other):
            await agent.mount(other)


async def test_a_container_that_holds_a_mount_is_named(node: Node, folder: str) -> None:
    """A mount namespace with the bind in it, as every container runtime makes one."""
    async with node.agent() as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        process = await asyncio.create_subprocess_exec(
            *("unshare", "--mount", "--propagation", "slave", "sh", "-c", "echo ready; read line"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"ready\n"
            holders = (await agent.mount(spec.mount_key)).holders
            assert holders is not None
            (holder,) = holders
            assert (holder.pid, holder.current) == (process.pid, True)
            assert spec.source in holder.paths
        finally:
            process.kill()
            await process.wait()


# --- repair -----------------------------------------------------------------------------------------------------------


@pytest.mark.expects_log("mount process ended")
async def test_repair_of_a_living_mount_does_nothing(node: Node, folder: str) -> None:
    async with node.agent() as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        pids = node.processes()
        done = await agent.repair(spec.mount_key[:8])
        assert (done.key, done.repaired, done.state) == (spec.mount_key, False, MountState.LIVE)
        assert node.processes() == pids
        with pytest.raises(NotFound):
            await agent.repair("0123456789ab")


@pytest.mark.expects_log("giving up a mount")
async def test_a_forced_repair_replaces_a_process_that_lives(node: Node, folder: str) -> None:
    async with node.agent() as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        (pid,) = node.processes()
        done = await agent.repair(spec.mount_key, force=True)
        assert (done.repaired, done.state) == (True, MountState.LIVE)
        assert (Path(spec.source) / "hello.txt").read_text() == "hello from data/"
        await until(lambda: len(node.processes()) == 1 and node.processes() != [pid], "another process serves it")
        found = await agent.mount(spec.mount_key)
        assert (found.repairs, found.pid, found.attachments[0].layers) == (1, node.processes()[0], 2)
        complaints = [found.message for found in await checks.mounts() if str(node.place) in found.message]
        assert complaints == [], "mooring doctor does not mind the dead one below"


# --- drain ------------------------------------------------------------------------------------------------------------


@pytest.mark.expects_log("being drained")
async def test_a_drained_node_takes_nothing_new(node: Node, folder: str) -> None:
    async with node.agent() as agent:
        request = node.request(folder, "data")
        spec = await agent.attach(node.grant(request))
        status = await agent.drain()
        assert (status.draining, status.attachments, status.done) == (True, 1, False)
        assert [(mount.key, mount.sessions) for mount in status.mounts] == [(spec.mount_key, [spec.session_id])]
        for other in (request, node.request(folder, "other")):
            with pytest.raises(ServiceUnavailable, match="drained"):
                await agent.attach(node.grant(other))
        assert (Path(spec.source) / "hello.txt").exists(), "who was there stays"
        assert (await agent.mount(spec.mount_key)).refuses
        state = await agent.status()
        assert state.status == "degraded"
        assert any("draining" in text for text in state.warnings)
        waiting = asyncio.create_task(agent.drain(wait=30))
        await agent.detach_session(spec.session_id)
        async with asyncio.timeout(5):
            done = await waiting
        assert (done.draining, done.attachments, done.done) == (True, 0, True)
        after = await agent.resume()
        assert (after.draining, after.keys, after.done) == (False, [], False)
        again = await agent.attach(node.grant(request))
        await agent.detach_session(again.session_id)


@pytest.mark.expects_log("being drained")
async def test_one_mount_is_drained(node: Node, folder: str) -> None:
    async with node.agent() as agent:
        request = node.request(folder, "data")
        spec = await agent.attach(node.grant(request))
        other = await agent.attach(node.grant(node.request(folder, "other")))
        status = await agent.drain([spec.mount_key[:8]], wait=0.2)
        assert (status.draining, status.keys, status.done, status.attachments) == (False, [spec.mount_key], False, 1)
        with pytest.raises(ServiceUnavailable, match="This mount is being drained"):
            await agent.attach(node.grant(request))
        await agent.attach(node.grant(node.request(folder, "other")))
        assert (await agent.drain_status()).keys == [spec.mount_key]
        await agent.detach_session(spec.session_id)
        with pytest.raises(NotFound):
            await agent.mount(spec.mount_key)
        assert (await agent.drain([spec.mount_key[:8]], wait=5)).done, "who waits for it may ask again"
        assert (await agent.resume([spec.mount_key[:8]])).keys == [], "also when the mount has gone meanwhile"
        await agent.attach(node.grant(request))
        with pytest.raises(NotFound):
            await agent.drain(["0123456789ab"])
        for body in ({"wait": -1}, {"keys": []}, {"keys": "x"}):
            with pytest.raises(InvalidRequest):
                await agent.call("POST", "/v1/drain", body=body)
        assert (await agent.mount(other.mount_key)).attachments


@pytest.mark.expects_log("being drained")
async def test_a_drain_outlives_the_agent(node: Node, folder: str) -> None:
    async with node.agent(stop_mounts_on_exit=False) as agent:
        await agent.drain()
    async with node.agent(stop_mounts_on_exit=False) as agent:
        assert (await agent.drain_status()).draining
        with pytest.raises(ServiceUnavailable, match="drained"):
            await agent.attach(node.grant(node.request(folder, "data")))
        await agent.resume()
    async with node.agent() as agent:
        assert not (await agent.drain_status()).draining


# --- events -----------------------------------------------------------------------------------------------------------


@pytest.mark.expects_log("mount process ended")
async def test_events_are_followed_and_taken_up_again(node: Node, folder: str) -> None:
    async with node.agent() as agent:
        following = Following(agent.events(since="0"))
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        await until(lambda: len(following.steps) == 2, "the start is told")
        os.kill(node.processes()[0], signal.SIGKILL)
        await until(lambda: following.steps[-1] == ("staging", "live") and len(following.steps) > 3, "and the repair")
        await until(lambda: any(isinstance(i, MountEvent) and i.kind == "repaired" for i in following.items), "too")
        assert following.steps[:3] == [("absent", "staging"), ("staging", "live"), ("live", "dead")]
        first, *rest = following.items
        assert isinstance(first, MountEvent)
        assert (first.key, first.bucket, first.number) == (spec.mount_key, folder, 1)
        await following.close()
        again = Following(agent.events(since=first.id))
        await until(lambda: len(again.items) >= len(rest), "what came after it")
        assert again.items[: len(rest)] == rest
        await again.close()
        fresh = Following(agent.events())

        async def heard() -> bool:
            await agent.drain()  # again and again: nobody else sees when it begins to listen
            await agent.resume()
            return bool(fresh.items)

        await until_async(heard, "a new event arrives")
        assert first not in fresh.items, "without an id, from now on"
        await fresh.close()


async def test_a_stopping_agent_ends_streams_at_once(node: Node, folder: str) -> None:
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack, AgentClient(node.socket) as client:
        await stack.enter_async_context(node.agent())
        following = Following(client.events(since="0"))
        await client.drain()
        await until(lambda: bool(following.items), "it follows")
        begun = loop.time()
        await stack.aclose()
        assert loop.time() - begun < 5, "not the ten seconds that requests under way are given"
        await asyncio.wait([following.task], timeout=5)
        assert following.task.done()
        assert following.task.exception() is None, "the end of a stream is no error"


async def test_a_quiet_stream_shows_that_it_lives(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_plugin.operations.HEARTBEAT_SECONDS", 0.05)
    async with node.agent() as agent, aclosing(agent.lines("/v1/events", idle=5)) as lines:
        assert [await anext(lines) for _ in range(3)] == ['{"kind":"heartbeat"}'] * 3


async def test_who_follows_slowly_finds_out_what_is_missing(node: Node) -> None:
    log = EventLog("node", 3)
    for number in range(10):
        log.note(Event(float(number), EventKind.DRAIN))
    assert [numbered.number for numbered in log.after(0)] == [8, 9, 10]
    assert [numbered.number for numbered in log.after(9)] == [10]
    assert log.after(10) == []
    assert log.place(f"{log.boot}-9") == 9
    assert [log.place(text) for text in ("0", "another-9", f"{log.boot}-x", "")] == [0, 0, 0, 0]
    assert log.place(f"{log.boot}-99") == 10, "nobody knows the future"
    async with node.manager() as (agent, manager):
        for _ in range(KEPT + 40):
            manager.tell(EventKind.RECONCILED)
        async with aclosing(agent.events(since="0")) as events:
            lost = await anext(events)
            first = await anext(events)
        assert isinstance(lost, EventsLost)
        assert isinstance(first, MountEvent)
        assert lost.count == first.number - 1 >= 40
