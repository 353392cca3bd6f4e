"""The life of attachments on real mounts."""

from __future__ import annotations

import asyncio
import errno
import time
from pathlib import Path

import pytest

from storage_proxy.core.errors import AlreadyExists, LimitExceeded, TokenInvalid
from storage_proxy.core.ids import AccessMode
from storage_proxy.core.wire import MountState, Ownership
from storage_proxy.s3 import S3Client
from tests.conftest import S3Server

from .node import Node, new_session, until, until_async

pytestmark = [pytest.mark.root, pytest.mark.asyncio]


@pytest.mark.semantics(1)
@pytest.mark.semantics(10)
@pytest.mark.semantics(12)
async def test_attach_shows_the_folder_and_detach_leaves_nothing(node: Node, folder: str, s3: S3Client) -> None:
    async with node.agent() as agent:
        session = new_session()
        spec = await agent.attach(node.grant(node.request(folder, "data"), session))
        source = Path(spec.source)
        assert (source / "hello.txt").read_text() == "hello from data/"
        (source / "result.txt").write_text("written through the mount")
        async with await s3.get(folder, "data/result.txt") as stream:
            assert await stream.read() == b"written through the mount"
        assert spec.propagation == "rslave"
        assert not spec.read_only
        info = source.stat()
        assert (info.st_uid, info.st_gid) == (1000, 1000)
        (mount,) = await agent.mounts()
        assert (mount.state, mount.bucket, mount.prefix, mount.sessions) == (
            MountState.LIVE,
            folder,
            "data/",
            [session],
        )
        assert await agent.detach_session(session) == 1
        assert await agent.detach_session(session) == 0
        assert await agent.mounts() == []
        assert node.residue() == {}
    assert not node.runtime.exists()


@pytest.mark.semantics(11)
async def test_sessions_share_one_mount(node: Node, folder: str) -> None:
    async with node.agent() as agent:
        sessions = [new_session(), new_session()]
        request = node.request(folder, "data")
        specs = [await agent.attach(node.grant(request, session)) for session in sessions]
        assert len({spec.source for spec in specs}) == 2
        assert len({spec.mount_key for spec in specs}) == 1
        assert len(node.processes()) == 1
        (Path(specs[0].source) / "shared.txt").write_text("one for all")
        assert (Path(specs[1].source) / "shared.txt").read_text() == "one for all"
        await agent.detach_session(sessions[0])
        assert (Path(specs[1].source) / "hello.txt").read_text() == "hello from data/"
        assert len(node.processes()) == 1
        await agent.detach_session(sessions[1])
        assert node.residue() == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": AccessMode.READ_ONLY},
        {"credential_id": "another"},
        {"ownership": Ownership(uid=1001, gid=1000)},
        {"ownership": Ownership(uid=1000, gid=1000, umask=0o077)},
        {"prefix": "other"},
    ],
    ids=["mode", "credential", "uid", "umask", "prefix"],
)
@pytest.mark.semantics(8)
async def test_what_differs_gets_a_process_of_its_own(node: Node, folder: str, changes: dict[str, object]) -> None:
    prefix = str(changes.pop("prefix", "data")) if "prefix" in changes else "data"
    async with node.agent() as agent:
        first = await agent.attach(node.grant(node.request(folder, "data")))
        second = await agent.attach(node.grant(node.request(folder, prefix, **changes)))
        assert first.mount_key != second.mount_key
        assert len(node.processes()) == 2
    assert node.residue() == {}


async def test_twenty_at_once_start_one_process(node: Node, folder: str) -> None:
    request = node.request(folder, "data")
    async with node.agent() as agent:
        specs = await asyncio.gather(*(agent.attach(node.grant(request)) for _ in range(20)))
        assert len({spec.source for spec in specs}) == 20
        assert len(node.processes()) == 1
        (mount,) = await agent.mounts()
        assert len(mount.sessions) == 20
        assert all((Path(spec.source) / "hello.txt").exists() for spec in specs)
        await asyncio.gather(*(agent.detach_session(spec.session_id) for spec in specs))
        assert node.residue() == {}


async def test_attach_again_is_the_same_attachment(node: Node, folder: str) -> None:
    async with node.agent() as agent:
        session = new_session()
        request = node.request(folder, "data")
        grant = node.grant(request, session)
        first = await agent.attach(grant)
        assert await agent.attach(grant) == first
        assert await agent.attach(node.grant(request, session)) == first, "also with a new grant for the same"
        assert len(await agent.attachments()) == 1
        with pytest.raises(AlreadyExists, match="other terms"):
            await agent.attach(node.grant(request.model_copy(update={"mode": AccessMode.READ_ONLY}), session))


async def test_a_released_grant_is_not_taken_again(node: Node, folder: str) -> None:
    async with node.agent() as agent:
        session = new_session()
        grant = node.grant(node.request(folder, "data"), session)
        await agent.attach(grant)
        await agent.detach_session(session)
        with pytest.raises(TokenInvalid, match="used already"):
            await agent.attach(grant)
        assert node.residue() == {}


async def test_one_folder_of_a_session_can_go_alone(node: Node, folder: str) -> None:
    async with node.agent() as agent:
        session = new_session()
        one, two = node.request(folder, "data"), node.request(folder, "other", target="/other")
        await agent.attach(node.grant(one, session))
        kept = await agent.attach(node.grant(two, session))
        await agent.detach(session, one.vfid)
        assert [item.vfid for item in await agent.attachments()] == [two.vfid]
        assert (Path(kept.source) / "hello.txt").read_text() == "hello from other/"


async def test_grace_keeps_the_mount_for_the_next_session(node: Node, folder: str) -> None:
    request = node.request(folder, "data")
    async with node.agent(grace_period=30.0) as agent:
        session = new_session()
        await agent.attach(node.grant(request, session))
        process = node.processes()
        await agent.detach_session(session)
        (mount,) = await agent.mounts()
        assert mount.state is MountState.DRAINING
        begun = time.monotonic()
        spec = await agent.attach(node.grant(request))
        assert time.monotonic() - begun < 1.0
        assert node.processes() == process
        (mount,) = await agent.mounts()
        assert mount.state is MountState.LIVE
        assert (Path(spec.source) / "hello.txt").exists()
        await agent.detach_session(spec.session_id)
        assert await agent.gc() == 1
        assert node.residue() == {}


@pytest.mark.semantics(12)
async def test_the_grace_period_ends(node: Node, folder: str) -> None:
    async with node.agent(grace_period=0.2) as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        await agent.detach_session(spec.session_id)

        async def gone() -> bool:
            return await agent.mounts() == []

        await until_async(gone, "the mount goes when its grace period is over")
        assert node.residue() == {}


@pytest.mark.semantics(7)
async def test_read_only_is_in_the_superblock(node: Node, folder: str) -> None:
    async with node.agent() as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data", mode=AccessMode.READ_ONLY)))
        assert spec.read_only
        for place in (Path(spec.source), node.runtime / "pool" / spec.mount_key):
            with pytest.raises(OSError, match="Read-only") as caught:
                (place / "no.txt").write_text("x")
            assert caught.value.errno == errno.EROFS
        entry = next(item for item in node.mounts() if item.mount_point.endswith(spec.mount_key))
        assert "ro" in entry.super_options


async def test_session_binds_are_shared_and_of_their_own_group(node: Node, folder: str) -> None:
    request = node.request(folder, "data")
    async with node.agent() as agent:
        specs = [await agent.attach(node.grant(request)) for _ in range(2)]
        groups = [
            tag
            for entry in node.mounts()
            for tag in entry.tags
            if entry.mount_point in {spec.source for spec in specs} and tag.startswith("shared:")
        ]
        assert len(set(groups)) == 2
        pool = next(entry for entry in node.mounts() if "/pool/" in entry.mount_point)
        assert not set(pool.tags) & set(groups)


@pytest.mark.semantics(5)
async def test_credential_files_are_private_and_the_process_shows_no_secret(node: Node, folder: str) -> None:
    async with node.agent() as agent:
        await agent.attach(node.grant(node.request(folder, "data")))
        (file,) = node.credentials()
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.parent.stat().st_mode & 0o777 == 0o700
        (pid,) = node.processes()
        secret = node.credential.secret_key.reveal().encode()
        for name in ("cmdline", "environ"):
            assert secret not in (Path("/proc") / str(pid) / name).read_bytes()
        names = {item.split(b"=")[0] for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if item}
        assert names == {b"PATH", b"HOME", b"LANG"}
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert "Max core file size" in limits


async def test_more_mounts_than_allowed_are_refused(node: Node, folder: str) -> None:
    async with node.agent(warn_mounts=1, max_mounts=1) as agent:
        await agent.attach(node.grant(node.request(folder, "data")))
        with pytest.raises(LimitExceeded, match="limit"):
            await agent.attach(node.grant(node.request(folder, "other")))
        assert (await agent.status()).warnings


async def test_an_attach_whose_caller_left_does_not_outlive_its_session(node: Node, folder: str) -> None:
    async with node.agent() as agent:
        session = new_session()
        task = asyncio.create_task(agent.attach(node.grant(node.request(folder, "data"), session)))
        await until(lambda: bool(node.processes()), "the mount process starts")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await agent.detach_session(session) == 1
        assert node.residue() == {}


async def test_names_that_options_would_trip_over(node: Node, bucket: str, s3: S3Client) -> None:
    """A comma, a colon, a space, a percent sign and letters beyond ASCII in the prefix."""
    prefix = "a,ro/b:c d/%41=é日"
    await s3.put(bucket, f"{prefix}/x.txt", b"content")
    async with node.agent() as agent:
        spec = await agent.attach(node.grant(node.request(bucket, prefix)))
        assert (Path(spec.source) / "x.txt").read_bytes() == b"content"
        (Path(spec.source) / "y.txt").write_text("rw")


async def test_the_root_of_a_bucket(node: Node, folder: str, s3_server: S3Server) -> None:
    async with node.agent() as agent:
        spec = await agent.attach(node.grant(node.request(folder)))
        assert (Path(spec.source) / "data" / "hello.txt").exists()
