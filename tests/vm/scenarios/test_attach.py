"""The whole way of a session, on this kernel with this container runtime."""

from __future__ import annotations

import pytest

from storage_proxy.core.ids import AccessMode
from storage_proxy.s3 import S3Client

from .host import Host

pytestmark = pytest.mark.asyncio


async def test_a_container_reads_and_writes_a_bucket(host: Host, s3: S3Client) -> None:
    spec = await host.attach()
    code, output = await host.podman.run("cat /data/hello.txt && echo result >/data/result.txt", spec)
    assert (code, output) == (0, "hello from data/")
    async with await s3.get(host.folder, "data/result.txt") as stream:
        assert await stream.read() == b"result\n"
    await s3.delete(host.folder, "data/result.txt")
    assert await host.agent.detach_session(spec.session_id) == 1
    assert host.node.residue() == {}


async def test_read_only_holds_for_root_in_a_container(host: Host) -> None:
    spec = await host.attach(host.node.request(host.folder, "data", mode=AccessMode.READ_ONLY))
    careless = f"type=bind,source={spec.source},target=/data,bind-propagation=rslave"
    code, output = await host.podman.run("cat /data/hello.txt; touch /data/no", spec, user="0:0", mount=careless)
    assert code != 0
    assert "Read-only file system" in output


async def test_two_sessions_share_one_mount(host: Host) -> None:
    request = host.node.request(host.folder, "data")
    specs = [await host.attach(request) for _ in range(2)]
    assert len(host.node.processes()) == 1
    await host.agent.detach_session(specs[0].session_id)
    code, output = await host.podman.run("cat /data/hello.txt", specs[1])
    assert (code, output) == (0, "hello from data/")
