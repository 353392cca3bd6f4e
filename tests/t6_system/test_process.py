"""Child processes: readiness, last words, restarts, stopping, and what a killed parent leaves."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from storage_proxy.core.errors import ConfigError, DeadlineExceeded, MooringError, PortTaken, ServiceUnavailable
from storage_proxy.embedded.process import (
    ManagedProcess,
    ProcessRegistry,
    ProcessSpec,
    RestartPolicy,
    error_from_child,
    finish,
    start_time,
)


async def until(condition: Callable[[], object], deadline: float = 10.0) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        await asyncio.sleep(0.01)


def spec(tmp_path: Path, script: str, **changes: object) -> ProcessSpec:
    """A child that is ready when it has made the file `ready`."""

    async def ready() -> None:
        if not (tmp_path / "ready").exists():
            raise ServiceUnavailable("not yet")

    values: dict[str, object] = {
        "name": "child",
        "argv": ["/bin/sh", "-c", script],
        "log_file": tmp_path / "child.log",
        "ready": ready,
        "start_deadline": 5.0,
        "stop_deadline": 1.0,
        "cwd": tmp_path,
    } | changes
    return ProcessSpec(**values)  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_start_waits_until_it_is_ready_and_stop_ends_it(tmp_path: Path) -> None:
    registry = ProcessRegistry(tmp_path / "processes.json")
    child = ManagedProcess(spec(tmp_path, "touch ready; exec sleep 60"), registry)
    await child.start()
    pid = child.pid
    assert pid is not None
    assert registry.recorded() == {"child": pid}
    assert os.getsid(pid) == pid
    await child.stop()
    assert start_time(pid) is None
    assert registry.recorded() == {}
    await child.stop()


@pytest.mark.asyncio
async def test_a_child_that_ends_early_is_explained_by_its_last_words(tmp_path: Path) -> None:
    child = ManagedProcess(spec(tmp_path, "echo 'error: the frobnicator is missing.' >&2; exit 3"), _registry(tmp_path))
    with pytest.raises(ConfigError, match="child: the frobnicator is missing"):
        await child.start()


@pytest.mark.asyncio
async def test_a_child_that_is_never_ready_is_stopped_at_the_deadline(tmp_path: Path) -> None:
    child = ManagedProcess(
        spec(tmp_path, "echo still thinking; exec sleep 60", start_deadline=0.5), _registry(tmp_path)
    )
    with pytest.raises(DeadlineExceeded, match=r"not ready within 0\.5 s.*still thinking"):
        await child.start()
    assert child.pid is None


@pytest.mark.asyncio
async def test_cancelling_a_start_leaves_no_process(tmp_path: Path) -> None:
    registry = _registry(tmp_path)
    child = ManagedProcess(spec(tmp_path, "exec sleep 60"), registry)
    task = asyncio.create_task(child.start())
    await until(registry.recorded)
    (pid,) = registry.recorded().values()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert start_time(pid) is None


@pytest.mark.expects_log("did not stop in time")
@pytest.mark.asyncio
async def test_one_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    child = ManagedProcess(
        spec(tmp_path, "trap '' TERM; touch ready; while :; do sleep 0.05; done", stop_deadline=0.3),
        _registry(tmp_path),
    )
    await child.start()
    pid = child.pid
    assert pid is not None
    await child.stop()
    assert start_time(pid) is None


@pytest.mark.expects_log("starting it again")
@pytest.mark.asyncio
async def test_a_dead_child_is_started_again(tmp_path: Path) -> None:
    child = ManagedProcess(
        spec(tmp_path, "touch ready; exec sleep 60", restart=RestartPolicy(first=0.01)), _registry(tmp_path)
    )
    await child.start()
    first = child.pid
    assert first is not None
    watch = asyncio.create_task(child.supervise())
    os.kill(first, signal.SIGKILL)
    await until(lambda: child.pid not in (None, first))
    await until(lambda: child.restarts == 1)
    await child.stop()
    await asyncio.wait_for(watch, 5)


@pytest.mark.expects_log("starting it again")
@pytest.mark.asyncio
async def test_one_that_keeps_dying_is_given_up_with_its_reason(tmp_path: Path) -> None:
    policy = RestartPolicy(first=0.01, longest=0.02, limit=3)
    child = ManagedProcess(
        spec(tmp_path, "touch ready; sleep 0.2; echo no luck; exit 1", restart=policy), _registry(tmp_path)
    )
    await child.start()
    with pytest.raises(ServiceUnavailable, match=r"ended 4 times.*no luck"):
        await asyncio.wait_for(child.supervise(), 20)


def _sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "60"], start_new_session=True)


def _registry(tmp_path: Path) -> ProcessRegistry:
    return ProcessRegistry(tmp_path / "processes.json")


@pytest.mark.parametrize(
    ("returncode", "tail", "kind", "words"),
    [
        (
            1,
            '{"error_code": "storage-proxy_setup_conflict", "msg": "Port 1 is taken.", "hint": "H."}',
            PortTaken,
            "Port 1",
        ),
        (3, "error: In x.toml: unknown key.", ConfigError, "unknown key"),
        (1, "E1 listen tcp 127.0.0.1:5: bind: address already in use", PortTaken, ":5"),
        (-9, "", ServiceUnavailable, "SIGKILL"),
        (70, "token=abcdef", ServiceUnavailable, "exit code 70"),
    ],
)
def test_the_end_of_a_child_becomes_an_error_of_the_tree(
    returncode: int, tail: str, kind: type[MooringError], words: str
) -> None:
    error = error_from_child("part", returncode, tail)
    assert type(error) is kind
    assert words in str(error)
    assert str(error).startswith("part")
    assert "abcdef" not in str(error)


@pytest.mark.asyncio
async def test_leftovers_of_a_killed_parent_are_found_by_pid_and_start_time(tmp_path: Path) -> None:
    registry = _registry(tmp_path)
    with _sleeper() as child:
        registry.add("sleeper", child.pid)
        reaper = asyncio.create_task(asyncio.to_thread(child.wait))
        assert await ProcessRegistry(tmp_path / "processes.json").kill_leftovers() == ["sleeper"]
        assert await reaper == -signal.SIGTERM
    assert not (tmp_path / "processes.json").exists()


@pytest.mark.asyncio
async def test_a_pid_that_somebody_else_has_now_is_not_touched(tmp_path: Path) -> None:
    registry = _registry(tmp_path)
    with _sleeper() as stranger:
        registry.add("sleeper", stranger.pid)
        path = tmp_path / "processes.json"
        path.write_text(path.read_text().replace(str(start_time(stranger.pid)), "12345"))
        assert await ProcessRegistry(path).kill_leftovers() == []
        assert stranger.poll() is None
        stranger.kill()


def test_children_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    code = f"""
import asyncio
from pathlib import Path
from storage_proxy.embedded.process import ManagedProcess, ProcessRegistry, ProcessSpec
async def ready(): pass
async def main():
    spec = ProcessSpec("child", ["sleep", "60"], Path({str(tmp_path / "log")!r}), ready)
    child = ManagedProcess(spec, ProcessRegistry(Path({str(tmp_path / "p.json")!r})))
    await child.start()
    print(child.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
        parent.wait(10)
    asyncio.run(until(lambda: start_time(pid) is None))


@pytest.mark.asyncio
async def test_finish_runs_to_the_end_and_then_tells_of_the_cancellation() -> None:
    done = asyncio.Event()
    entered = asyncio.Event()

    async def work() -> None:
        entered.set()
        await asyncio.sleep(0.05)
        done.set()

    task = asyncio.create_task(finish(work()))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done.is_set()
