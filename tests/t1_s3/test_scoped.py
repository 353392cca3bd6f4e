"""Credentials limited to a bucket and prefix: made, enforced, revoked, and good enough for a real s3fs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import pytest
import pytest_asyncio

from storage_proxy.core.errors import S3AccessDenied, S3BadCredential, Unsupported
from storage_proxy.core.ids import AccessMode, BucketRef
from storage_proxy.core.wire import S3Credential
from storage_proxy.s3 import S3Client, ScopedIssuer

from ..conftest import S3Server

RW, RO = AccessMode.READ_WRITE, AccessMode.READ_ONLY


@pytest_asyncio.fixture
async def issuer(s3_server: S3Server) -> AsyncIterator[ScopedIssuer]:
    async with ScopedIssuer(s3_server.endpoint, s3_server.admin) as issuer:
        yield issuer


@pytest.mark.asyncio
@pytest.mark.parametrize("method", ["iam", "sts"])
@pytest.mark.parametrize("mode", [RO, RW])
async def test_a_credential_reaches_its_prefix_and_nothing_else(
    s3_server: S3Server, s3: S3Client, bucket: str, method: Literal["iam", "sts"], mode: AccessMode
) -> None:
    for key in ("team1/a", "team10/a", "team1", "b"):
        await s3.put(bucket, key, b"x")
    ref = BucketRef(bucket, "team1/")
    async with ScopedIssuer(s3_server.endpoint, s3_server.admin, methods=[method], bucket_check=False) as issuer:
        scoped = await issuer.issue(ref, mode, timedelta(hours=1), "session-1")
        assert scoped.method == method
        async with S3Client(s3_server.endpoint, scoped.credential) as holder:
            assert [item.key for item in (await holder.list_page(bucket, "team1/")).objects] == ["team1/a"]
            async with await holder.get(bucket, "team1/a") as stream:
                assert await stream.read() == b"x"
            for prefix in ("", "team10/", "team1", "b"):
                with pytest.raises(S3AccessDenied):
                    await holder.list_page(bucket, prefix)
            for key in ("team10/a", "b", "missing"):
                with pytest.raises(S3AccessDenied):
                    await holder.get(bucket, key)
                with pytest.raises(S3AccessDenied):
                    await holder.put(bucket, key, b"y")
                with pytest.raises(S3AccessDenied):
                    await holder.delete(bucket, key)
            with pytest.raises(S3AccessDenied):  # a copy reads its source
                await holder.copy(bucket, "team10/a", bucket, "team1/stolen", size=1)
            with pytest.raises(S3AccessDenied):
                await holder.create_bucket(bucket + "-2")
            if mode is RW:
                await holder.put(bucket, "team1/new", b"y")
                upload = await holder.create_multipart(bucket, "team1/big")
                await holder.abort_multipart(bucket, "team1/big", upload)
                await holder.delete(bucket, "team1/new")
            else:
                with pytest.raises(S3AccessDenied):
                    await holder.put(bucket, "team1/new", b"y")
                with pytest.raises(S3AccessDenied):
                    await holder.delete(bucket, "team1/a")
                with pytest.raises(S3AccessDenied):
                    await holder.create_multipart(bucket, "team1/big")
        if scoped.revoke_ref is not None:
            await issuer.revoke(scoped.revoke_ref)
            await issuer.revoke(scoped.revoke_ref)
            assert scoped.revoke_ref not in await issuer.identities()
            async with S3Client(s3_server.endpoint, scoped.credential) as holder:
                await _until_refused(holder, bucket)
        else:
            assert scoped.credential.session_token
            assert scoped.credential.expires_at is not None
            assert timedelta(minutes=50) < scoped.credential.expires_at - datetime.now(UTC) < timedelta(minutes=61)


async def _until_refused(holder: S3Client, bucket: str) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                await holder.list_page(bucket, "team1/")
            except (S3BadCredential, S3AccessDenied):
                return
            await asyncio.sleep(0.05)


@pytest.mark.asyncio
async def test_a_whole_bucket(s3_server: S3Server, s3: S3Client, bucket: str, issuer: ScopedIssuer) -> None:
    scoped = await issuer.issue(BucketRef(bucket), RW, None, "weird name / with: signs and a great length " * 3)
    async with S3Client(s3_server.endpoint, scoped.credential) as holder:
        await holder.put(bucket, "anywhere", b"")
        assert len((await holder.list_page(bucket)).objects) == 1
        with pytest.raises(S3AccessDenied):
            await holder.list_page(s3_server.limited_bucket)
    assert scoped.revoke_ref is not None
    await issuer.revoke(scoped.revoke_ref)


@pytest.mark.asyncio
async def test_a_parent_without_the_right_to_issue(s3_server: S3Server, bucket: str) -> None:
    async with ScopedIssuer(s3_server.endpoint, s3_server.limited) as issuer:
        with pytest.raises(Unsupported, match="makes no credential"):
            await issuer.issue(BucketRef(bucket, "a/"), RO, None)
        parent = await issuer.issue(BucketRef(bucket, "a/"), RO, None, allow_parent=True)
        assert (parent.method, parent.revoke_ref, parent.credential) == ("parent", None, s3_server.limited)
    async with ScopedIssuer(s3_server.endpoint, s3_server.admin) as admin:
        assert await admin.identities() == []


@pytest.mark.asyncio
async def test_a_cancelled_issue_leaves_no_user(s3_server: S3Server, bucket: str, issuer: ScopedIssuer) -> None:
    for wait in (0.0, 0.005, 0.01, 0.02, 0.05):
        task = asyncio.create_task(issuer.issue(BucketRef(bucket, "a/"), RW, None))
        await asyncio.sleep(wait)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            scoped = await task
            assert scoped.revoke_ref is not None
            await issuer.revoke(scoped.revoke_ref)
    assert await issuer.identities() == []


@pytest.mark.asyncio
async def test_an_unenforced_limit_is_noticed(
    s3_server: S3Server, bucket: str, issuer: ScopedIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that forgets the prefix: the policy is widened on its way."""
    real = issuer._call

    async def widened(service: str, action: str, params: dict[str, str]) -> object:
        if "PolicyDocument" in params:
            params = {**params, "PolicyDocument": params["PolicyDocument"].replace("team1/", "")}
        return await real(service, action, params)  # type: ignore[arg-type]

    monkeypatch.setattr(issuer, "_call", widened)
    with pytest.raises(Unsupported, match="does not enforce"):
        await issuer.issue(BucketRef(bucket, "team1/"), RW, None)
    assert await issuer.identities() == []


# --- real mounts ------------------------------------------------------------------------------------------------------

needs_s3fs = pytest.mark.skipif(
    shutil.which("s3fs") is None or not Path("/dev/fuse").exists() or os.geteuid() != 0,
    reason="needs root, /dev/fuse and s3fs",
)


@contextlib.contextmanager
def s3fs_mount(place: Path, url: str, credential: S3Credential, ref: BucketRef, mode: AccessMode) -> Iterator[Path]:
    """A foreground s3fs in its own process group; every look into the mount is a child process with a deadline."""
    mount, scratch, keys = place / "mnt", place / "tmp", place / "keys"
    mount.mkdir()
    scratch.mkdir()
    keys.touch(0o600)
    keys.write_text(f"{credential.access_key}:{credential.secret_key.reveal()}\n")
    options = f"passwd_file={keys},url={url},endpoint=us-east-1,sigv4,use_path_request_style,tmpdir={scratch}"
    log = (place / "s3fs.log").open("wb")
    process = subprocess.Popen(
        ["s3fs", f"{ref.bucket}:/{ref.prefix.rstrip('/')}", str(mount), "-f", "-o", f"{options},{mode},retries=1"],
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        _poll(lambda: f" {mount} " in Path("/proc/self/mountinfo").read_text() or process.poll() is not None)
        assert process.poll() is None, (place / "s3fs.log").read_text()
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=False, timeout=20, capture_output=True)
        process.terminate()
        process.wait(20)
        log.close()


def _poll(condition: object, deadline: float = 15.0) -> None:
    import time

    end = time.monotonic() + deadline
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "condition not met in time"
        time.sleep(0.05)


def _sh(command: str, cwd: Path) -> tuple[int, str]:
    done = subprocess.run(["sh", "-c", command], cwd=cwd, capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stdout + done.stderr


@needs_s3fs
@pytest.mark.root
@pytest.mark.asyncio
async def test_s3fs_mounts_with_an_issued_key(
    s3_server: S3Server, s3: S3Client, bucket: str, issuer: ScopedIssuer, tmp_path: Path
) -> None:
    ref = BucketRef(bucket, "team1/models/")
    await s3.put(bucket, "team1/models/", b"", content_type="application/x-directory")
    await s3.put(bucket, "team1/models/a b.txt", b"hello")
    await s3.put(bucket, "other/secret", b"secret")

    def work(mode: AccessMode, credential: S3Credential) -> list[tuple[int, str]]:
        place = tmp_path / mode.value
        place.mkdir()
        with s3fs_mount(place, s3_server.endpoint.url, credential, ref, mode) as mount:
            commands = (
                "ls",
                "cat 'a b.txt'",
                "mkdir d && echo made > d/f && mv d e && cat e/f",
                "head -c 25000000 /dev/zero > big && stat -c %s big",
                "rm -r e big && ls",
            )
            return [_sh(command, mount) for command in commands]

    for mode in (RW, RO):
        scoped = await issuer.issue(ref, mode, None, "s3fs")
        results = await asyncio.to_thread(work, mode, scoped.credential)
        assert results[:2] == [(0, "a b.txt\n"), (0, "hello")]
        if mode is RW:
            assert results[2:] == [(0, "made\n"), (0, "25000000\n"), (0, "a b.txt\n")]
        else:
            assert all(code != 0 for code, _ in results[2:])
            assert "Read-only file system" in results[2][1]
        assert scoped.revoke_ref is not None
        await issuer.revoke(scoped.revoke_ref)
