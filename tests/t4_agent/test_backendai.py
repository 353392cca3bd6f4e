"""An unmodified Backend.AI agent on this node: it binds, by path and with default propagation, what nobody mounted yet.

The kernel's automounter, s3fs, podman, a manager extension with its own database, and the agent as a process of its own
are all real; the storage proxy behind the manager extension is not asked for anything that a mount needs.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import pytest
import pytest_asyncio
import redis.asyncio as redis

from agent_plugin.config import AgentConfig
from agent_plugin.containers.backendai import AgentHook, GrantHook, PathHook
from agent_plugin.containers.backendai.kernels import parse_broadcast, parse_entry
from agent_plugin.containers.backendai.places import FolderPlace, valid_name
from agent_plugin.kernel import autofs, entries_below
from storage_proxy.client.agent import AgentClient
from storage_proxy.client.manager import Folder, MountAsked
from storage_proxy.core.errors import MountNotPermitted, VFolderNotFound
from storage_proxy.core.ids import VFolderID
from storage_proxy.s3 import S3Client
from tests.conftest import S3Server
from tests.fakes.fake_proxy import FakeProxy
from tests.redis_server import RedisServer, free_port, running_redis
from tests.t3_api.manager_stack import ADMIN, Stack
from tests.t3_api.manager_stack import running as manager_running

from .node import AGENT_ID, AgentProcess, Node, processes_with, until, until_async
from .podman import Podman, missing_programs, podman_in, podman_trouble

pytestmark = [pytest.mark.root, pytest.mark.asyncio]


class RootNode(Node):
    """A node whose agent serves the volume `minio` at `place/vfroot`."""

    control: Stack  # the manager extension

    @property
    def root(self) -> Path:
        return self.place / "vfroot"

    def config(self, **agent: Any) -> AgentConfig:
        section = agent.pop("backend_ai", {})
        data = (
            super()
            .config(**{"stop_mounts_on_exit": False, **agent})
            .model_dump(mode="json", by_alias=True, exclude_none=True)
        )
        token = self.place / "manager.token"
        token.touch(mode=0o600)
        token.write_text(self.control.token(AGENT_ID, "agent"))
        data["manager"] = {"url": self.control.url, "token-file": str(token)}
        data["grants"] = {"public-key-files": [str(self.place / "manager" / "state" / "grant.pub")]}
        data["backend-ai"] = {"root": {"minio": {"path": str(self.root)}}, **section}
        for root in data["backend-ai"]["root"].values():
            root["path"] = root["path"].replace("ROOT", str(self.root))
        return AgentConfig.model_validate(data)

    def path(self, folder: Folder) -> Path:
        return FolderPlace.of_vfid("minio", VFolderID.parse(folder.vfid)).below(self.root)

    def shown(self) -> list[str]:
        """Mounted folders below the root, without the automounter's own points."""
        return [entry.mount_point for entry in entries_below(self.root) if entry.is_fuse]

    def residue(self) -> dict[str, object]:
        found = super().residue()
        if self.shown():
            found["shown"] = self.shown()
        return found


@dataclass
class Stand:
    node: RootNode
    manager: Stack
    agent: AgentProcess
    proxy: FakeProxy
    data: Folder  # s3://BUCKET/data/, rw, uid 1000
    other: Folder  # s3://BUCKET/other/, read-only

    async def sessions(self) -> list[str]:
        """What the manager extension thinks this node has."""
        from sqlalchemy import select

        from manager_ext.models import SessionRow

        async with self.manager.db.session() as session:
            return list((await session.scalars(select(SessionRow.id))).all())


@pytest_asyncio.fixture
async def stand(s3_server: S3Server, folder: str, request: pytest.FixtureRequest) -> AsyncIterator[Stand]:
    if reason := autofs.available():
        pytest.skip(reason)
    node = RootNode(s3_server.endpoint.url, s3_server.admin)
    proxy = FakeProxy()
    keys = s3_server.admin
    proxy.known_keys[keys.access_key] = keys.secret_key.reveal()
    proxy.buckets.add(folder)
    place = node.place / "manager"
    place.mkdir()
    opened = {"node-wide": {"minio": {"agents": [AGENT_ID]}}}
    try:
        async with manager_running(place, proxy, f"sqlite:///{place}/manager.db", settings=opened) as manager:
            node.control = manager
            async with manager.client(ADMIN, "admin") as admin:
                bound = {
                    name: await admin.bind_folder(
                        name,
                        "minio",
                        folder,
                        prefix=f"{name}/",
                        read_only=name == "other",
                        access_key=keys.access_key,
                        secret_key=keys.secret_key,
                        endpoint=node.endpoint,
                    )
                    for name in ("data", "other")
                }
            agent = AgentProcess(node, **getattr(request, "param", {}))
            try:
                async with await agent.start():
                    yield Stand(node, manager, agent, proxy, bound["data"], bound["other"])
                assert "Traceback" not in agent.log.read_text()
            finally:
                await agent.close()
                await until(lambda: not processes_with(str(node.root)), "nothing watches over the root any more")
    finally:
        node.destroy()


async def look(*arguments: str | Path, seconds: float = 20.0) -> tuple[int, str]:
    """Runs a program; every look-up of it is one that the kernel asks the agent about."""
    process = await asyncio.create_subprocess_exec(
        *(str(argument) for argument in arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "LC_ALL": "C"},
    )
    async with asyncio.timeout(seconds):
        output, _ = await process.communicate()
    return process.returncode or 0, output.decode(errors="replace")


@pytest_asyncio.fixture
async def podman(stand: Stand) -> AsyncIterator[Podman]:
    if reason := missing_programs():
        pytest.skip(reason)
    place = stand.node.place / "podman"
    place.mkdir()
    async with podman_in(place) as made:
        if reason := await podman_trouble(made):
            pytest.skip(reason)
        yield made


def bind(path: Path, *, read_only: bool = False) -> tuple[str, ...]:
    """What Backend.AI's agent asks its runtime for: a plain bind, no propagation said."""
    return ("--volume", f"{path}:/data{':ro' if read_only else ''}")


async def gone(stand: Stand, seconds: float = 30.0) -> None:
    """Waits until nothing of any folder is left, here and at the manager extension."""

    async def clean() -> bool:
        return stand.node.residue() == {} and await stand.sessions() == []

    try:
        await until_async(clean, "everything is released", seconds)
    except AssertionError:
        raise AssertionError(f"left: {stand.node.residue()} {await stand.sessions()}") from None


# --- look-ups ---------------------------------------------------------------------------------------------------------


@pytest.mark.semantics(21)
@pytest.mark.parametrize("stand", [{"backend_ai": {"idle-time": 1}}], indirect=True)
async def test_a_folder_is_mounted_when_it_is_looked_up(stand: Stand, folder: str, s3: S3Client) -> None:
    node = stand.node
    assert node.shown() == []
    assert await stand.sessions() == []
    path = node.path(stand.data)
    answers = await asyncio.gather(*(look("cat", path / "hello.txt") for _ in range(20)))
    assert set(answers) == {(0, "hello from data/")}
    assert len(node.processes()) == 1, "however many look at once"
    assert len(await stand.sessions()) == 1
    assert node.shown() == [str(path)]
    code, output = await look("sh", "-c", f"echo new > {path}/new.txt")
    assert (code, output) == (0, "")
    assert await look("stat", "-c", "%u %g", path / "hello.txt") == (0, "1000 1000\n"), "as the operator configured"
    async with await s3.get(folder, "data/new.txt") as stream:
        assert await stream.read() == b"new\n"
    code, output = await look("touch", node.path(stand.other) / "no")
    assert code != 0
    assert "Read-only" in output
    assert len(node.processes()) == 2
    await gone(stand)  # nobody holds them, and nobody looked for the idle time
    assert await look("cat", path / "hello.txt") == (0, "hello from data/"), "and they come again"


async def test_what_is_not_there_ends_at_once(stand: Stand) -> None:
    node = stand.node
    known, unknown = VFolderID.parse(stand.data.vfid), uuid.uuid4().hex
    scope = known.scope.hex
    begun = time.monotonic()
    for path in (
        node.root / scope / unknown[:2] / unknown[2:4] / unknown[4:],
        node.root / uuid.uuid4().hex / Path(*FolderPlace.of_vfid("", known).names[1:]),  # of another scope
        node.root / "lost+found",
        node.root / scope.upper() / "aa",
        node.root / scope / "aaa",
        node.root / scope / "a%2f",
    ):
        code, output = await look("ls", path)
        assert code != 0
        assert "No such file" in output
    assert time.monotonic() - begun < 5
    code, output = await look("mkdir", node.root / "mine")
    assert code != 0, "nobody makes directories there"
    # Users of the host do not cause mounts, whatever they look for.
    node.place.chmod(0o755)
    path = node.path(stand.data)
    code, output = await look("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "ls", path)
    assert code != 0
    assert "Permission denied" in output
    assert node.shown() == []
    assert await stand.sessions() == []


@pytest.mark.parametrize(
    "stand", [{"backend_ai": {"root": {"minio": {"path": "ROOT", "volume": "local:shut"}}}}], indirect=True
)
async def test_a_volume_that_is_not_open_to_this_node_is_refused(stand: Stand) -> None:
    code, output = await look("ls", stand.node.path(stand.data))
    assert code != 0
    assert "Permission denied" in output
    assert await stand.sessions() == []


@pytest.mark.parametrize("stand", [{"backend_ai": {"lookup-deadline": 1}}], indirect=True)
async def test_a_manager_that_does_not_answer_is_not_waited_for(stand: Stand) -> None:
    never = asyncio.Event()
    stand.proxy.before["mount"] = never.wait
    begun = time.monotonic()
    code, output = await look("ls", stand.node.path(stand.data))
    assert code != 0
    assert "timed out" in output.lower()
    assert time.monotonic() - begun < 4
    stand.proxy.before.clear()
    never.set()
    await until_async(lambda: _works(stand), "it answers again")


async def _works(stand: Stand) -> bool:
    return await look("cat", stand.node.path(stand.data) / "hello.txt") == (0, "hello from data/")


# --- containers -------------------------------------------------------------------------------------------------------


@pytest.mark.containers
@pytest.mark.parametrize("stand", [{"backend_ai": {"idle-time": 1}}], indirect=True)
async def test_containers_bind_by_path_and_share_the_mount(
    stand: Stand, folder: str, podman: Podman, s3: S3Client
) -> None:
    path = stand.node.path(stand.data)
    first = await podman.start(options=bind(path))
    second = await podman.start(options=bind(path))
    third = await podman.start(options=bind(stand.node.path(stand.other), read_only=True))
    code, output = await podman.execute(first, "cat /data/hello.txt && echo result > /data/r.txt")
    assert (code, output) == (0, "hello from data/")
    assert await podman.execute(second, "cat /data/r.txt") == (0, "result\n")
    code, output = await podman.execute(third, "cat /data/hello.txt; echo x > /data/no")
    assert code != 0
    assert output.startswith("hello from other/")
    async with await s3.get(folder, "data/r.txt") as stream:
        assert await stream.read() == b"result\n"
    assert len(stand.node.processes()) == 2, "one for each folder"
    # Held by containers, so idle time passes without any effect, however often.
    await podman.remove(third)
    await until(lambda: len(stand.node.processes()) == 1, "what nobody holds is released", 20.0)
    assert await podman.execute(first, "cat /data/r.txt") == (0, "result\n")
    await podman.remove(first)
    assert await podman.execute(second, "cat /data/r.txt") == (0, "result\n")
    await podman.remove(second)
    await gone(stand)


@pytest.mark.containers
async def test_a_container_with_an_unknown_folder_fails_at_once(stand: Stand, podman: Podman) -> None:
    unknown = VFolderID.new(VFolderID.parse(stand.data.vfid).scope)
    begun = time.monotonic()
    code, output = await podman(
        *("run", "--rm", *bind(FolderPlace.of_vfid("minio", unknown).below(stand.node.root))),
        *("--rootfs", f"{podman.rootfs}:O", "/bin/sh", "-c", "true"),
    )
    assert code != 0
    assert "no such file" in output.lower()
    assert time.monotonic() - begun < 3


@pytest.mark.containers
async def test_a_container_recovers_from_the_death_of_its_mount(
    stand: Stand, folder: str, podman: Podman, s3: S3Client
) -> None:
    await s3.put(folder, "data/sub/", b"", content_type="application/x-directory")
    await s3.put(folder, "data/sub/inner.txt", b"inner")
    path = stand.node.path(stand.data)
    name = await podman.start(options=bind(path))
    below = await podman.start(options=bind(path / "sub"))  # what Backend.AI calls a vfsubpath
    for _ in range(2):
        (pid,) = stand.node.processes()
        os.kill(pid, signal.SIGKILL)

        async def inside() -> bool:
            return await podman.execute(name, "cat /data/hello.txt") == (0, "hello from data/")

        async def outside() -> bool:
            return await look("cat", path / "hello.txt") == (0, "hello from data/")

        async def below_it() -> bool:
            return await podman.execute(below, "cat /data/inner.txt") == (0, "inner")

        await until_async(inside, "the container reads again, though nothing propagates to it")
        await until_async(below_it, "and the one that has a directory of the folder")
        await until_async(outside, "and so does the path")
    late = await podman.start(options=bind(path))
    assert await podman.execute(late, "cat /data/hello.txt") == (0, "hello from data/")
    assert len(stand.node.processes()) == 1


# --- the agent away ---------------------------------------------------------------------------------------------------


@pytest.mark.containers
@pytest.mark.parametrize("stand", [{"backend_ai": {"idle-time": 2}}], indirect=True)
async def test_the_agent_may_be_killed_and_come_again(stand: Stand, podman: Podman) -> None:
    data, other = stand.node.path(stand.data), stand.node.path(stand.other)
    name = await podman.start(options=bind(data))
    (session,) = await stand.sessions()
    await stand.agent.kill()
    assert await podman.execute(name, "cat /data/hello.txt") == (0, "hello from data/")
    assert await look("cat", data / "hello.txt") == (0, "hello from data/"), "what is mounted stays"
    code, output = await look("ls", other, seconds=2)
    assert code != 0, "what is not mounted is not there, and nobody waits"
    assert "No such file" in output
    async with await stand.agent.start():
        assert await look("cat", other / "hello.txt") == (0, "hello from other/")
        assert await podman.execute(name, "cat /data/hello.txt") == (0, "hello from data/")
        assert session in await stand.sessions(), "the same grant, the same mount"
        assert len(stand.node.shown()) == 2
        await until(lambda: stand.node.shown() == [str(data)], "the other one is idle", 20.0)
        await podman.remove(name)
        await gone(stand)


@pytest.mark.parametrize("stand", [{"stop_mounts_on_exit": True}], indirect=True)
async def test_a_grant_whose_end_was_never_told_is_ended(stand: Stand) -> None:
    assert await _works(stand)
    await stand.agent.kill()
    assert len(await stand.sessions()) == 1
    async with await stand.agent.start():

        async def ended() -> bool:
            return await stand.sessions() == []

        await until_async(ended, "the new agent ends what it does not know", 40.0)


async def test_a_look_up_ends_when_the_agent_is_killed_meanwhile(stand: Stand) -> None:
    asked, never = asyncio.Event(), asyncio.Event()

    async def hang() -> None:
        asked.set()
        await never.wait()

    stand.proxy.before["mount"] = hang
    waiting = asyncio.create_task(look("ls", stand.node.path(stand.data)))
    async with asyncio.timeout(10):
        await asked.wait()
    await stand.agent.kill()
    begun = time.monotonic()
    code, output = await waiting
    assert code != 0
    assert "No such file" in output
    assert time.monotonic() - begun < 5, "nobody has to wait for the next agent"
    stand.proxy.before.clear()
    never.set()
    async with await stand.agent.start():
        assert await _works(stand)


async def test_a_second_agent_is_refused_the_same_root(stand: Stand) -> None:
    twin = RootNode(stand.node.endpoint, stand.node.credential)
    twin.control = stand.manager
    try:
        (twin.place / "manager").symlink_to(stand.node.place / "manager")
        rival = AgentProcess(twin, backend_ai={"root": {"minio": {"path": str(stand.node.root)}}})
        with pytest.raises(AssertionError, match="Another agent serves"):
            await rival.start()
        await rival.close()
        assert await _works(stand)
    finally:
        twin.destroy()


@pytest.mark.parametrize("stand", [{"stop_mounts_on_exit": True}], indirect=True)
async def test_an_agent_that_keeps_nothing_leaves_nothing(stand: Stand) -> None:
    assert await _works(stand)
    await stand.agent.kill()
    assert entries_below(stand.node.root)
    async with await stand.agent.start():
        assert stand.node.shown() == [], "what the killed one left is gone"
        assert await _works(stand)
    assert await stand.agent.terminate() == 0
    assert entries_below(stand.node.root) == []
    assert stand.node.residue() == {}


async def test_an_operator_may_detach_a_folder(stand: Stand) -> None:
    """What somebody else ends is not shown any more, and comes again when it is looked up."""
    assert await _works(stand)
    (session,) = await stand.sessions()
    async with AgentClient(stand.node.socket) as agent:
        assert await agent.detach_session(session) == 1
    await gone(stand)
    assert await _works(stand)
    assert await stand.sessions() != [session]


# --- hooks ------------------------------------------------------------------------------------------------------------


async def test_a_compute_agent_of_ones_own_asks_by_hooks(stand: Stand) -> None:
    vfid, kernel = VFolderID.parse(stand.data.vfid), uuid.uuid4().hex
    by_path: AgentHook = PathHook(stand.node.root)
    path = await by_path.acquire(vfid, kernel)
    assert path == stand.node.path(stand.data)
    assert (path / "hello.txt").read_text() == "hello from data/"
    assert await by_path.acquire(vfid, kernel) == path
    await by_path.release(kernel)
    with pytest.raises(VFolderNotFound):
        await by_path.acquire(VFolderID.new(vfid.scope), kernel)
    async with AgentClient(stand.node.socket) as agent, stand.manager.client(ADMIN, "admin") as admin:

        async def grant(vfid: VFolderID, kernel_id: str) -> str:
            asked = MountAsked(folder=vfid.hex, target="/home/work/data")
            plan = await admin.create_session(AGENT_ID, [asked], session_id=kernel_id, uid=1000, gid=1000)
            return plan.mounts[0].grant

        by_grant: AgentHook = GrantHook(agent, grant)
        bound = await by_grant.acquire(vfid, kernel)
        assert bound != path
        assert (bound / "hello.txt").read_text() == "hello from data/"
        assert await by_grant.acquire(vfid, kernel) == bound, "repeating it is harmless"
        assert len(stand.node.processes()) == 1, "same folder, same owner, same keys: one mount"
        for _ in range(2):
            await by_grant.release(kernel)
        assert not bound.exists()
        assert (path / "hello.txt").read_text() == "hello from data/", "the other one holds it still"


# --- events of Backend.AI ---------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def events(tmp_path: Path) -> AsyncIterator[RedisServer]:
    async with running_redis(tmp_path) as server:
        yield server


KERNEL, SESSION = str(uuid.UUID(int=0xCE)), str(uuid.UUID(int=0x5E))


def entry(name: str, form: str) -> dict[Any, Any]:
    """An entry of the stream: as of August 2026 (json), and as before (msgpack)."""
    fields = {b"name": name.encode(), b"source": b"i-node"}
    if form == "json":
        named = {"kernel_id": KERNEL, "session_id": SESSION, "reason": "user-requested", "exit_code": 0}
        return {**fields, b"payload": json.dumps(named).encode()}
    return {**fields, b"args": msgpack.packb((KERNEL, SESSION, "user-requested", 0))}


def broadcast(name: str, form: str) -> bytes:
    fields = {"name": name, "source": "i-node"}
    if form == "json":
        return json.dumps({**fields, "payload": json.dumps({"kernel_id": KERNEL})}).encode()
    return json.dumps({**fields, "args": base64.b64encode(msgpack.packb((KERNEL, SESSION))).decode()}).encode()


@pytest.mark.containers
async def test_the_end_of_a_kernel_releases_its_folders(stand: Stand, podman: Podman, events: RedisServer) -> None:
    await stand.agent.terminate()
    agent = AgentProcess(stand.node, backend_ai={"events-url": events.url})
    data, other = stand.node.path(stand.data), stand.node.path(stand.other)
    try:
        async with await agent.start(), redis.Redis.from_url(events.url) as client:
            await client.xgroup_create("events", "manager", id="$", mkstream=True)
            await until_async(lambda: _listens(client), "the agent reads events")
            held = await podman.start(options=bind(other))
            # What is no event at all changes nothing.
            await client.xadd("events", {b"what": b"ever"})
            await client.xadd("events", {b"name": b"kernel_terminated", b"args": b"\xc1\xff"})
            await client.publish("events_all", b"\x00{")
            for send in (
                lambda: client.xadd("events", {**entry("kernel_terminated", "json")}),
                lambda: client.xadd("events", {**entry("kernel_terminated", "msgpack")}),
                lambda: client.publish("events_all", broadcast("kernel_terminated", "json")),
            ):
                name = await podman.start(options=bind(data))
                await client.publish("events_all", broadcast("kernel_started", "json"))
                await podman.remove(name)
                assert len(stand.node.shown()) == 2, "idle for ten minutes, were there no event"
                await send()
                await until(lambda: stand.node.shown() == [str(other)], "it is released", 20.0)
            assert await podman.execute(held, "cat /data/hello.txt") == (0, "hello from other/")
            # Backend.AI's own reader gets every entry, and ours has left no trace.
            answer: Any = await client.xreadgroup("manager", "m1", {"events": ">"}, count=10)
            assert len(answer[0][1]) == 4
            assert [group["name"] for group in await client.xinfo_groups("events")] == [b"manager"]
            await podman.remove(held)
            await client.publish("events_all", broadcast("kernel_cancelled", "msgpack"))
            await gone(stand)
    finally:
        await agent.close()


async def _listens(client: redis.Redis) -> bool:
    return dict(await client.pubsub_numsub("events_all")) == {b"events_all": 1}


async def test_mounting_works_without_the_redis_of_backend_ai(stand: Stand) -> None:
    await stand.agent.terminate()
    agent = AgentProcess(stand.node, backend_ai={"events-url": f"redis://127.0.0.1:{free_port()}/4"})
    try:
        async with await agent.start():
            assert await _works(stand)
            log = agent.log.read_text()
            await until(lambda: "events of Backend.AI cannot be read" in agent.log.read_text(), "it is said")
            assert log.count("Traceback") == 0
    finally:
        await agent.close()


@pytest.mark.parametrize("form", ["json", "msgpack"])
async def test_both_forms_of_events_are_read(form: str) -> None:
    for event in (parse_entry(entry("kernel_terminated", form)), parse_broadcast(broadcast("kernel_terminated", form))):
        assert event is not None
        assert (event.name, event.kernel_id) == ("kernel_terminated", KERNEL)
    assert parse_entry(entry("session_started", form)) is None


# --- names and packets ------------------------------------------------------------------------------------------------


async def test_only_names_of_the_layout_are_answered() -> None:
    assert valid_name(0, b"0" * 32) == "0" * 32
    assert [valid_name(level, b"ab") for level in range(4)] == [None, "ab", "ab", None]
    for name in (b"..", b".", b"", b"A" * 32, b"\xff" * 2, b"a/", "é".encode(), b"g0", b"ab\n"):
        assert all(valid_name(level, name) is None for level in range(4)), name


async def test_a_host_without_automounter_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "filesystems").write_text("nodev\tproc\n\text4\n")
    monkeypatch.setattr(autofs, "_FILESYSTEMS", tmp_path / "filesystems")
    with pytest.raises(MountNotPermitted, match="modprobe autofs4"):
        autofs.Autofs()


async def test_a_root_must_be_free(stand: Stand) -> None:
    other = stand.node.place / "full"
    other.mkdir()
    (other / "file").touch()
    await stand.agent.terminate()
    agent = AgentProcess(stand.node, backend_ai={"root": {"minio": {"path": str(other)}}})
    with pytest.raises(AssertionError, match="is not empty"):
        await agent.start()
    await agent.close()
