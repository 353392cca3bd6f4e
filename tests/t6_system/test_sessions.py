"""Commands in sessions: in a container and in a mount namespace, with the same promises; and finding residue."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from storage_proxy.core.errors import DeadlineExceeded
from storage_proxy.core.wire import BindSpec
from storage_proxy.embedded.residue import clean, find, mounts_below, processes_naming
from storage_proxy.embedded.sessions import (
    Runtime,
    RuntimeChoice,
    SessionCommand,
    SessionRunner,
    find_busybox,
    is_static,
)
from storage_proxy.embedded.state import StateDirectory

from ..processes import command_lines
from .stacks import until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="sessions are made by root"),
]

VFID = "user:11111111-1111-1111-1111-111111111111/" + "2" * 32


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateDirectory]:
    state = StateDirectory.open(tmp_path / "state")
    state.make_runtime_dir()
    yield state
    state.clear_temporary()
    assert not state.runtime_dir.exists()


@pytest_asyncio.fixture(params=[Runtime.PODMAN, Runtime.NAMESPACE])
async def runner(request: pytest.FixtureRequest, state: StateDirectory) -> AsyncIterator[SessionRunner]:
    """Both ways; the real choice must be podman for podman to be tested."""
    runner = SessionRunner(state)
    choice = await runner.choose()
    if request.param is Runtime.PODMAN and choice.runtime is not Runtime.PODMAN:
        pytest.skip(f"no container can be run here: {choice.reason}")
    if request.param is Runtime.NAMESPACE:
        runner._choice = RuntimeChoice(Runtime.NAMESPACE, "asked for")
    yield runner
    assert find(state) == []
    assert list((state.runtime_dir / "sessions").iterdir()) == []


def bind(source: Path, target: str, *, read_only: bool = False) -> BindSpec:
    return BindSpec(session_id="s1", vfid=VFID, mount_key="k", source=str(source), target=target, read_only=read_only)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[BindSpec, BindSpec]:
    """One to write, one to read; the bind's parent directories are open so that uid 1000 gets through."""
    for name in ("with space", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
    (tmp_path / "data" / "file").write_text("there")
    return bind(tmp_path / "with space", "/home/work/out put"), bind(tmp_path / "data", "/data", read_only=True)


def command(script: str, *binds: BindSpec) -> SessionCommand:
    return SessionCommand(argv=["/bin/sh", "-c", script], binds=binds, uid=1000, gid=1000, deadline=30)


@pytest.mark.asyncio
async def test_a_command_runs_as_its_user_with_its_binds(
    runner: SessionRunner, folders: tuple[BindSpec, BindSpec]
) -> None:
    script = "id -u; id -g; cat /data/file; echo hello >'/home/work/out put/new'; echo oops >&2; exit 7"
    result = await runner.run(command(script, *folders))
    assert (result.exit_code, result.stdout, result.stderr) == (7, "1000\n1000\nthere", "oops\n")
    written = Path(folders[0].source) / "new"
    assert written.read_text() == "hello\n"
    assert written.stat().st_uid == 1000


@pytest.mark.asyncio
async def test_a_read_only_bind_and_the_root_refuse_writes_also_from_root(
    runner: SessionRunner, folders: tuple[BindSpec, BindSpec]
) -> None:
    script = "for f in /data/new /data/file /new /bin/new; do (echo x >$f) 2>/dev/null && echo $f; done; exit 0"
    for uid in (0, 1000):
        result = await runner.run(dataclasses.replace(command(script, *folders), uid=uid, gid=uid))
        assert (result.exit_code, result.stdout) == (0, "")
    assert (Path(folders[1].source) / "file").read_text() == "there"


@pytest.mark.asyncio
async def test_a_session_sees_nothing_of_the_machine_and_has_no_rights(runner: SessionRunner) -> None:
    script = "ls /; cat /proc/net/dev | grep -v lo: | tail -n +3; grep CapEff /proc/1/status; env"
    result = await runner.run(dataclasses.replace(command(script), uid=0, gid=0))
    assert "work" not in result.stdout.split("CapEff")[0].split()
    assert "CapEff:\t0000000000000000" in result.stdout
    assert "eth0" not in result.stdout
    assert "MOORING" not in result.stdout


@pytest.mark.asyncio
async def test_an_unknown_program_is_exit_code_127(runner: SessionRunner) -> None:
    result = await runner.run(SessionCommand(argv=["no-such-program"], binds=[], deadline=30))
    assert result.exit_code == 127


@pytest.mark.asyncio
async def test_a_command_that_is_too_slow_is_ended(runner: SessionRunner) -> None:
    begin = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="did not end within 1 s"):
        await runner.run(dataclasses.replace(command("sleep 4711"), deadline=1))
    assert time.monotonic() - begin < 10
    assert _sleepers() == []


@pytest.mark.asyncio
async def test_a_cancelled_command_is_ended(runner: SessionRunner, folders: tuple[BindSpec, BindSpec]) -> None:
    task = asyncio.create_task(runner.run(command("touch '/home/work/out put/begun'; sleep 4711", *folders)))
    begun = Path(folders[0].source) / "begun"
    end = time.monotonic() + 10
    while not begun.exists():  # a file made by another process
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert _sleepers() == []


def _sleepers() -> list[str]:
    return [line for line in command_lines() if "sleep 4711" in line]


@pytest.mark.asyncio
async def test_without_podman_a_mount_namespace_is_used_and_says_why(
    state: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *rest: None if name == "podman" else real(name, *rest))
    runner = SessionRunner(state)
    choice = await runner.choose()
    assert (choice.runtime, choice.reason) == (Runtime.NAMESPACE, "podman is not installed")
    assert (await runner.run(command("exit 3"))).exit_code == 3


def test_the_busybox_is_static_and_python_is_not() -> None:
    assert is_static(find_busybox())
    assert not is_static(Path(sys.executable).resolve())
    assert not is_static(Path(__file__))


# --- residue ----------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.expects_log("podman did not remove a container")
async def test_a_container_without_its_monitor_is_found_and_ended(
    runner: SessionRunner, state: StateDirectory, folders: tuple[BindSpec, BindSpec]
) -> None:
    task = asyncio.create_task(runner.run(command("touch '/home/work/out put/begun'; sleep 4711", *folders)))
    begun = Path(folders[0].source) / "begun"
    await asyncio.to_thread(until, begun.exists, 10, "the session runs")
    for pid, program in processes_naming(state.runtime_dir).items():
        if program == "conmon":
            os.kill(pid, signal.SIGKILL)
    assert any("(sleep)" in line for line in find(state))
    await clean(state)
    assert _sleepers() == []
    with contextlib.suppress(asyncio.CancelledError):
        task.cancel()
        await task
    await clean(state)


@pytest.mark.asyncio
async def test_mounts_and_processes_of_a_stack_are_found_and_cleaned(state: StateDirectory) -> None:
    place = state.agent_runtime_dir / "pool" / "with space"
    place.mkdir(parents=True)
    _mount("-t", "tmpfs", "test", str(place))
    _mount("--bind", str(place), str(place))
    (state.config_dir / "proxy.toml").write_text("")
    weed = state.run_dir / "weed"
    weed.symlink_to("/bin/sleep")
    process = await asyncio.create_subprocess_exec(str(weed), "60", cwd=state.data_dir)
    watcher = await asyncio.create_subprocess_exec("tail", "-f", str(state.config_dir / "proxy.toml"))
    try:
        found = find(state)
        assert sum("with space" in item for item in found) == 2
        assert f"process {process.pid} (weed)" in found
        assert f"credential file {state.config_dir / 'proxy.toml'}" in found
        assert len(found) == 4
        await clean(state)
        assert await process.wait() != 0
        assert watcher.returncode is None
        assert mounts_below(state.runtime_dir) == []
        state.clear_temporary()
        assert find(state) == []
    finally:
        watcher.kill()
        await watcher.wait()


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def test_a_longer_name_that_begins_alike_is_not_meant(tmp_path: Path) -> None:
    script = tmp_path / "weed"
    script.symlink_to("/bin/sleep")
    with subprocess.Popen([str(script), "60"], cwd=tmp_path) as process:
        try:
            until(lambda: process.pid in processes_naming(tmp_path), 5, "the process shows its command line")
            assert processes_naming(tmp_path.with_name(tmp_path.name[:-1])) == {}
        finally:
            process.kill()
