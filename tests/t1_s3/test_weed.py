"""The embedded S3 server: starts, fails with a reason, survives `kill -9`, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from storage_proxy.core.errors import ConfigError, DeadlineExceeded, PortTaken, ServiceUnavailable
from storage_proxy.embedded.weed import WeedConfig, WeedIdentity, WeedPorts, WeedServer
from storage_proxy.s3 import Endpoint, S3Client

from ..conftest import S3Server, make_credential


def config(place: Path, **changes: object) -> WeedConfig:
    values: dict[str, object] = {
        "dir": place / "weed",
        "ports": WeedPorts.pick_free(),
        "identities": [WeedIdentity("admin", make_credential())],
        "log_file": place / "weed.log",
    }
    return WeedConfig(**{**values, **changes})  # type: ignore[arg-type]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def listening_addresses(pid: int) -> set[str]:
    """The addresses of all TCP sockets (IPv4 and IPv6) on which a process listens."""
    links = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links.add(str(link.readlink()))
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in links:
                address = bytes.fromhex(local.partition(":")[0])[::-1]
                found.add(socket.inet_ntoa(address) if name == "tcp" else local)
    return found


@pytest.mark.asyncio
async def test_life_and_sudden_death(tmp_path: Path) -> None:
    settings = config(tmp_path)
    credential = settings.identities[0].credential
    server = WeedServer(settings)
    await server.start(30)
    try:
        pid = server.pid
        assert pid is not None
        async with S3Client(Endpoint(server.endpoint_url), credential) as client:
            assert await client.list_buckets() == ["mooring"]
            assert (await client.list_page("mooring")).objects == []
            for i in range(20):
                await client.put("mooring", f"key {i}", bytes([i]) * 5000)
        assert listening_addresses(pid) == {"127.0.0.1"}
        assert stat.S_IMODE((settings.dir / "s3.json").stat().st_mode) == 0o600
        secret = credential.secret_key.reveal()
        for name in ("cmdline", "environ"):
            seen = Path(f"/proc/{pid}/{name}").read_bytes()
            assert seen
            assert secret.encode() not in seen
            assert b"AWS_" not in seen
        os.kill(pid, signal.SIGKILL)
        assert await server.wait() == -signal.SIGKILL
    finally:
        await server.stop()
    again = WeedServer(settings)
    await again.start(30)
    try:
        async with S3Client(Endpoint(again.endpoint_url), credential) as client:
            for i in range(20):
                async with await client.get("mooring", f"key {i}") as stream:
                    assert await stream.read() == bytes([i]) * 5000
    finally:
        await again.stop()
        await again.stop()
    assert secret not in settings.log_file.read_text()
    for _, port in settings.ports.listeners():
        assert not list(Path("/tmp").glob(f"seaweedfs-*-{port}.sock"))


@pytest.mark.asyncio
async def test_a_taken_port(tmp_path: Path) -> None:
    ports = WeedPorts.pick_free()
    for taken in (ports.s3, ports.filer + 10_000):
        with socket.create_server(("127.0.0.1", taken)), pytest.raises(PortTaken, match=str(taken)):
            await WeedServer(config(tmp_path, ports=ports)).start(5)


@pytest.mark.asyncio
async def test_what_keeps_it_from_starting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not installed"):
        await WeedServer(config(tmp_path, program=tmp_path / "none")).start(5)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        await WeedServer(config(tmp_path, dir=tmp_path / "file" / "weed")).start(5)
    with pytest.raises(ConfigError, match="Log file"):
        await WeedServer(config(tmp_path, log_file=tmp_path / "no" / "weed.log")).start(5)
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\necho the reason is this; exit 3\n")
    script.chmod(0o755)
    with pytest.raises(ServiceUnavailable, match="the reason is this"):
        await WeedServer(config(tmp_path, program=script)).start(5)
    script.write_text("#!/bin/sh\necho waiting for nothing; exec sleep 100\n")
    server = WeedServer(config(tmp_path, program=script))
    with pytest.raises(DeadlineExceeded, match="waiting for nothing"):
        await server.start(1)
    assert server.pid is None


@pytest.mark.asyncio
async def test_a_cancelled_start(tmp_path: Path) -> None:
    server = WeedServer(config(tmp_path))
    task = asyncio.create_task(server.start(30))
    async with asyncio.timeout(10):
        while server.pid is None:  # noqa: ASYNC110 - nothing tells when a process is there
            await asyncio.sleep(0.01)
    pid = server.pid
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not is_running(pid)


@pytest.mark.asyncio
async def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    """A parent that is killed cannot stop its children; the kernel does."""
    program = """
import asyncio, sys
from pathlib import Path
from tests.t1_s3.test_weed import config
from storage_proxy.embedded.weed import WeedServer
async def main():
    server = WeedServer(config(Path(sys.argv[1])))
    await server.start(30)
    print(server.pid, flush=True)
    await asyncio.sleep(100)
asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(tmp_path), stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert parent.stdout is not None
    async with asyncio.timeout(40):
        child = int(await parent.stdout.readline())
    assert is_running(child)
    parent.kill()
    await parent.wait()
    async with asyncio.timeout(20):
        while is_running(child):  # noqa: ASYNC110 - it is not our child, nothing tells us
            await asyncio.sleep(0.05)


@pytest.mark.asyncio
async def test_identities_have_their_limits(s3_server: S3Server) -> None:
    async with S3Client(s3_server.endpoint, s3_server.limited) as client:
        assert await client.list_buckets() == [s3_server.limited_bucket]
