"""What others do to the agent's mounts, processes and files is noticed, repaired and told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent_plugin.attachments import Attachments
from agent_plugin.events import Event, EventKind
from agent_plugin.kernel import MountFlag, entries_at, mount, top_at, unmount
from storage_proxy.client.agent import AgentClient
from storage_proxy.core.ids import MountKey
from storage_proxy.core.wire import BindSpec, MountState

from .node import Node, new_session, until
from .podman import Podman

pytestmark = [pytest.mark.root, pytest.mark.asyncio]

# Long enough that what is seen within it was not found by the regular comparison.
NEVER = 3600.0


class Told:
    """What the agent says it repaired."""

    def __init__(self, manager: Attachments) -> None:
        self.counts: dict[str, int] = {}
        manager.listen(self._note)

    def _note(self, event: Event) -> None:
        if event.kind is EventKind.RECONCILED:
            for what, count in event.detail.items():
                if isinstance(count, int):
                    self.counts[what] = self.counts.get(what, 0) + count

    async def of(self, what: str, seconds: float = 10.0) -> None:
        await until(lambda: what in self.counts, f"{what} is told, not only {self.counts}", seconds)


@asynccontextmanager
async def attached(node: Node, folder: str, **settings: object) -> AsyncIterator[tuple[AgentClient, BindSpec, Told]]:
    async with node.manager(**settings) as (agent, manager):
        told = Told(manager)
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        yield agent, spec, told
        await agent.detach_session(spec.session_id)
        assert node.residue() == {}


async def gone(node: Node, pid: int) -> None:
    await until(lambda: pid not in node.processes(), "it is gone")


def reads(spec: BindSpec) -> bool:
    try:
        return (Path(spec.source) / "hello.txt").read_text() == "hello from data/"
    except OSError:
        return False


# --- the mount table --------------------------------------------------------------------------------------------------


WATCH = """
import asyncio, sys
from pathlib import Path
from agent_plugin.kernel import mount, unmount
from agent_plugin.kernel.tablewatch import TableWatch

async def main(place):
    with TableWatch() as watch:
        for _ in range(3):
            waiting = asyncio.create_task(watch.changed())
            await asyncio.wait([waiting], timeout=0.1)
            assert not waiting.done(), "told of a change that was none"
            mount("t4-change", place, "tmpfs")
            await asyncio.wait_for(waiting, 5.0)
            unmount(place)
            await asyncio.wait_for(watch.changed(), 5.0)

asyncio.run(main(Path(sys.argv[1])))
"""


async def test_the_table_watch_tells_of_changes_only(tmp_path: Path) -> None:
    """In a mount namespace of its own: in ours, others mount at any moment."""
    process = await asyncio.create_subprocess_exec(
        *("unshare", "--mount", "--propagation", "private", sys.executable, "-c", WATCH, str(tmp_path)),
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        _, said = await process.communicate()
    assert process.returncode == 0, said.decode()


@pytest.mark.expects_log("put a mount back into the pool")
@pytest.mark.expects_log("stacked a session bind again")
@pytest.mark.parametrize("covered", [True, False], ids=["covered", "taken away"])
@pytest.mark.parametrize("place", ["pool", "bind"])
@pytest.mark.semantics(23)
async def test_pool_and_binds_are_put_back(node: Node, folder: str, place: str, covered: bool) -> None:
    async with attached(node, folder, reconcile_interval=NEVER) as (agent, spec, told):
        (record,) = await agent.mounts()
        target = node.runtime / "pool" / record.key if place == "pool" else Path(spec.source)
        top = top_at(target)
        assert top is not None
        begun = time.monotonic()
        if covered:
            mount("t4-foreign", target, "tmpfs")
        else:
            unmount(target)
        await told.of(place)
        assert time.monotonic() - begun < 2.0
        again = top_at(target)
        assert again is not None
        assert again.device == top.device
        assert reads(spec)
        (same,) = await agent.mounts()
        assert (same.pid, same.state) == (record.pid, MountState.LIVE)
        other = await agent.attach(node.grant(node.request(folder, "data")))
        assert reads(other), "the pool serves the next session as well"
        await agent.detach_session(other.session_id)


@pytest.mark.containers
@pytest.mark.expects_log("giving up a mount")
async def test_a_mount_that_only_a_container_holds(node: Node, folder: str, podman: Podman) -> None:
    """Everything here was unmounted, so there is nothing to copy from: another process takes over."""
    async with attached(node, folder, reconcile_interval=NEVER) as (agent, spec, told):
        (record,) = await agent.mounts()
        name = await podman.start(options=(f"--mount=type=bind,source={spec.source},target=/data",))
        unmount(Path(spec.source))
        unmount(node.runtime / "pool" / record.key)
        await told.of("pool")
        await until(lambda: reads(spec), "it is repaired")
        (again,) = await agent.mounts()
        assert again.pid != record.pid
        await podman.remove(name)


async def test_a_busy_agent_is_not_disturbed(node: Node, folder: str) -> None:
    """Comparisons while sessions come and go find nothing: what is under way is not what differs."""
    async with node.manager(reconcile_interval=1.0) as (agent, manager):
        told = Told(manager)

        async def visit(prefix: str) -> None:
            end = time.monotonic() + 4.0
            while time.monotonic() < end:
                spec = await agent.attach(node.grant(node.request(folder, prefix)))
                await agent.detach_session(spec.session_id)

        await asyncio.gather(*map(visit, ("data", "other", "data")))
        assert told.counts == {}
        assert node.residue() == {}


# --- strays -----------------------------------------------------------------------------------------------------------


async def test_files_and_directories_of_nobody_are_removed(node: Node, folder: str) -> None:
    async with attached(node, folder, reconcile_interval=1.0) as (_, spec, told):
        token = "0123456789abcdef"
        state = node.place / "state" / "scratch" / token
        (state / "deep").mkdir(parents=True)
        (state / "deep" / "file").write_text("half an upload")
        planted = [state]
        for name in ("creds", "log"):
            planted.append(node.runtime / name / token)
            planted[-1].write_text("secret")
        for path in (f"stage/{token}", f"pool/{token}", f"ses/gone/{token}", "ses/empty"):
            planted.append(node.runtime / path)
            planted[-1].mkdir(parents=True)
        await until(lambda: not any(path.exists() for path in planted), "they are removed")
        assert not (node.runtime / "ses" / "gone").exists()
        await told.of("scratch")
        assert told.counts == {
            "credential": 1, "log": 1, "stage": 1, "pool": 1, "scratch": 1, "session": 2,
        }  # fmt: skip
        assert reads(spec)


async def test_mounts_of_nobody_are_removed(node: Node, folder: str) -> None:
    async with attached(node, folder, reconcile_interval=1.0) as (_, spec, told):
        places = [node.runtime / "pool" / "stranger", node.runtime / "ses" / "gone" / "folder"]
        for place in places:
            place.mkdir(parents=True)
            mount(spec.source, place, flags=MountFlag.BIND)
        await told.of("mount")
        await until(lambda: not any(place.exists() for place in places), "they are removed")
        assert reads(spec)


async def test_a_mount_process_of_nobody_is_ended(node: Node, folder: str) -> None:
    """Started by an agent that was killed before it could write the pid down, for example."""
    async with attached(node, folder, reconcile_interval=1.0) as (_, spec, told):
        staged = node.runtime / "stage" / "0123456789abcdef"
        staged.mkdir()
        keys = node.place / "keys"
        keys.touch(mode=0o600)
        keys.write_text(f"{node.credential.access_key}:{node.credential.secret_key.reveal()}")
        options = (f"passwd_file={keys}", f"url={node.endpoint}", "use_path_request_style")
        stray = await asyncio.create_subprocess_exec(
            *("s3fs", folder, str(staged), "-f", *(f"-o{option}" for option in options)),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            await until(lambda: bool(entries_at(staged)), "it has mounted")
            async with asyncio.timeout(20):
                await stray.wait()
            await until(lambda: not staged.exists(), "its traces are removed")
            assert {"process", "mount", "stage"} & told.counts.keys()
        finally:
            with contextlib.suppress(ProcessLookupError):
                stray.kill()
        assert len(node.processes()) == 1
        assert reads(spec)


# --- containers -------------------------------------------------------------------------------------------------------


@pytest.mark.containers
@pytest.mark.expects_log("mount process ended")
@pytest.mark.semantics(23)
async def test_careless_binds_are_repaired_with_the_mount(node: Node, folder: str, podman: Podman) -> None:
    """Without rslave, and of a directory below the folder, where propagation cannot reach at all."""
    async with node.agent() as agent:
        spec = await agent.attach(node.grant(node.request(folder, "")))
        private = f"--mount=type=bind,source={spec.source}/data,target=/data,ro,bind-propagation=rprivate"
        below = f"--mount=type=bind,source={spec.source}/other,target=/other,bind-propagation=rslave"
        name = await podman.start(options=(private, below))
        for _ in range(2):
            (pid,) = node.processes()
            os.kill(pid, signal.SIGKILL)
            script = "cat /data/hello.txt /other/hello.txt"
            read = (0, "hello from data/hello from other/")
            end = time.monotonic() + 15.0
            while await podman.execute(name, script) != read:
                assert time.monotonic() < end, "the container reads again"
            await gone(node, pid)
        code, output = await podman.execute(name, "touch /data/no")
        assert code != 0
        assert "Read-only" in output
        await podman.remove(name)
        await agent.detach_session(spec.session_id)
        assert node.residue() == {}


@pytest.mark.containers
@pytest.mark.expects_log("released a folder")
@pytest.mark.semantics(24)
async def test_a_folder_that_no_container_holds_any_more_is_released(node: Node, folder: str, podman: Podman) -> None:
    """A session that never detaches. One whose container has not started yet is not touched."""
    settings = {"reconcile_interval": 1.0, "release_unheld_after": 1.0}
    async with node.manager(**settings) as (agent, manager):
        told = Told(manager)
        held = await agent.attach(node.grant(node.request(folder, "data")))
        other = await agent.attach(node.grant(node.request(folder, "data"), new_session()))
        name = await podman.start(held)

        def seen() -> set[str]:
            return {item.session for item, _ in manager.attachments() if item.held is not None}

        await until(lambda: seen() == {held.session_id}, "it is seen which session the container is of")
        await podman.remove(name)
        await told.of("released")
        assert [item.session_id for item in await agent.attachments()] == [other.session_id]
        await agent.detach_session(other.session_id)
        assert node.residue() == {}


async def test_binds_of_others_count_as_holders(node: Node, folder: str) -> None:
    """A mount namespace that binds the folder elsewhere holds it; one that only has a copy of our tree does not."""
    async with node.manager(reconcile_interval=1.0) as (agent, manager):
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        place = node.place / "elsewhere"
        place.mkdir()

        async def seen(count: int) -> None:
            entry = manager.entry(MountKey(spec.mount_key))
            assert entry is not None
            await until(lambda: entry.holders == count, f"{count} holders are seen")

        for script, count in ((f"mount --bind {spec.source} {place}", 1), ("true", 0)):
            other = await asyncio.create_subprocess_exec(
                *("unshare", "--mount", "/bin/sh", "-ec", f"{script}; exec sleep 60"), start_new_session=True
            )
            try:
                await seen(count)
            finally:
                os.killpg(other.pid, signal.SIGKILL)
                await other.wait()
        await agent.detach_session(spec.session_id)
        assert node.residue() == {}
