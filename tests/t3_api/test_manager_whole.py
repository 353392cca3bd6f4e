"""The manager extension before a real storage proxy and a real S3 server: what a user does, and what must not work."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from storage_proxy.client import ProxyClient
from storage_proxy.client.manager import MountAsked
from storage_proxy.core.errors import (
    AlreadyExists,
    BucketNotFound,
    MooringError,
    ReadOnly,
    S3AccessDenied,
    S3BadCredential,
    S3Error,
    S3Unavailable,
    VFolderNotFound,
)
from storage_proxy.core.ids import AccessMode
from storage_proxy.core.secrets import Secret
from storage_proxy.s3 import Endpoint, S3Client
from tests.conftest import S3Server

from .manager_stack import ADMIN, AGENT_ID, Stack, running
from .proxy_stand import ProxyStand

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def stack(tmp_path: Path, stand: ProxyStand) -> AsyncIterator[Stack]:
    async with (
        ProxyClient(stand.manager_url, Secret(stand.secret)) as proxy,
        running(tmp_path, proxy, f"sqlite:///{tmp_path / 'm.db'}") as running_stack,
    ):
        await running_stack.register_agent()
        yield running_stack


async def test_files_from_upload_to_deletion(stack: Stack, stand: ProxyStand) -> None:
    async with stack.client() as alice:
        folder = await alice.create_folder("my data", "minio")
        ticket = await alice.request_upload("my data", "a dir/ü+%.bin", 5)
        assert ticket.url.endswith("/upload")
        answer = await stand.patch(ticket.token, 0, b"hello")
        assert answer.status == 204, answer.body
        await alice.mkdir("my data", "empty")
        with pytest.raises(AlreadyExists):
            await alice.mkdir("my data", "empty")
        page = await alice.files("my data")
        assert sorted((entry.name, entry.type.value) for entry in page.items) == [
            ("a dir", "DIRECTORY"),
            ("empty", "DIRECTORY"),
        ]
        usage = await alice.usage("my data")
        assert (usage.file_count, usage.used_bytes) == (1, 5)
        assert usage.as_of is not None
        ticket = await alice.request_download("my data", "a dir/ü+%.bin")
        got = await stand.client("GET", "/download", ticket.token)
        assert (got.status, got.body) == (200, b"hello")
        await alice.delete_files("my data", ["a dir"], recursive=True)
        assert [entry.name for entry in (await alice.files("my data")).items] == ["empty"]
        await alice.delete_folder("my data")
        with pytest.raises(VFolderNotFound):
            await alice.files(folder.id)
        assert [item async for item in stand.s3.list(stand.bucket, stand.prefix(folder.vfid)) if item.objects] == []


@pytest.mark.expects_log("object store")
@pytest.mark.expects_log("S3")
async def test_binding_looks_and_says_what_is_wrong(stack: Stack, stand: ProxyStand, s3_server: S3Server) -> None:
    right = {"access_key": s3_server.limited.access_key, "secret_key": s3_server.limited.secret_key}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}"
    async with stack.client() as alice, stack.client(ADMIN, "admin") as admin:
        with pytest.raises(S3BadCredential):
            await alice.bind_folder(
                "a",
                "minio",
                s3_server.limited_bucket,
                access_key=s3_server.limited.access_key,
                secret_key=Secret("x" * 40),
            )
        with pytest.raises(S3BadCredential):
            await alice.bind_folder(
                "a", "minio", s3_server.limited_bucket, access_key="NOBODY", secret_key=Secret("x" * 40)
            )
        with pytest.raises((BucketNotFound, S3AccessDenied)):
            await alice.bind_folder("a", "minio", "no-such-bucket", **right)  # type: ignore[arg-type]
        with pytest.raises(S3AccessDenied):
            await alice.bind_folder("a", "minio", stand.bucket, **right)  # type: ignore[arg-type]
        with pytest.raises(S3Unavailable):
            await admin.bind_folder("a", "minio", s3_server.limited_bucket, endpoint=nobody, **right)  # type: ignore[arg-type]
        bound = await alice.bind_folder("a", "minio", s3_server.limited_bucket, read_only=True, **right)  # type: ignore[arg-type]
        assert bound.read_only
        assert [folder.name async for folder in admin.folders()] == ["a"], "nothing of the refused ones is left"


async def test_a_bound_bucket_is_used_and_survives(stack: Stack, stand: ProxyStand, s3_server: S3Server) -> None:
    await stand.s3.put(s3_server.limited_bucket, "models/a.bin", b"weights")
    await stand.s3.put(s3_server.limited_bucket, "other/b.bin", b"secret")
    async with stack.client() as alice:
        stored = await alice.create_credential("own", s3_server.limited.access_key, s3_server.limited.secret_key)
        bound = await alice.bind_folder(
            "set", "minio", s3_server.limited_bucket, prefix="models", read_only=True, credential_id=stored.id
        )
        assert [entry.name for entry in (await alice.files("set")).items] == ["a.bin"]
        with pytest.raises(ReadOnly):
            await alice.request_upload("set", "x", 1)
        await alice.create_folder("data", "minio")
        mounts = [MountAsked(folder="set", target="/set"), MountAsked(folder="data", target="/data")]
        plan = await alice.create_session(AGENT_ID, mounts, session_id="s1", uid=1000)
        _, permitted, keys = stack.open_grant(plan.mounts[0].grant)
        assert (permitted.location.endpoint, permitted.location.prefix) == (s3_server.endpoint.url, "models/")
        assert (permitted.mode, keys.secret_key) == (AccessMode.READ_ONLY, s3_server.limited.secret_key)
        assert permitted.credential_id == bound.credential_id
        await alice.delete_session("s1")
        await alice.delete_folder("set")
    async with await stand.s3.get(s3_server.limited_bucket, "models/a.bin") as stream:
        assert b"".join([chunk async for chunk in stream.chunks(1024)]) == b"weights"


async def test_a_sessions_keys_reach_its_folder_and_end_with_it(
    stack: Stack, stand: ProxyStand, s3_server: S3Server
) -> None:
    async with stack.client() as alice:
        folder = await alice.create_folder("data", "minio")
        other = await alice.create_folder("neighbour", "minio")
        plan = await alice.create_session(AGENT_ID, [MountAsked(folder="data", target="/data")], session_id="s1")
        _, permitted, keys = stack.open_grant(plan.mounts[0].grant)
        assert keys.access_key != s3_server.admin.access_key
        place, prefix = permitted.location, stand.prefix(folder.vfid)
        assert (place.bucket, place.prefix) == (stand.bucket, prefix)
        async with S3Client(Endpoint(place.endpoint), keys) as scoped:
            await scoped.put(place.bucket, f"{prefix}x", b"1")
            with pytest.raises(MooringError):
                await scoped.put(place.bucket, f"{stand.prefix(other.vfid)}x", b"1")
        await alice.delete_session("s1")
        async with S3Client(Endpoint(place.endpoint), keys) as ended:
            with pytest.raises(S3Error):
                await ended.put(place.bucket, f"{prefix}y", b"1")
        await alice.delete_folder("data")
