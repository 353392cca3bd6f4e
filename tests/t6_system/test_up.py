"""`mooring up`: the whole job, stopping at any moment, being killed, two stacks, a part that dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage_proxy.client.agent import AgentClient
from storage_proxy.client.manager import ManagerClient
from storage_proxy.core.errors import MooringError
from storage_proxy.core.wire import S3Credential
from storage_proxy.embedded.endpoints import Endpoints
from storage_proxy.embedded.process import start_time
from storage_proxy.embedded.residue import mounts_below
from storage_proxy.s3 import Endpoint, S3Client

from ..processes import command_lines
from .secret_watch import SecretWatch
from .stacks import SMALL, Up, until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
]


def check_result(result: dict[str, object]) -> None:
    assert result["ok"] is True
    assert result["sha256_mismatches"] == 0
    assert result["write_refused_on_read_only"] is True
    assert result["residue"] == []
    assert result["files_checked"] == 69
    assert result["written_files_verified"] == 4


def test_once_does_the_whole_job_and_leaves_nothing(tmp_path: Path) -> None:
    """And while it runs, no secret is in `ps`, an environment, a log, Redis or an answer of an API."""
    with Up(tmp_path / "s", "--once", "--json") as up:
        with SecretWatch(up.state) as watch:
            result = up.result()
        watch.look_at(up.out + up.err, "output")
        assert watch.found == set()
        assert all(watch.looks.values()), watch.looks
        assert {"s3-secret-key", "redis-password", "grant-key.pem", "endpoints.json"} <= set(watch.secrets.values())
        assert sum(name.startswith("mount credential") for name in watch.secrets.values()) >= 2
        check_result(result)
        assert int(result["bytes"]) > 200_000_000
        assert result["runtime"] in ("podman", "mount namespace")
        assert result["read_only_credential"] == "its own, limited to reading that bucket"
        up.assert_nothing_left()
        assert up.err == ""
        logs = {path.name for path in up.state.logs_dir.iterdir()}
        assert {"s3.log", "redis.log", "proxy.log", "manager.log", "agent.log", "up.log"} <= logs


def test_a_killed_stack_is_cleaned_by_the_next_start(tmp_path: Path) -> None:
    """kill -9 while the folders are mounted; then the same directory works again."""
    state = tmp_path / "s"
    with Up(state, "--once", env=SMALL) as killed:
        until(lambda: any(m.is_fuse for m in mounts_below(killed.state.runtime_dir)), 120, "a mount")
        pids = killed.pids()
        os.kill(killed.process.pid, signal.SIGKILL)
        killed.wait(10)
    # The kernel tells the children; the agent unmounts by itself.
    until(lambda: all(start_time(pid) is None for pid in pids.values()), 40, "the children end")
    assert not any(m.is_fuse for m in mounts_below(killed.state.runtime_dir))
    with Up(state, "--json", base=killed.base, env=SMALL) as again:
        events = until(lambda: len(again.events()) == 2 and again.events(), 120, "the job ends")
        check_result(events[1])
        assert asyncio.run(_names(again.ready())) == []  # the folders of the killed job are gone as well
        assert again.stop() == 0
        again.assert_nothing_left()


def test_everything_killed_at_once_is_cleaned_too(tmp_path: Path) -> None:
    """As after a crash of the machine's session: nobody had a chance to clean up, mounts are dead."""
    state = tmp_path / "s"
    with Up(state, "--once", env=SMALL) as killed:
        until(lambda: any(m.is_fuse for m in mounts_below(killed.state.runtime_dir)), 120, "a mount")
        pids = killed.pids()
        os.kill(killed.process.pid, signal.SIGSTOP)
        for pid in [*pids.values(), killed.process.pid]:
            os.kill(pid, signal.SIGKILL)
        killed.wait(10)
    assert mounts_below(killed.state.runtime_dir)
    with Up(state, "--once", "--json", base=killed.base, env=SMALL) as again:
        check_result(again.result())
        again.assert_nothing_left()


async def _names(endpoints: Endpoints) -> list[str]:
    async with ManagerClient(endpoints.manager.url, endpoints.manager.token) as manager:
        return [folder.name async for folder in manager.folders()]


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("looking at this machine", signal.SIGINT),
        ("starting the S3 server", signal.SIGTERM),
        ("starting the storage proxy", signal.SIGINT),
        ("starting the agent", signal.SIGTERM),
        ("uploading", signal.SIGINT),
        ("running the session", signal.SIGTERM),
    ],
)
def test_a_signal_at_any_moment_leaves_nothing(tmp_path: Path, moment: str, number: signal.Signals) -> None:
    with Up(tmp_path / "s", "--once", env=SMALL) as up:
        up.says(moment)
        assert up.stop(number) == 128 + number
        up.assert_nothing_left()
        assert "Traceback" not in up.err


def test_ctrl_c_twice_does_not_break_the_stop(tmp_path: Path) -> None:
    with Up(tmp_path / "s", "--no-job") as up:
        up.ready()
        up.process.send_signal(signal.SIGINT)
        up.says("stopping")
        up.process.send_signal(signal.SIGINT)
        up.process.send_signal(signal.SIGTERM)
        assert up.wait(60) == 0
        up.assert_nothing_left()


def test_two_stacks_side_by_side(tmp_path: Path) -> None:
    with Up(tmp_path / "one", "--no-job") as one, Up(tmp_path / "two", "--no-job", "--json") as two:
        first, second = one.ready(), two.ready()
        assert first.proxy.client_url != second.proxy.client_url
        assert first.proxy.secret != second.proxy.secret
        assert asyncio.run(_mounts(first)) == asyncio.run(_mounts(second)) == 0
        with Up(tmp_path / "one", "--once") as third:
            assert third.wait(30) == 6
            assert f"already runs on {tmp_path / 'one'}" in third.err
        with Up(tmp_path / "three", "--once", base=one.base) as fourth:
            assert fourth.wait(30) == 9
            assert "--port-base" in fourth.err
        assert one.stop(signal.SIGINT) == 0
        one.assert_nothing_left()
        asyncio.run(_mounts(second))
        assert two.stop() == 0
        two.assert_nothing_left()
        assert [event["event"] for event in two.events()] == ["ready", "stopped"]


# Nobody else on this machine sleeps for just so long.
SLEEP = str(100_000 + os.getpid())


@pytest.mark.parametrize("moment", ["starting", "running"])
def test_a_session_ends_with_its_stack(tmp_path: Path, moment: str) -> None:
    mooring = [sys.executable, "-m", "storage_proxy"]
    env = {**os.environ, "MOORING_STATE": str(tmp_path / "s")}
    with Up(tmp_path / "s", "--no-job") as up:
        up.ready()
        subprocess.run([*mooring, "folder", "create", "notes"], env=env, check=True, timeout=60)
        argv = [*mooring, "session", "run", "--folder", "notes", "--", "sleep", SLEEP]
        with subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as session:
            until(lambda: any(m.is_fuse for m in mounts_below(up.state.runtime_dir)), 60, "a mount")
            if moment == "starting":  # the runtime's own command line names it before it runs
                until(lambda: f"sleep {SLEEP}" in _commands(), 30, "the command starts")
            else:
                until(lambda: f"sleep {SLEEP}" in _commands().splitlines(), 30, "the command runs")
            assert up.stop() == 0
            assert session.wait(30) != 0
        assert f"sleep {SLEEP}" not in _commands()
        up.assert_nothing_left()


def _commands() -> str:
    """Command lines of everything that runs, but the session's own client."""
    return "\n".join(line for line in command_lines() if "session run" not in line)


async def _mounts(endpoints: Endpoints) -> int:
    async with AgentClient(endpoints.agent.socket) as agent:
        return len(await agent.mounts())


@pytest.mark.parametrize("part", ["proxy", "manager", "agent", "redis", "s3"])
def test_a_part_that_dies_is_started_again(running: Up, part: str) -> None:
    endpoints = running.ready()
    before = running.pids()
    os.kill(before[part], signal.SIGKILL)
    until(lambda: running.pids().get(part) not in (None, before[part]), 30, f"a new {part}")
    until(lambda: _works(endpoints), 60, "the stack works again")
    assert {name: pid for name, pid in running.pids().items() if name != part} == {
        name: pid for name, pid in before.items() if name != part
    }


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    with Up(tmp_path_factory.mktemp("running") / "s", "--no-job") as up:
        up.ready()
        yield up
        assert up.stop() == 0
        up.assert_nothing_left()


def _works(endpoints: Endpoints) -> bool:
    async def use() -> None:
        await _mounts(endpoints)
        async with ManagerClient(endpoints.manager.url, endpoints.manager.token, timeout=5) as manager:
            folder = await manager.create_folder("trial", "minio")
            await manager.delete_folder(folder.id)
        credential = S3Credential(access_key=endpoints.s3.access_key, secret_key=endpoints.s3.secret_key)
        async with S3Client(Endpoint(endpoints.s3.url, attempts=1, deadline=5), credential) as s3:
            await s3.put(endpoints.s3.bucket, "trial", b"x")

    try:
        asyncio.run(use())
    except MooringError:
        return False
    return True
