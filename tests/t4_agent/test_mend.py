"""Containers that were bound without rslave are repaired from outside, while they run."""

from __future__ import annotations

import itertools
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_plugin.containers.mend import mend
from agent_plugin.kernel import (
    MountFlag,
    Propagation,
    entries_below,
    fusectl,
    mount,
    set_propagation,
    top_at,
    unmount,
)
from agent_plugin.kernel.namespaces import holders

from .node import Node, until
from .podman import Podman

pytestmark = [pytest.mark.root, pytest.mark.containers, pytest.mark.asyncio]


class Folders:
    """s3fs mounts of one bucket by hand, below a shared place like the agent's."""

    def __init__(self, node: Node, bucket: str) -> None:
        self._node = node
        self._bucket = bucket
        self._numbers = itertools.count(1)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.place = node.place / "byhand"
        self.place.mkdir()
        mount("t4-mend", self.place, "tmpfs", data="mode=0755")
        set_propagation(self.place, Propagation.SHARED)
        self.credential = node.place / "keys"
        self.credential.touch(mode=0o600)
        self.credential.write_text(f"{node.credential.access_key}:{node.credential.secret_key.reveal()}")

    async def mount(self, prefix: str = "/data", **options: str) -> Path:
        place = self.place / str(next(self._numbers))
        place.mkdir()
        given = {
            "url": self._node.endpoint,
            "passwd_file": str(self.credential),
            "uid": "1000",
            "gid": "1000",
            "use_path_request_style": "",
            "allow_other": "",
            **options,
        }
        words = [f"-o{name}={value}" if value else f"-o{name}" for name, value in given.items()]
        self._start(place, ["s3fs", f"{self._bucket}:{prefix}", str(place), "-f", *words])
        await until(lambda: (top := top_at(place)) is not None and top.is_fuse, "s3fs has mounted")
        return place

    def _start(self, place: Path, command: list[str]) -> None:
        quiet = subprocess.DEVNULL
        self._processes[str(place)] = subprocess.Popen(command, stdout=quiet, stderr=quiet)

    def crash(self, place: Path) -> str:
        """Kills the process of a mount; the device of it."""
        top = top_at(place)
        assert top is not None
        process = self._processes.pop(str(place))
        process.kill()
        process.wait()
        return top.device

    def stop(self, place: Path) -> None:
        self._processes[str(place)].send_signal(signal.SIGSTOP)

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()
        for entry in reversed(entries_below(self.place)):
            unmount(Path(entry.mount_point), lazy=True)


@pytest.fixture
def folders(node: Node, folder: str) -> Iterator[Folders]:
    made = Folders(node, folder)
    yield made
    made.close()


def bound(source: Path, target: str = "/data", *, options: str = "", propagation: str = "rprivate") -> str:
    """What somebody writes who does not know of rslave."""
    return f"--mount=type=bind,source={source},target={target},bind-propagation={propagation}{options}"


READ = "cat /data/hello.txt"
HELLO = (0, "hello from data/")


async def test_a_private_bind_is_repaired_while_the_container_runs(folders: Folders, podman: Podman) -> None:
    old = await folders.mount()
    name = await podman.start(options=(bound(old),))
    pid = await podman.pid(name)
    for _ in range(3):
        device = folders.crash(old)
        code, _ = await podman.execute(name, READ)
        assert code != 0, "dead"
        new = await folders.mount()
        (result,) = await mend({device}, new)
        assert (result.pid, result.target, result.error) == (pid, "/data", None)
        assert await podman.execute(name, READ) == HELLO
        assert await mend({device}, new) == [], "once is enough"
        old = new
    code, output = await podman.execute(name, "echo more > /data/more.txt && cat /data/more.txt")
    assert (code, output) == (0, "more\n")
    assert await podman.pid(name) == pid, "never restarted"


async def test_what_was_mended_follows_by_itself(folders: Folders, podman: Podman) -> None:
    """After its first repair a container hears of what is stacked on the mount that it was repaired with."""
    first = await folders.mount()
    name = await podman.start(options=(bound(first),))
    second = await folders.mount()
    await mend({folders.crash(first)}, second)
    device = folders.crash(second)
    third = await folders.mount()
    mount(str(third), second, flags=MountFlag.BIND)
    assert await podman.execute(name, READ) == HELLO
    assert await mend({device}, second) == [], "propagation was there first"


async def test_a_container_with_rslave_is_left_alone(folders: Folders, podman: Podman) -> None:
    old = await folders.mount()
    name = await podman.start(options=(bound(old, propagation="rslave"),))
    device = folders.crash(old)
    mount(str(await folders.mount()), old, flags=MountFlag.BIND)
    assert await podman.execute(name, READ) == HELLO
    assert await mend({device}, old) == []


async def test_read_only_and_a_directory_of_the_folder(folders: Folders, podman: Podman, node: Node) -> None:
    """Two binds of one dead mount in one container: each comes back as it was."""
    old = await folders.mount(prefix="")
    name = await podman.start(
        options=(
            bound(old / "data", options=",ro"),
            bound(old / "other", "/other", options=",noexec"),
            bound(old, "/tmp"),
        )
    )
    device = folders.crash(old)
    results = await mend({device}, await folders.mount(prefix=""))
    assert sorted(result.target for result in results if result.error is None) == ["/data", "/other", "/tmp"]
    assert await podman.execute(name, READ) == HELLO
    code, output = await podman.execute(name, "cat /other/hello.txt; touch /other/yes /tmp/yes; touch /data/no")
    assert code != 0
    assert output.startswith("hello from other/")
    assert "/data/no: Read-only" in output
    assert output.count("touch:") == 1
    new = {entry.mount_point: entry for holder in holders({device}) for entry in holder.stacks}
    assert "noexec" in new["/other"].options


async def test_a_container_with_a_user_namespace(folders: Folders, podman: Podman) -> None:
    podman.allow_user_namespace(100000)
    mapped = ("--uidmap=0:100000:65536", "--gidmap=0:100000:65536", "--user=1000:1000")
    old = await folders.mount(uid="101000", gid="101000")
    name = await podman.start(options=(*mapped, bound(old)))
    device = folders.crash(old)
    # podman's monitor of such a container is in a copy of our own namespace: no business of ours.
    assert len(holders({device})) == 2
    (result,) = await mend({device}, await folders.mount(uid="101000", gid="101000"))
    assert (result.pid, result.target) == (await podman.pid(name), "/data")
    assert result.error is None
    assert await podman.execute(name, READ) == HELLO
    assert await podman.execute(name, "touch /data/mine") == (0, "")


async def test_a_process_that_hangs(folders: Folders, podman: Podman) -> None:
    """Its connection is aborted, as the agent does; the one in the container is replaced like a dead one."""
    old = await folders.mount()
    name = await podman.start(options=(bound(old),))
    folders.stop(old)
    top = top_at(old)
    assert top is not None
    assert fusectl.abort(fusectl.ensure_mounted(folders.place / "fusectl"), top.connection)
    (result,) = await mend({top.device}, await folders.mount())
    assert result.error is None
    assert await podman.execute(name, READ) == HELLO


@pytest.mark.expects_log("the folder of a container is not repaired")
async def test_what_cannot_be_repaired_says_so(folders: Folders, podman: Podman) -> None:
    """The bound directory is not there any more; another container is repaired all the same."""
    old = await folders.mount(prefix="")
    lost = await podman.start(options=(bound(old / "other"),))
    well = await podman.start(options=(bound(old / "data"),))
    device = folders.crash(old)
    new = await folders.mount(prefix="")
    (new / "other" / "hello.txt").unlink()
    (new / "other").rmdir()
    results = {result.pid: result.error for result in await mend({device}, new)}
    assert results == {
        await podman.pid(lost): "the new mount could not be copied: No such file or directory",
        await podman.pid(well): None,
    }
    assert await podman.execute(well, READ) == HELLO


async def test_a_container_that_changed_its_paths(folders: Folders, podman: Podman) -> None:
    """Only the mount that was seen dead is covered: nothing that a container can do leads us elsewhere."""
    old = await folders.mount()
    script = "mkdir -p /tmp/a; mv /tmp/a /tmp/b; ln -s /etc /tmp/a; sleep 600"
    name = await podman.start(options=(bound(old, "/tmp/a/data"),), command=("/bin/sh", "-c", script))
    device = folders.crash(old)
    (result,) = await mend({device}, await folders.mount())
    assert (result.target, result.error) == ("/tmp/b/data", None)
    assert await podman.execute(name, "cat /tmp/b/data/hello.txt") == HELLO
