"""Real containers (podman with runc) on session binds."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from agent_plugin.kernel import clone_tree, entries_at, move_mount, set_mount
from agent_plugin.kernel.syscalls import Propagation
from storage_proxy.core.ids import AccessMode
from storage_proxy.core.wire import BindSpec
from storage_proxy.s3 import S3Client

from .node import Node, processes_with, until

pytestmark = [pytest.mark.root, pytest.mark.containers, pytest.mark.asyncio]

CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=1024:4096", "nproc=4096:4096"]
netns = "none"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


class Podman:
    """podman with storage of its own below `place`, and a root file system of one static busybox."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._conf = place / "containers.conf"
        self._conf.write_text(CONTAINERS_CONF)
        self.rootfs = place / "rootfs"
        for name in ("bin", "etc", "tmp", "data", "other", "proc", "dev", "sys", "run"):
            (self.rootfs / name).mkdir(parents=True)
        shutil.copy("/bin/busybox", self.rootfs / "bin" / "busybox")
        for name in ("sh", "cat", "ls", "id", "echo", "sha256sum", "stat", "sleep", "touch"):
            (self.rootfs / "bin" / name).symlink_to("busybox")
        (self.rootfs / "etc" / "passwd").write_text("root:x:0:0::/:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n")
        (self.rootfs / "etc" / "group").write_text("root:x:0:\nuser:x:1000:\n")

    async def __call__(self, *arguments: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *("podman", "--root", str(self._place / "root"), "--runroot", str(self._place / "runroot")),
            *arguments,
            env={**os.environ, "CONTAINERS_CONF": str(self._conf), "PODMAN_IGNORE_CGROUPSV1_WARNING": "1"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        async with asyncio.timeout(60):
            output, _ = await process.communicate()
        return process.returncode or 0, output.decode(errors="replace")

    async def run(self, script: str, *specs: BindSpec, user: str = "1000:1000", mount: str = "") -> tuple[int, str]:
        """Runs a shell script in a container with these folders."""
        mounts = [f"--mount={mount or spec.podman_mount()}" for spec in specs]
        return await self(
            "run", "--rm", "--user", user, *mounts, "--rootfs", f"{self.rootfs}:O", "/bin/sh", "-c", script
        )


@pytest_asyncio.fixture
async def podman(node: Node) -> AsyncIterator[Podman]:
    if shutil.which("podman") is None or not Path("/bin/busybox").exists():
        pytest.skip("podman or a static busybox is not installed")
    place = node.place / "podman"
    place.mkdir()
    made = Podman(place)
    code, output = await made.run("exit 7")
    if code != 7:
        pytest.skip(f"podman does not work on this host: {output.strip()[-300:]}")
    yield made
    await made("rm", "--all", "--force", "--time", "0")
    # The monitor of a container cleans up in a podman of its own, which would mount its storage once more.
    await until(lambda: not processes_with(str(place)), "podman has ended")


@pytest.mark.semantics(1)
async def test_a_container_reads_and_writes_as_its_user(node: Node, folder: str, podman: Podman, s3: S3Client) -> None:
    async with node.agent() as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        code, output = await podman.run("cat /data/hello.txt && echo result > '/data/a b+%é.txt' && ls -ln /data", spec)
        assert code == 0, output
        assert output.startswith("hello from data/")
        assert " 1000     1000 " in output
        code, output = await podman.run("touch /data/no", spec, user="1001:1001")
        assert code != 0, "another user is refused by the mode bits"
        assert "denied" in output
    async with await s3.get(folder, "data/a b+%é.txt") as stream:
        assert await stream.read() == b"result\n"


@pytest.mark.semantics(7)
async def test_a_read_only_folder_holds_against_everything(node: Node, folder: str, podman: Podman) -> None:
    async with node.agent() as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data", mode=AccessMode.READ_ONLY)))
        assert "readonly" in spec.podman_mount()
        code, output = await podman.run("cat /data/hello.txt; touch /data/no", spec)
        assert code != 0
        assert "Read-only" in output
        # A runtime that is not told turns a host-side read-only bind back to rw: the superblock must hold.
        careless = f"type=bind,source={spec.source},target=/data,bind-propagation=rslave"
        for user in ("1000:1000", "0:0"):
            code, output = await podman.run("touch /data/no", spec, user=user, mount=careless)
            assert code != 0
            assert "Read-only" in output


async def test_two_folders_in_one_container(node: Node, folder: str, podman: Podman) -> None:
    async with node.agent() as agent:
        one = await agent.attach(node.grant(node.request(folder, "data"), "session-1"))
        two = await agent.attach(
            node.grant(node.request(folder, "other", mode=AccessMode.READ_ONLY, target="/other"), "session-1")
        )
        code, output = await podman.run("cat /data/hello.txt /other/hello.txt > /data/both; cat /data/both", one, two)
        assert (code, output) == (0, "hello from data/hello from other/")
        assert await agent.detach_session("session-1") == 2
        assert node.residue() == {}


async def test_a_container_with_a_user_namespace(node: Node, folder: str, podman: Podman) -> None:
    from storage_proxy.core.wire import Ownership

    for place in (node.place, node.place / "podman"):
        place.chmod(0o711)  # its root file system and storage are looked up as the mapped root
    for path in (podman.rootfs, *podman.rootfs.rglob("*")):
        os.chown(path, 100000, 100000, follow_symlinks=False)
    async with node.agent() as agent:
        request = node.request(folder, "data", ownership=Ownership(uid=101000, gid=101000))
        spec = await agent.attach(node.grant(request))
        code, output = await podman(
            *("run", "--rm", "--uidmap=0:100000:65536", "--gidmap=0:100000:65536", "--user=1000:1000"),
            f"--mount={spec.podman_mount()}",
            *(
                "--rootfs",
                f"{podman.rootfs}:O",
                "/bin/sh",
                "-c",
                "cat /data/hello.txt && touch /data/mine && ls -ln /data",
            ),
        )
        assert code == 0, output
        assert " 1000     1000 " in output


async def test_a_folder_whose_session_ends_first(node: Node, folder: str, podman: Podman) -> None:
    """A container that outlives its session loses the folder; the agent does not wait for it and nothing stays."""
    async with node.agent() as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        name = f"t4-{secrets.token_hex(4)}"
        code, output = await podman(
            *("run", "--detach", "--name", name, f"--mount={spec.podman_mount()}"),
            *("--rootfs", f"{podman.rootfs}:O", "/bin/sleep", "60"),
        )
        assert code == 0, output
        code, output = await podman("exec", name, "cat", "/data/hello.txt")
        assert output == "hello from data/"
        assert await agent.detach_session(spec.session_id) == 1
        assert node.residue() == {}
        code, _ = await podman("exec", name, "cat", "/data/hello.txt")
        assert code != 0


@pytest.mark.expects_log("mount process ended")
async def test_the_layout_can_be_repaired_by_stacking(node: Node, folder: str, podman: Podman) -> None:
    """What the walls were built for: a new mount stacked on the dead session bind reaches the running container."""
    async with node.agent() as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        name = f"t4-{secrets.token_hex(4)}"
        code, output = await podman(
            *("run", "--detach", "--name", name, f"--mount={spec.podman_mount()}"),
            *("--rootfs", f"{podman.rootfs}:O", "/bin/sleep", "60"),
        )
        assert code == 0, output
        (pid,) = node.processes()
        os.kill(pid, 9)
        code, output = await podman("exec", name, "cat", "/data/hello.txt")
        assert code != 0, "dead"
        spare = await agent.attach(node.grant(node.request(folder, "data", credential_id="spare")))
        tree = clone_tree(Path(spare.source))
        set_mount(tree, propagation=Propagation.PRIVATE)
        set_mount(tree, propagation=Propagation.SHARED)
        move_mount(tree, Path(spec.source))
        os.close(tree)
        code, output = await podman("exec", name, "cat", "/data/hello.txt")
        assert (code, output) == (0, "hello from data/")
        assert len(entries_at(spec.source)) == 2
        await podman("rm", "--force", "--time", "0", name)
        for item in (spec, spare):
            await agent.detach_session(item.session_id)
        assert node.residue() == {}
