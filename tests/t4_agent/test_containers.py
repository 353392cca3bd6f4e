"""Real containers (podman with runc) on session binds."""

from __future__ import annotations

import pytest

from storage_proxy.core.ids import AccessMode
from storage_proxy.s3 import S3Client

from .node import Node
from .podman import Podman

pytestmark = [pytest.mark.root, pytest.mark.containers, pytest.mark.asyncio]


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

    podman.allow_user_namespace(100000)
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
        name = await podman.start(spec)
        code, output = await podman("exec", name, "cat", "/data/hello.txt")
        assert output == "hello from data/"
        assert await agent.detach_session(spec.session_id) == 1
        assert node.residue() == {}
        code, _ = await podman("exec", name, "cat", "/data/hello.txt")
        assert code != 0
