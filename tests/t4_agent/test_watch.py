"""Mount processes that hang are noticed and replaced; slow ones and a server that is away cost nobody their mount."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from agent_plugin import watch
from agent_plugin.attachments import Attachments
from agent_plugin.events import Event, EventKind
from agent_plugin.kernel.processes import ThreadStat, read_io, read_stat, read_threads
from agent_plugin.probe import Prober
from storage_proxy.client.agent import AgentClient
from storage_proxy.core.ids import AccessMode, BucketRef
from storage_proxy.core.wire import BindSpec, MountState
from storage_proxy.s3 import S3Client
from storage_proxy.s3.scoped import ScopedIssuer
from tests.conftest import S3Server, delete_bucket
from tests.fakes.fault_proxy import ALWAYS, Fault, FaultProxy

from .fuse_program import behave, write_program
from .node import Node, until, until_async

pytestmark = [pytest.mark.root, pytest.mark.asyncio]

NOT_SERVING = pytest.mark.expects_log("a mount process does not serve")
GIVEN_UP = pytest.mark.expects_log("giving up a mount")


class Events:
    """What the agent told since, by kind."""

    def __init__(self, manager: Attachments) -> None:
        self.all: list[Event] = []
        manager.listen(self.all.append)

    def of(self, kind: EventKind) -> list[Event]:
        return [event for event in self.all if event.kind is kind]

    def deaths(self) -> list[Event]:
        return [event for event in self.all if event.new is MountState.DEAD]


def mount_pid(node: Node) -> int:
    (pid,) = node.processes()
    return pid


async def ask(place: Path) -> asyncio.subprocess.Process:
    """Somebody who waits for a mount: a program that looks for a name the kernel does not know yet."""
    name = place / f"asked-{time.monotonic_ns()}"
    return await asyncio.create_subprocess_exec("stat", str(name), stderr=asyncio.subprocess.DEVNULL)


async def freed(caller: asyncio.subprocess.Process, seconds: float) -> None:
    async with asyncio.timeout(seconds):
        await caller.wait()


@asynccontextmanager
async def told_how(node: Node, folder: str, **settings: object) -> AsyncIterator[tuple[Attachments, Path]]:
    """An agent whose mount program does as it is told."""
    program = write_program(node.place)
    driver = {"s3fs": {"program": str(program)}}
    async with node.manager(driver=driver, watch_interval=0.2, hang_deadline=1.0, **settings) as (agent, manager):
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        yield manager, Path(spec.source)


# --- processes that hang ----------------------------------------------------------------------------------------------


@pytest.mark.semantics(15)
@NOT_SERVING
@GIVEN_UP
@pytest.mark.semantics(2)
async def test_a_stopped_process_is_replaced_under_a_reader(node: Node, folder: str) -> None:
    """With the settings that a node has if nobody changes them."""
    async with node.manager() as (agent, manager):
        events = Events(manager)
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        place, pid = Path(spec.source), mount_pid(node)
        stopped = time.time()
        os.kill(pid, signal.SIGSTOP)
        caller = await ask(place)
        await freed(caller, 5.0)
        assert events.of(EventKind.UNRESPONSIVE)[0].at - stopped < 2.0
        await until(lambda: bool(events.of(EventKind.REPAIRED)), "it is repaired")
        assert (place / "hello.txt").read_text() == "hello from data/"
        (death,) = events.deaths()
        assert "stopped by a signal" in str(death.error)
        await until(lambda: node.processes() != [] and pid not in node.processes(), "the old process is gone")
        assert (await agent.status()).status == "ok"
        await agent.detach_session(spec.session_id)
        assert node.residue() == {}


@NOT_SERVING
async def test_one_that_is_continued_in_time_stays(node: Node, folder: str) -> None:
    async with node.manager(watch_interval=0.5) as (agent, manager):
        events = Events(manager)
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        pid = mount_pid(node)
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: bool(events.of(EventKind.UNRESPONSIVE)), "it is noticed")
        os.kill(pid, signal.SIGCONT)
        status = await agent.status()
        assert any("was stopped by a signal" in text for text in status.warnings)
        await until(lambda: bool(events.of(EventKind.ANSWERS)), "it answers again")
        assert (await agent.status()).warnings == []
        assert mount_pid(node) == pid
        assert (Path(spec.source) / "hello.txt").exists()
        assert not events.deaths()


@NOT_SERVING
@GIVEN_UP
async def test_a_process_that_sleeps_for_ever_is_replaced(node: Node, folder: str) -> None:
    """Not stopped, so only its silence tells."""
    async with told_how(node, folder) as (manager, place):
        events, pid = Events(manager), mount_pid(node)
        behave(node.place, "hang")
        caller = await ask(place)
        await until(lambda: bool(events.of(EventKind.UNRESPONSIVE)), "its silence is noticed", 5.0)
        behave(node.place, "answer")  # for the next one: this one does not wake up any more
        await freed(caller, 15.0)
        await until(lambda: bool(events.of(EventKind.REPAIRED)), "it is repaired")
        assert "did not answer" in str(events.deaths()[0].error)
        assert mount_pid(node) != pid
        await freed(await ask(place), 5.0)


@NOT_SERVING
@GIVEN_UP
async def test_one_that_hangs_while_nobody_uses_it_is_found_in_the_rotation(
    node: Node, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_ROTATION_SECONDS", 1.0)
    async with told_how(node, folder) as (manager, _):
        events = Events(manager)
        behave(node.place, "hang")
        await until(lambda: bool(events.of(EventKind.UNRESPONSIVE)), "its silence is noticed", 10.0)
        behave(node.place, "answer")
        await until(lambda: bool(events.of(EventKind.REPAIRED)), "it is repaired", 15.0)


@NOT_SERVING
@GIVEN_UP
async def test_one_of_many_costs_the_others_nothing(node: Node, folder: str) -> None:
    async with node.manager(watch_interval=0.2) as (agent, manager):
        specs = [
            await agent.attach(node.grant(node.request(folder, "data", credential_id=f"c{number}")))
            for number in range(6)
        ]
        events = Events(manager)
        pids = {record.key: record.process.pid for record, _ in manager.mounts() if record.process}
        victim = specs[3]
        os.kill(pids[victim.mount_key], signal.SIGSTOP)
        callers = [await ask(Path(spec.source)) for spec in specs]
        for caller in callers:
            await freed(caller, 10.0)
        await until(lambda: bool(events.of(EventKind.REPAIRED)), "the one is repaired")
        assert {event.key for event in events.all} == {victim.mount_key}
        after = {record.key: record.process.pid for record, _ in manager.mounts() if record.process}
        assert {key for key in pids if pids[key] != after[key]} == {victim.mount_key}


# --- processes that do not --------------------------------------------------------------------------------------------


@NOT_SERVING
async def test_a_late_answer_is_told_and_costs_nothing(node: Node, folder: str) -> None:
    async with told_how(node, folder) as (manager, place):
        events, pid = Events(manager), mount_pid(node)
        behave(node.place, "late 1.2")
        caller = await asyncio.create_subprocess_exec("stat", "-f", str(place), stdout=asyncio.subprocess.DEVNULL)
        await until(lambda: bool(events.of(EventKind.UNRESPONSIVE)), "it is told as late", 5.0)
        await freed(caller, 5.0)
        assert caller.returncode == 0
        await until(lambda: bool(events.of(EventKind.ANSWERS)), "it answered", 5.0)
        assert mount_pid(node) == pid
        assert not events.deaths()


@NOT_SERVING
@pytest.mark.semantics(22)
async def test_a_process_at_work_is_not_given_up(node: Node, folder: str, caplog: pytest.LogCaptureFixture) -> None:
    """Far longer than the deadline: a wait for a server that has taken all its threads looks like that."""
    caplog.set_level(logging.INFO, "agent_plugin.watch")
    async with told_how(node, folder) as (manager, place):
        events, pid = Events(manager), mount_pid(node)
        behave(node.place, "work")
        caller = await ask(place)
        await until(lambda: caplog.text.count("is at work but does not answer") == 2, "it was judged twice", 20.0)
        behave(node.place, "answer")
        await freed(caller, 5.0)
        await until(lambda: bool(events.of(EventKind.ANSWERS)), "it answers", 5.0)
        assert mount_pid(node) == pid
        assert not events.deaths()


@NOT_SERVING
@GIVEN_UP
async def test_one_that_is_at_work_for_ever_is_given_up_when_s3_is_well(
    node: Node, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_PATIENCE", 3)
    async with told_how(node, folder) as (manager, place):
        events = Events(manager)
        behave(node.place, "work")
        caller = await ask(place)
        await until(lambda: bool(events.deaths()), "it is given up", 20.0)
        behave(node.place, "answer")
        await freed(caller, 5.0)
        await until(lambda: bool(events.of(EventKind.REPAIRED)), "it is repaired", 15.0)


async def test_a_machine_without_time_judges_nobody(node: Node, folder: str, caplog: pytest.LogCaptureFixture) -> None:
    """The helper that asks is stopped, so no answer comes from anywhere; the mount hangs too, for as long."""
    caplog.set_level(logging.INFO, "agent_plugin.watch")
    async with told_how(node, folder) as (manager, place):
        events, pid = Events(manager), mount_pid(node)
        (helper,) = [child for child in _children(os.getpid()) if b"_prober.py" in child[1]]
        behave(node.place, "work")
        os.kill(helper[0], signal.SIGSTOP)
        caller = await ask(place)
        await until(lambda: caplog.text.count("too busy to judge") == 3, "it was not judged for long", 20.0)
        behave(node.place, "answer")
        os.kill(helper[0], signal.SIGCONT)
        await freed(caller, 5.0)
        await freed(await ask(place), 5.0)
        assert mount_pid(node) == pid
        assert not events.deaths()
        assert not events.of(EventKind.UNRESPONSIVE)


def _children(parent: int) -> list[tuple[int, bytes]]:
    pids = [
        int(pid) for path in Path(f"/proc/{parent}/task").iterdir() for pid in (path / "children").read_text().split()
    ]
    return [(pid, Path(f"/proc/{pid}/cmdline").read_bytes()) for pid in pids]


@NOT_SERVING
@GIVEN_UP
async def test_a_helper_that_is_killed_costs_no_mount(node: Node, folder: str) -> None:
    """Its questions are lost, which says nothing; the next ones find the hung process."""
    async with told_how(node, folder) as (manager, place):
        events = Events(manager)
        behave(node.place, "hang")
        caller = await ask(place)
        await until(lambda: bool(events.of(EventKind.UNRESPONSIVE)), "its silence is noticed", 5.0)
        (helper,) = [child for child in _children(os.getpid()) if b"_prober.py" in child[1]]
        os.kill(helper[0], signal.SIGKILL)
        behave(node.place, "answer")
        await freed(caller, 20.0)
        await until(lambda: bool(events.of(EventKind.REPAIRED)), "it is repaired", 15.0)
        assert len(events.deaths()) == 1


async def test_lost_questions_fail_at_once(tmp_path: Path) -> None:
    async with Prober() as prober:
        assert [await each for each in await prober.filesystems([tmp_path, tmp_path / "none"])] == [0, errno.ENOENT]
        (helper,) = [child for child in _children(os.getpid()) if b"_prober.py" in child[1]]
        os.kill(helper[0], signal.SIGSTOP)
        (question,) = await prober.filesystems([tmp_path])
        os.kill(helper[0], signal.SIGKILL)
        with pytest.raises(ConnectionError):
            await question
        assert [await each for each in await prober.filesystems([tmp_path])] == [0]


async def test_what_work_is() -> None:
    """Three looks at the threads of a silent process."""

    def looks(*switches: int, state: str = "S") -> list[dict[int, ThreadStat]]:
        return [{7: ThreadStat(state, number), 8: ThreadStat("S", 5)} for number in switches]

    assert watch._worked(looks(1, 2, 3)), "timers of a client that waits for a server"
    assert watch._worked(looks(1, 1, 1, state="R")), "on a CPU, or waiting for one"
    assert watch._worked(looks(1, 1, 1, state="D")), "waiting for a disk"
    assert watch._worked(looks(1, 1, 1, state="t")), "held by a debugger"
    assert not watch._worked(looks(1, 1, 1)), "asleep"
    assert not watch._worked(looks(1, 2, 2)), "woke up once, took a request, and waits for a lock"
    assert not watch._worked([{7: ThreadStat("S", 1)}, {7: ThreadStat("S", 1), 9: ThreadStat("S", 9)}] * 2)


async def test_what_proc_says_of_a_process() -> None:
    """Against what the kernel tells by other means."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "import sys, threading, time; sys.stdin.read(1); time.sleep(60)"),
        stdin=asyncio.subprocess.PIPE,
    )
    try:
        stat = read_stat(child.pid)
        assert stat is not None
        assert not stat.stopped
        assert set(read_threads(child.pid)) == {child.pid}
        before = read_threads(child.pid)[child.pid].switches
        assert child.stdin is not None
        await until(lambda: read_threads(child.pid)[child.pid].state == "S", "it waits for input")
        child.stdin.write(b"x")
        await until(lambda: read_threads(child.pid)[child.pid].switches > before, "it woke up")
        child.send_signal(signal.SIGSTOP)

        def is_stopped() -> bool:
            stat = read_stat(child.pid)
            return stat is not None and stat.stopped

        await until(is_stopped, "the stop is seen")
        io = read_io(child.pid)
        assert io is not None
        assert io.read > 0
    finally:
        child.kill()
        await child.wait()
    assert read_stat(child.pid) is None
    assert read_threads(child.pid) == {}


# --- S3 ---------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def behind_a_relay(
    node: Node, s3_server: S3Server, folder: str
) -> AsyncIterator[tuple[FaultProxy, AgentClient, Attachments, BindSpec]]:
    driver = {"s3fs": {"retries": 1, "readwrite_timeout": 2, "connect_timeout": 2}}
    async with (
        FaultProxy(s3_server.endpoint.url) as relay,
        node.manager(
            driver=driver, mount_deadline=2.0, watch_interval=0.2, hang_deadline=1.0, s3_check_interval=1.0
        ) as (agent, manager),
    ):
        spec = await agent.attach(node.grant(node.request(folder, "data", endpoint=relay.url)))
        yield relay, agent, manager, spec


async def readable(place: Path) -> None:
    """By another program: this one has the relay in it, so it must not wait for the mount itself."""
    program = await asyncio.create_subprocess_exec("cat", str(place / "hello.txt"), stdout=asyncio.subprocess.PIPE)
    text, _ = await program.communicate()
    assert text == b"hello from data/"


async def troubled(agent: AgentClient, text: str, seconds: float = 30.0) -> None:
    async def told() -> bool:
        return any(text in warning for warning in (await agent.status()).warnings)

    await until_async(told, f"the status says {text!r}", seconds)


async def untroubled(agent: AgentClient, seconds: float = 30.0) -> None:
    async def well() -> bool:
        return (await agent.status()).warnings == []

    await until_async(well, "the trouble is over", seconds)


@pytest.mark.expects_log("stamina.retry_scheduled")
@pytest.mark.semantics(2)
@pytest.mark.semantics(22)
async def test_a_silent_server_costs_no_mount(node: Node, s3_server: S3Server, folder: str) -> None:
    """Callers wait for S3 for many times the hang deadline; the mount stays and works again by itself."""
    async with behind_a_relay(node, s3_server, folder) as (relay, agent, manager, spec):
        events, pid, place = Events(manager), mount_pid(node), Path(spec.source)
        fault = relay.add(Fault(hang=True, times=ALWAYS))
        callers = [await ask(place) for _ in range(12)]
        await troubled(agent, "did not answer")
        assert any(caller.returncode is None for caller in callers), "they still wait for S3"
        assert fault.hits > 0
        relay.clear()
        for caller in callers:
            await freed(caller, 120.0)
        await untroubled(agent)
        await readable(place)
        assert mount_pid(node) == pid
        assert {event.kind for event in events.all} == {EventKind.TROUBLE}


async def test_a_slow_server_costs_nothing(node: Node, s3_server: S3Server, folder: str) -> None:
    """Each answer takes longer than the hang deadline."""
    async with behind_a_relay(node, s3_server, folder) as (relay, _, manager, spec):
        events, pid = Events(manager), mount_pid(node)
        fault = relay.add(Fault(delay=1.5, times=ALWAYS))
        callers = [await ask(Path(spec.source)) for _ in range(3)]
        await until(lambda: fault.hits >= 6, "S3 was asked", 30.0)
        relay.clear()
        for caller in callers:
            await freed(caller, 30.0)
        assert mount_pid(node) == pid
        assert not events.of(EventKind.UNRESPONSIVE)
        assert not events.deaths()


@pytest.mark.expects_log("stamina.retry_scheduled")
async def test_a_server_that_was_away_is_found_again(node: Node, s3_server: S3Server, folder: str) -> None:
    async with behind_a_relay(node, s3_server, folder) as (relay, agent, manager, spec):
        events, pid = Events(manager), mount_pid(node)
        relay.add(Fault(reset=True, times=ALWAYS))
        await troubled(agent, "data/")
        relay.clear()
        await untroubled(agent)
        await readable(Path(spec.source))
        assert [event.error is None for event in events.of(EventKind.TROUBLE)] == [False, True]
        assert mount_pid(node) == pid


@pytest.mark.semantics(18)
@GIVEN_UP
@pytest.mark.parametrize("turn", [0, 1], ids=["asked of S3", "seen through the mount"])
async def test_a_revoked_key_is_named(
    node: Node, folder: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    """What becomes of such a mount then is tested with the renewals."""
    monkeypatch.setattr(watch, "_S3_TURNS", 1 if turn == 0 else 1_000_000)
    async with ScopedIssuer(s3_server.endpoint, s3_server.admin) as issuer:
        made = await issuer.issue(BucketRef(folder, "data/"), AccessMode.READ_WRITE, timedelta(hours=1), "t4")
        async with node.manager(s3_check_interval=1.0) as (agent, manager):
            events = Events(manager)
            await agent.attach(
                node.grant(node.request(folder, "data", credential=made.credential, credential_id="scoped"))
            )
            assert made.revoke_ref is not None
            await issuer.revoke(made.revoke_ref)
            await until(lambda: bool(events.of(EventKind.TROUBLE)), "it is told", 15.0)
            told = events.of(EventKind.TROUBLE)[0]
            assert "does not accept this credential" in str(told.error)
            assert made.credential.secret_key.reveal() not in str(told)


async def test_a_deleted_bucket_is_named_and_found_again(node: Node, s3: S3Client, s3_server: S3Server) -> None:
    name = "t4-watched"
    await s3.create_bucket(name)
    try:
        async with node.manager(s3_check_interval=1.0) as (agent, _):
            await agent.attach(node.grant(node.request(name)))
            pid = mount_pid(node)
            delete_bucket(s3_server, name)
            await troubled(agent, "does not exist")
            await s3.create_bucket(name)
            await untroubled(agent)
            assert mount_pid(node) == pid
    finally:
        delete_bucket(s3_server, name)
