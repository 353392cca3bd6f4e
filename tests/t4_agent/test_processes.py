"""Processes are known by pid and start time; probes never wait for a mount."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from agent_plugin.credentials import read_credential, wipe_all, wipe_credential, write_credential
from agent_plugin.drivers import Launch
from agent_plugin.kernel import fusectl
from agent_plugin.kernel.abandon import off_loop
from agent_plugin.probe import Prober
from agent_plugin.supervisor import LOG_BYTES, MountProcess, ProcessID, last_words, trim_output
from storage_proxy.core.errors import DeadlineExceeded, DriverMissing, MountError
from storage_proxy.core.secrets import Secret

from .node import Node, until

pytestmark = pytest.mark.asyncio


def program(text: str) -> Launch:
    return Launch((sys.executable, "-I", "-S", "-c", text), {"PATH": os.defpath})


async def test_the_end_of_a_process_is_noticed_at_once(tmp_path: Path) -> None:
    process = MountProcess.start(program("import sys; print('bye'); sys.exit(3)"), tmp_path / "log")
    assert await process.wait(10.0)
    assert process.status == 3
    assert process.last_words() == "bye"
    assert not process.identity.runs


async def test_stop_goes_from_patience_to_kill(tmp_path: Path) -> None:
    text = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    process = MountProcess.start(program(text), tmp_path / "log")
    await until(lambda: process.last_words() == "up", "the program ignores SIGTERM")
    assert await process.stop(patience=0.05)
    assert process.status == -signal.SIGKILL


async def test_a_process_is_taken_over_and_another_one_is_not(tmp_path: Path) -> None:
    process = MountProcess.start(program("import time; time.sleep(60)"), tmp_path / "log")
    adopted = MountProcess.adopt(process.identity, tmp_path / "log")
    assert adopted is not None
    stranger = ProcessID(process.pid, process.identity.started + 1)
    assert MountProcess.adopt(stranger, tmp_path / "log") is None, "the pid was used again"
    assert MountProcess.adopt(ProcessID(2**22 - 1, 1), tmp_path / "log") is None
    adopted.send(signal.SIGKILL)
    assert await adopted.wait(10.0)
    assert await process.wait(10.0)
    assert adopted.status is None, "only a parent knows the exit status"


async def test_it_lives_in_a_session_of_its_own_without_our_descriptors(tmp_path: Path) -> None:
    held = (tmp_path / "open").open("w")
    process = MountProcess.start(program("import time; time.sleep(60)"), tmp_path / "log")
    assert os.getsid(process.pid) == process.pid
    names = {str(item.readlink()) for item in Path(f"/proc/{process.pid}/fd").iterdir()}
    assert str(tmp_path / "open") not in names
    held.close()
    assert await process.stop(patience=0.0)


async def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DriverMissing):
        MountProcess.start(Launch(("/nonexistent/s3fs",)), tmp_path / "log")


async def test_last_words_have_no_secrets(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("2026 [INF] options\nsigned with hunter2hunter2\nGET /?X-Amz-Signature=abcdef\n")
    words = last_words(log, Secret("hunter2hunter2"))
    assert "hunter2" not in words
    assert "abcdef" not in words
    assert words.startswith("signed with **********")
    assert last_words(tmp_path / "none") == ""


async def test_a_talkative_process_does_not_fill_the_memory(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("ab") as file:
        file.write(b"x" * (LOG_BYTES + 1))
        file.flush()
        trim_output(log)
        assert log.stat().st_size == 0
        file.write(b"goes on")
    assert log.read_bytes() == b"goes on"


async def test_a_call_that_does_not_return_is_given_up() -> None:
    begun = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="a long sleep"):
        await off_loop("a long sleep", 0.05, lambda: time.sleep(0.5))
    assert time.monotonic() - begun < 0.4
    assert await off_loop("a sum", 5.0, lambda: 1 + 1) == 2
    with pytest.raises(ZeroDivisionError):
        await off_loop("a fault", 5.0, lambda: 1 // 0)


async def test_probe_answers(tmp_path: Path) -> None:
    async with Prober() as prober:
        assert (await prober.stat(tmp_path, 5.0)).number == 0
        missing = await prober.stat(tmp_path / "none", 5.0)
        assert missing.number == errno.ENOENT
        assert (await prober.fresh_name(tmp_path, 5.0)).healthy
        answers = await asyncio.gather(*(prober.stat(tmp_path / str(number), 5.0) for number in range(50)))
        assert {answer.number for answer in answers} == {errno.ENOENT}
        odd = tmp_path / "a\nb c\udcff"
        odd.touch()
        assert (await prober.stat(odd, 5.0)).number == 0


async def test_the_prober_comes_back(tmp_path: Path) -> None:
    async with Prober() as prober:
        await prober.stat(tmp_path, 5.0)
        process = prober._process
        assert process is not None
        process.kill()
        await process.wait()
        assert (await prober.stat(tmp_path, 5.0)).number == 0


@pytest.mark.root
async def test_a_frozen_mount_costs_a_probe_only_its_deadline(node: Node, folder: str) -> None:
    """SIGSTOP of the mount process: the probe's child cannot even be killed, and nobody waits for it."""
    async with node.agent(watch_interval=60) as agent, Prober() as prober:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        (pid,) = node.processes()
        os.kill(pid, signal.SIGSTOP)
        begun = time.monotonic()
        answer = await prober.fresh_name(Path(spec.source), 0.3)
        assert answer.number is None
        assert not answer.healthy
        assert time.monotonic() - begun < 1.0
        connection = next(entry.connection for entry in node.mounts())
        assert fusectl.abort(node.runtime / "fusectl", connection)
        dead = await prober.fresh_name(Path(spec.source), 5.0)
        assert dead.number in (errno.ENOTCONN, errno.ECONNABORTED)
        assert await agent.detach_session(spec.session_id) == 1, "a stopped process is killed in the end"
        assert node.residue() == {}


async def test_credential_files(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_credential(path, Secret("text"))
    assert path.stat().st_mode & 0o777 == 0o600
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(MountError):
        read_credential(link)
    wipe_credential(link)
    assert path.read_text() == "text", "wiping a link leaves what it points to"
    link.symlink_to(path)
    write_credential(link, Secret("replaced"))
    assert not link.is_symlink()
    assert (path.read_text(), read_credential(link).reveal()) == ("text", "replaced")
    link.unlink()
    keep = path.open("rb")
    wipe_credential(path)
    wipe_credential(path)
    assert keep.read() == b"\0\0\0\0", "the bytes are gone, also for who had it open"
    keep.close()
    write_credential(path, Secret("again"))
    assert wipe_all(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []
