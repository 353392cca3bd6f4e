"""A mount process dies, hangs or loses its place: sessions see it return at the same path, and nothing stays."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent_plugin.attachments import Attachments
from agent_plugin.events import Event, EventKind
from agent_plugin.kernel import entries_at, top_at, unmount
from storage_proxy.core.errors import BucketNotFound, Conflict, NotFound, S3Unavailable, ServiceUnavailable
from storage_proxy.core.ids import AccessMode
from storage_proxy.core.wire import BindSpec, MountState
from storage_proxy.s3 import S3Client
from tests.conftest import S3Server, delete_bucket
from tests.fakes.fault_proxy import ALWAYS, Fault, FaultProxy

from .node import Node, new_session, until, until_async
from .podman import Podman

pytestmark = [
    pytest.mark.root,
    pytest.mark.asyncio,
    pytest.mark.expects_log("mount process ended"),
]


def make_all_shared(node: Node) -> None:
    subprocess.run(["mount", "--make-rshared", str(node.runtime)], check=True)


def mount_pid(node: Node) -> int:
    (pid,) = node.processes()
    return pid


async def crash(node: Node, manager: Attachments) -> int:
    """Kills the only mount process; returns the pid of the one in its place."""
    ((record, _),) = manager.mounts()
    pid, repairs = mount_pid(node), record.repairs
    os.kill(pid, signal.SIGKILL)
    await repaired_since(manager, repairs)
    return mount_pid(node)


async def repaired_since(manager: Attachments, repairs: int, seconds: float = 15.0) -> None:
    """Until the only mount has been repaired more often than that, and lives."""

    def done() -> bool:
        return all(record.repairs > repairs and record.state is MountState.LIVE for record, _ in manager.mounts())

    await until(done, "it is repaired", seconds)


def listen(manager: Attachments, kind: EventKind) -> list[Event]:
    found: list[Event] = []
    manager.listen(lambda event: found.append(event) if event.kind is kind else None)
    return found


@pytest.mark.semantics(14)
async def test_a_dead_mount_returns_at_the_same_path(node: Node, folder: str) -> None:
    async with node.manager() as (agent, manager):
        repaired = listen(manager, EventKind.REPAIRED)
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        place = Path(spec.source) / "hello.txt"
        opened = place.open()
        for count in range(1, 4):
            await crash(node, manager)
            await until(lambda: len(repaired) == count, "it is told")  # noqa: B023
            assert place.read_text() == "hello from data/"
            assert repaired[-1].detail["repairs"] == count
            assert len(entries_at(spec.source)) == count + 1
        with pytest.raises(OSError, match=r"not connected|aborted"):
            os.fstat(opened.fileno())
        with contextlib.suppress(OSError):  # it may say so once more
            opened.close()
        assert (await agent.status()).status == "ok"
        place.with_name("new.txt").write_text("written after it")
        assert len(node.credentials()) == 1
        await until(lambda: len(node.scratch()) == 1, "the traces of the dead ones are gone")
        await agent.detach_session(spec.session_id)
        assert node.residue() == {}


async def test_every_session_of_a_mount_is_repaired(node: Node, folder: str) -> None:
    async with node.manager() as (agent, manager):
        request = node.request(folder, "data")
        specs = [await agent.attach(node.grant(request)) for _ in range(5)]
        await crash(node, manager)
        for spec in specs:
            assert (Path(spec.source) / "hello.txt").read_text() == "hello from data/"
        for spec in specs:
            await agent.detach_session(spec.session_id)
        assert node.residue() == {}


async def test_read_only_stays_read_only(node: Node, folder: str) -> None:
    async with node.manager() as (agent, manager):
        spec = await agent.attach(node.grant(node.request(folder, "data", mode=AccessMode.READ_ONLY)))
        await crash(node, manager)
        top = top_at(spec.source)
        assert top is not None
        assert "ro" in top.options
        assert "ro" in top.super_options
        with pytest.raises(OSError, match="Read-only"):
            (Path(spec.source) / "no").touch()


async def test_a_host_whose_mounts_were_all_made_shared(node: Node, folder: str) -> None:
    """As `mount --make-rshared /` does, under a running agent: it still mounts and repairs."""
    async with node.manager() as (agent, manager):
        first = await agent.attach(node.grant(node.request(folder, "data")))
        make_all_shared(node)
        await crash(node, manager)
        assert (Path(first.source) / "hello.txt").read_text() == "hello from data/"
        make_all_shared(node)
        second = await agent.attach(node.grant(node.request(folder, "other")))
        assert (Path(second.source) / "hello.txt").read_text() == "hello from other/"
        for spec in (first, second):
            await agent.detach_session(spec.session_id)
        assert node.residue() == {}


async def test_no_other_mount_notices(node: Node, folder: str) -> None:
    async with node.manager() as (agent, manager):
        await agent.attach(node.grant(node.request(folder, "data")))
        pid = mount_pid(node)
        other = await agent.attach(node.grant(node.request(folder, "other")))
        with (Path(other.source) / "hello.txt").open() as opened:
            os.kill(pid, signal.SIGKILL)
            await until(lambda: pid not in node.processes(), "it is gone")
            await until(lambda: {record.state for record, _ in manager.mounts()} == {MountState.LIVE}, "all live again")
            assert opened.read() == "hello from other/"
        assert len(entries_at(other.source)) == 1


@pytest.mark.containers
async def test_a_container_goes_on_without_restart(node: Node, folder: str, podman: Podman) -> None:
    async with node.manager() as (agent, manager):
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        name = await podman.start(spec)
        pid = await podman.pid(name)
        for _ in range(2):
            await crash(node, manager)
            assert await podman.execute(name, "cat /data/hello.txt") == (0, "hello from data/")
        assert await podman.pid(name) == pid


# --- a repair that does not succeed at once ---------------------------------------------------------------------------


@asynccontextmanager
async def behind_a_relay(node: Node, s3_server: S3Server, folder: str, **settings: object):  # type: ignore[no-untyped-def]
    """The folder `data`, attached through a relay that can be told to fail."""
    async with (
        FaultProxy(s3_server.endpoint.url) as relay,
        node.manager(repair_pause=0.2, **settings) as (agent, manager),
    ):
        spec = await agent.attach(node.grant(node.request(folder, "data", endpoint=relay.url)))
        yield relay, agent, manager, spec


@pytest.mark.expects_log("could not be repaired yet")
@pytest.mark.expects_log("retry_scheduled")
@pytest.mark.expects_log("'/v1/attachments'")
async def test_a_mount_that_dies_while_s3_is_away_returns_with_it(node: Node, folder: str, s3_server: S3Server) -> None:
    async with behind_a_relay(node, s3_server, folder, repair_attempts=1, mount_deadline=2) as (
        relay,
        agent,
        manager,
        spec,
    ):
        relay.add(Fault(status=503, code="ServiceUnavailable", times=ALWAYS))
        os.kill(mount_pid(node), signal.SIGKILL)
        await until(lambda: _told(manager, MountState.DEAD, "not available"), "it says why", 30)
        request = node.request(folder, "data", endpoint=relay.url)
        with pytest.raises(S3Unavailable):
            await agent.attach(node.grant(request))
        relay.clear()
        await repaired_since(manager, 0)
        text = await asyncio.to_thread((Path(spec.source) / "hello.txt").read_text)  # the relay is in this loop
        assert text == "hello from data/"


def _told(manager: Attachments, state: MountState, text: str) -> bool:
    return any(record.state is state and text in (record.last_error or "") for record, _ in manager.mounts())


@pytest.mark.expects_log("could not be repaired yet")
@pytest.mark.expects_log("retry_scheduled")
@pytest.mark.expects_log("is not repaired any more")
@pytest.mark.expects_log("'/v1/attachments'")
async def test_a_mount_that_cannot_be_repaired_is_failed_with_the_reason(
    node: Node, s3: S3Client, s3_server: S3Server
) -> None:
    bucket = "t4-repair-gone"
    await s3.create_bucket(bucket)
    await s3.put(bucket, "data/hello.txt", b"there")
    async with node.manager(repair_attempts=2, repair_pause=0.1, mount_deadline=2) as (agent, manager):
        spec = await agent.attach(node.grant(node.request(bucket, "data")))
        await s3.delete_many(bucket, ["data/hello.txt"])
        await asyncio.to_thread(delete_bucket, s3_server, bucket)
        os.kill(mount_pid(node), signal.SIGKILL)
        await until(lambda: _told(manager, MountState.FAILED, "2 attempts"), "it is given up", 30)
        (mount,) = await agent.mounts()
        assert bucket in (mount.last_error or "")
        assert "mount" in " ".join((await agent.status()).warnings)
        with pytest.raises(BucketNotFound):
            await agent.attach(node.grant(node.request(bucket, "data")))
        with pytest.raises(BucketNotFound):
            await manager.repair(manager.mounts()[0][0].key)
        await s3.create_bucket(bucket)
        await s3.put(bucket, "data/hello.txt", b"back")
        await manager.repair(manager.mounts()[0][0].key)
        assert (Path(spec.source) / "hello.txt").read_text() == "back"
        assert not await manager.repair(manager.mounts()[0][0].key), "it lives"
        await agent.detach_session(spec.session_id)
        assert node.residue() == {}
        await s3.delete_many(bucket, ["data/hello.txt"])
        await asyncio.to_thread(delete_bucket, s3_server, bucket)


@pytest.mark.expects_log("could not be repaired yet")
@pytest.mark.expects_log("retry_scheduled")
async def test_a_session_that_ends_while_its_mount_is_dead_leaves_nothing(
    node: Node, folder: str, s3_server: S3Server
) -> None:
    async with behind_a_relay(node, s3_server, folder) as (relay, agent, manager, spec):
        relay.add(Fault(status=503, code="ServiceUnavailable", times=ALWAYS))
        os.kill(mount_pid(node), signal.SIGKILL)
        await until(lambda: _told(manager, MountState.DEAD, "not available"), "it says why", 30)
        assert await agent.detach_session(spec.session_id) == 1
        await until(lambda: node.residue() == {}, "nothing is left")
        assert await agent.mounts() == []


# --- hung, misplaced --------------------------------------------------------------------------------------------------


@pytest.mark.expects_log("giving up a mount")
async def test_a_hung_mount_is_cut_and_its_reader_freed(node: Node, folder: str) -> None:
    async with node.manager() as (agent, manager):
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        pid = mount_pid(node)
        os.kill(pid, signal.SIGSTOP)
        reader = await asyncio.create_subprocess_exec(
            "cat", f"{spec.source}/hello.txt", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        assert await manager.lost(manager.mounts()[0][0].key, "it hangs")
        async with asyncio.timeout(10):
            _, error = await reader.communicate()
        assert b"not connected" in error or b"abort" in error
        await repaired_since(manager, 0)
        assert (Path(spec.source) / "hello.txt").read_text() == "hello from data/"
        await until(lambda: pid not in node.processes(), "the hung process is gone")
        await agent.detach_session(spec.session_id)
        assert node.residue() == {}


@pytest.mark.expects_log("put a mount back into the pool")
async def test_a_pool_mount_that_was_taken_away_is_put_back(node: Node, folder: str) -> None:
    async with node.manager() as (agent, manager):
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        key, pid = manager.mounts()[0][0].key, mount_pid(node)
        with (Path(spec.source) / "hello.txt").open() as opened:
            unmount(node.runtime / "pool" / key)
            assert await manager.misplaced(key, "somebody unmounted it")
            assert mount_pid(node) == pid
            assert opened.read() == "hello from data/"
        second = await agent.attach(node.grant(node.request(folder, "data")))
        assert (Path(second.source) / "hello.txt").read_text() == "hello from data/"
        for each in (spec, second):
            await agent.detach_session(each.session_id)
        assert node.residue() == {}


async def test_a_session_bind_that_was_taken_away_is_made_again(node: Node, folder: str) -> None:
    async with node.manager() as (agent, manager):
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        unmount(Path(spec.source))
        ((item, _),) = manager.attachments()
        await manager.rebind(item)
        await manager.rebind(item)
        assert (Path(spec.source) / "hello.txt").read_text() == "hello from data/"
        assert len(entries_at(spec.source)) == 1


# --- renewal ----------------------------------------------------------------------------------------------------------


async def test_a_renewal_keeps_open_files_and_serves_new_opens(node: Node, folder: str) -> None:
    async with node.manager() as (agent, manager):
        renewed = listen(manager, EventKind.RENEWED)
        session, request = new_session(), node.request(folder, "data")
        spec = await agent.attach(node.grant(request, session))
        place, old = Path(spec.source) / "hello.txt", mount_pid(node)
        with place.open() as opened:
            await manager.renew(node.grant(request, session))
            assert len(renewed) == 1
            assert set(node.processes()) > {old}, "the old process serves what is open"
            assert opened.read() == "hello from data/"
        assert place.read_text() == "hello from data/"
        (new,) = set(node.processes()) - {old}
        assert manager.mounts()[0][0].process is not None
        assert manager.mounts()[0][0].process.pid == new
        assert len(node.credentials()) == 1
        os.kill(new, signal.SIGKILL)
        await repaired_since(manager, 0)
        assert place.read_text() == "hello from data/"
        await agent.detach_session(session)
        await until(lambda: node.residue() == {}, "nothing is left")


async def test_a_renewal_must_be_for_what_is_attached(node: Node, folder: str) -> None:
    async with node.manager() as (agent, manager):
        session, request = new_session(), node.request(folder, "data")
        await agent.attach(node.grant(request, session))
        with pytest.raises(NotFound):
            await manager.renew(node.grant(request))
        changed = request.model_copy(update={"mode": AccessMode.READ_ONLY})
        with pytest.raises(Conflict):
            await manager.renew(node.grant(changed, session))


# --- drain ------------------------------------------------------------------------------------------------------------


@pytest.mark.expects_log("'/v1/attachments'")
async def test_a_draining_node_refuses_new_attachments_and_serves_the_others(node: Node, folder: str) -> None:
    session, request = new_session(), node.request(folder, "data")
    spec: BindSpec
    async with node.manager(stop_mounts_on_exit=False, grace_period=0) as (agent, manager):
        spec = await agent.attach(node.grant(request, session))
        await manager.drain()
        await manager.drain()
        assert await agent.attach(node.grant(request, session)) == spec, "what is there is no new attachment"
        with pytest.raises(ServiceUnavailable, match="drain"):
            await agent.attach(node.grant(request))
        assert (Path(spec.source) / "hello.txt").read_text() == "hello from data/"
    async with node.manager(stop_mounts_on_exit=False, grace_period=0) as (agent, manager):
        assert manager.draining, "also after a restart"
        with pytest.raises(ServiceUnavailable, match="drain"):
            await agent.attach(node.grant(node.request(folder, "other")))
        await manager.resume()
        other = await agent.attach(node.grant(node.request(folder, "other")))
        key = next(record.key for record, items in manager.mounts() if items[0].session == session)
        await manager.drain([key])
        with pytest.raises(ServiceUnavailable, match="This mount is being drained"):
            await agent.attach(node.grant(request))
        await agent.attach(node.grant(node.request(folder, "other"), other.session_id))
        with pytest.raises(NotFound):
            await manager.drain(["0" * 32])  # type: ignore[list-item]
        for each in (session, other.session_id):
            await agent.detach_session(each)
        await until_async(lambda: _empty(node), "nothing is left")


async def _empty(node: Node) -> bool:
    return node.residue() == {}
