"""Folders through the manager API: managed and bound."""

from __future__ import annotations

import asyncio

import pytest

from storage_proxy.s3 import S3Client
from tests.conftest import S3Server

from .proxy_stand import ProxyStand

pytestmark = pytest.mark.asyncio


async def test_status_volumes_and_hardware(stand: ProxyStand) -> None:
    answer = await stand.call("GET", "/", secret=None)
    assert answer.json()["type"] == "manager-facing"
    (volume,) = (await stand.ok("GET", "/volumes"))["volumes"]
    assert volume["name"] == "minio"
    assert volume["fsprefix"] == "."
    assert volume["capabilities"] == ["vfolder"]
    info = await stand.ok("GET", "/volume/hwinfo", volume="minio")
    assert info["status"] == "healthy"
    assert info["metadata"]["bucket"] == stand.bucket


async def test_a_wrong_secret_gets_backend_ais_answer(stand: ProxyStand) -> None:
    for secret, title in ((None, "missing"), ("wrong", "invalid"), (stand.secret + "x", "invalid")):
        answer = await stand.call("GET", "/volumes", secret=secret)
        assert answer.status == 403
        assert answer.headers["Content-Type"].startswith("application/problem+json")
        assert answer.json()["type"] == "https://api.backend.ai/probs/storage/forbidden"
        assert answer.json()["title"] == f"Forbidden ({title} auth token)"
    assert (await stand.call("GET", "/volumes", secret=stand.other_secret)).status == 200


async def test_create_mount_delete(stand: ProxyStand) -> None:
    vfid = stand.vfid()
    body = {"volume": "minio", "vfid": vfid, "mode": 493, "options": {"initial_max_size_for_quota_scope": 0}}
    assert (await stand.call("POST", "/folder/create", body)).status == 204
    again = await stand.call("POST", "/folder/create", body)
    assert (again.status, again.json()["error_code"]) == (409, "vfolder_create_already-exists")
    mount = await stand.ok("GET", "/folder/mount", volume="minio", vfid=vfid, subpath="a/b")
    assert mount["path"] == f"/vfroot/minio/{stand.prefix(vfid).rstrip('/')}"
    assert mount["location"]["bucket"] == stand.bucket
    assert mount["location"]["prefix"] == stand.prefix(vfid)
    assert mount["read_only"] is False
    await stand.put(vfid, "d/file", b"x" * 10)
    deleted = await stand.call("POST", "/folder/delete", {"volume": "minio", "vfid": vfid})
    assert deleted.status == 202
    assert deleted.json()["bgtask_id"]
    assert [page.objects for page in [await stand.s3.list_page(stand.bucket, stand.prefix(vfid))]] == [[]]
    missing = await stand.call("GET", "/folder/mount", {"volume": "minio", "vfid": vfid})
    assert (missing.status, missing.json()["error_code"]) == (404, "vfolder_read_not-found")
    assert (await stand.call("POST", "/folder/delete", {"volume": "minio", "vfid": vfid})).status == 202
    assert (await stand.call("POST", "/folder/create", body)).status == 204


async def test_deleting_a_folder_leaves_its_neighbours(stand: ProxyStand) -> None:
    first, second = await stand.folder(), await stand.folder()
    await stand.put(first, "f", b"1")
    await stand.put(second, "f", b"2")
    await stand.ok("POST", "/folder/delete", volume="minio", vfid=first)
    assert await stand.get(second, "f") == b"2"


async def test_delete_more_than_one_page(stand: ProxyStand) -> None:
    vfid = await stand.folder()
    prefix = stand.prefix(vfid)
    for start in range(0, 1100, 100):
        async with asyncio.TaskGroup() as group:
            for number in range(start, start + 100):
                group.create_task(stand.s3.put(stand.bucket, f"{prefix}d{number % 7}/f{number}", b""))
    await stand.ok("POST", "/folder/delete", volume="minio", vfid=vfid)
    assert (await stand.s3.list_page(stand.bucket, prefix)).objects == []


async def test_unknown_volume(stand: ProxyStand) -> None:
    answer = await stand.call("POST", "/folder/create", {"volume": "nowhere", "vfid": stand.vfid()})
    assert (answer.status, answer.json()["type"].rpartition("/storage/")[2]) == (400, "volume/invalid")


@pytest.mark.semantics(13)
async def test_usage_counts_files_and_says_when(stand: ProxyStand) -> None:
    vfid = await stand.folder()
    await stand.put(vfid, "a", b"x" * 1000)
    await stand.put(vfid, "d/b", b"y" * 24)
    usage = await stand.ok("GET", "/folder/usage", volume="minio", vfid=vfid)
    assert (usage["file_count"], usage["used_bytes"]) == (2, 1024)
    assert 0 <= usage["error_bound_bytes"] <= 1024
    assert usage["as_of"].endswith("+00:00")
    assert (await stand.ok("GET", "/folder/used-bytes", volume="minio", vfid=vfid))["used_bytes"] == 1024
    whole = await stand.ok("GET", "/folder/fs-usage", volume="minio")
    assert whole["used_bytes"] == 1024
    assert whole["capacity_bytes"] == 1024**5


# --- bound folders ----------------------------------------------------------------------------------------------------


async def test_bind_a_directory_of_a_bucket(stand: ProxyStand, s3_server: S3Server, s3: S3Client) -> None:
    bucket = s3_server.limited_bucket
    await s3.put(bucket, "team/data/one.txt", b"one")
    await s3.put(bucket, "team/database.txt", b"not below the prefix")
    vfid = await stand.bind(bucket, s3_server.limited, "team/data", read_only=True)
    assert await stand.names(vfid) == ["one.txt"]
    assert await stand.get(vfid, "one.txt") == b"one"
    mount = await stand.ok("GET", "/folder/mount", volume="minio", vfid=vfid)
    assert mount["read_only"] is True
    assert (mount["location"]["bucket"], mount["location"]["prefix"]) == (bucket, "team/data/")
    await stand.ok("POST", "/folder/delete", volume="minio", vfid=vfid)
    assert (await s3.head(bucket, "team/data/one.txt")).size == 3
    gone = await stand.call("POST", "/folder/file/list", {"volume": "minio", "vfid": vfid})
    assert gone.status == 404


@pytest.mark.expects_log("S3 LIST s3://")
async def test_bind_looks_before_it_believes(stand: ProxyStand, s3_server: S3Server, s3: S3Client) -> None:
    await s3.put(s3_server.limited_bucket, "here/x", b"")
    good = {
        "access_key": s3_server.limited.access_key,
        "secret_key": s3_server.limited.secret_key.reveal(),
    }
    cases = [
        ({"bucket": "no-such-bucket-here", "credential": good}, {404, 502}),
        ({"bucket": stand.bucket, "credential": good}, {502}),
        ({"bucket": s3_server.limited_bucket, "prefix": "empty", "credential": good}, {404}),
        ({"bucket": s3_server.limited_bucket, "credential": {**good, "secret_key": "wrong"}}, {502}),
        ({"bucket": s3_server.limited_bucket, "credential": good, "endpoint": "http://198.51.100.1"}, {400}),
        ({"bucket": s3_server.limited_bucket, "credential": good, "endpoint": "file:///etc"}, {400}),
        ({"bucket": s3_server.limited_bucket, "credential": good, "prefix": "../x"}, {400}),
        ({"bucket": "../x", "credential": good}, {400}),
    ]
    for binding, expected in cases:
        body = {"volume": "minio", "vfid": stand.vfid(), "options": {"binding": binding}}
        answer = await stand.call("POST", "/folder/create", body)
        assert answer.status in expected, (binding["bucket"], answer.status, answer.body)
        assert b"wrong" not in answer.body.replace(b"wrong key", b"")
        assert (await stand.call("GET", "/folder/mount", body)).status == 404


async def test_the_secret_of_a_binding_is_encrypted_at_rest(
    stand: ProxyStand, s3_server: S3Server, s3: S3Client
) -> None:
    await s3.put(s3_server.limited_bucket, "secret/x", b"")
    await stand.bind(s3_server.limited_bucket, s3_server.limited, "secret")
    secret = s3_server.limited.secret_key.reveal().encode()
    files = [path for path in stand.config.storage_proxy.state_dir.iterdir() if path.is_file()]
    assert files
    assert not any(secret in path.read_bytes() for path in files)


@pytest.mark.semantics(7)
async def test_read_only_holds_on_every_writing_route(stand: ProxyStand, s3_server: S3Server, s3: S3Client) -> None:
    bucket = s3_server.limited_bucket
    await s3.put(bucket, "ro/f", b"kept")
    # Bound with a credential that could write: it is the proxy that refuses.
    vfid = await stand.bind(bucket, s3_server.admin, "ro", read_only=True)
    requests: list[tuple[str, dict[str, object]]] = [
        ("/folder/file/mkdir", {"relpath": "d"}),
        ("/folder/file/rename", {"relpath": "f", "new_name": "g"}),
        ("/folder/file/move", {"src_relpath": "f", "dst_relpath": "g"}),
        ("/folder/file/delete", {"relpaths": ["f"], "recursive": True}),
        ("/folder/file/upload", {"relpath": "f", "size": 1}),
    ]
    for path, fields in requests:
        answer = await stand.call("POST", path, {"volume": "minio", "vfid": vfid, **fields})
        assert (answer.status, answer.json()["error_code"]) == (403, "vfolder_update_forbidden"), path
    assert await stand.get(vfid, "f") == b"kept"
