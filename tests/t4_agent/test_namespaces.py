"""Who holds a mount, asked of the kernel: mount namespaces made by `unshare`."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent_plugin.kernel import mount, top_at, unmount
from agent_plugin.kernel.namespaces import Holder, holders, start_time

pytestmark = pytest.mark.root


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    """A file system of its own at `tmp_path/fs`."""
    place = tmp_path / "fs"
    place.mkdir()
    mount("t4-holders", place, "tmpfs")
    (place / "sub").mkdir()
    top = top_at(place)
    assert top is not None
    yield top.device
    unmount(place, lazy=True)


@contextmanager
def unshared(script: str) -> Iterator[int]:
    """A shell in a mount namespace of its own that has run `script`; its pid."""
    process = subprocess.Popen(
        ["unshare", "--mount", "--", "/bin/sh", "-ec", f"{script}\necho ready; exec sleep 60"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def namespace(pid: int) -> int:
    return Path(f"/proc/{pid}/ns/mnt").stat().st_ino


def test_only_others_are_holders(tmp_path: Path, device: str) -> None:
    assert holders([device]) == []
    with unshared("true") as pid:
        (holder,) = holders([device])
        assert (holder.pid, holder.namespace) == (pid, namespace(pid))
        assert holder.started == start_time(pid)
        assert [entry.mount_point for entry in holder.entries] == [str(tmp_path / "fs")]
        assert holders(["0:999999"]) == []
        assert holders([]) == []
    assert holders([device]) == []


def test_a_namespace_is_named_by_its_oldest_process(device: str) -> None:
    with unshared("sleep 60 & sleep 60 &") as pid:
        assert [holder.pid for holder in holders([device])] == [pid]


def test_a_namespace_outlives_its_first_process(device: str) -> None:
    with unshared("true") as first:
        entered = subprocess.Popen(["nsenter", "--mount", "--target", str(first), "sleep", "60"])
        try:
            while namespace(entered.pid) != namespace(first):
                pass
            os.kill(first, signal.SIGKILL)
            while start_time(first) is not None:  # it stays as a zombie, which has no namespace
                pass
            assert [holder.pid for holder in holders([device])] == [entered.pid]
        finally:
            entered.kill()
            entered.wait()


def test_what_is_seen_and_what_is_covered(tmp_path: Path, device: str) -> None:
    strange = tmp_path / "a b\\c#é"
    script = (
        f"mkdir '{strange}' {tmp_path}/covered\n"
        f"mount --bind {tmp_path}/fs/sub '{strange}'\n"
        f"mount --bind {tmp_path}/fs {tmp_path}/covered; mount -t tmpfs t4-cover {tmp_path}/covered"
    )
    with unshared(script):
        (holder,) = holders([device])
        points = {entry.mount_point for entry in holder.entries}
        assert points == {str(tmp_path / "fs"), str(strange), str(tmp_path / "covered")}
        seen = {entry.mount_point: entry.root for entry in holder.seen()}
        assert seen == {str(tmp_path / "fs"): "/", str(strange): "/sub"}
        assert len(holder.stacks) == 4


def test_several_namespaces_and_devices(tmp_path: Path, device: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with (
        unshared(f"mount -t tmpfs t4-other {other}") as first,
        unshared(f"umount {tmp_path}/fs") as second,
        unshared("true") as third,
    ):
        found: list[Holder] = holders([device])
        assert {holder.pid for holder in found} == {first, third}
        assert second not in {holder.pid for holder in found}
