"""Uploads and downloads through the client API."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
from collections.abc import AsyncIterator

import aiohttp
import pytest
import yarl
from sqlalchemy import select

from storage_proxy.core.tokens import Purpose
from storage_proxy.state import Upload
from storage_proxy.volumes.uploads import STAGING

from .proxy_stand import ProxyStand, until

pytestmark = pytest.mark.asyncio

MIB = 1024 * 1024
PART = 8 * MIB


def sha256(data: bytes) -> str:
    return "sha256 " + base64.b64encode(hashlib.sha256(data).digest()).decode()


async def nothing_left(stand: ProxyStand) -> bool:
    staged = await stand.s3.list_page(stand.bucket, STAGING)
    return not staged.objects and not await stand.s3.list_multipart_uploads(stand.bucket)


@pytest.mark.semantics(1)
@pytest.mark.parametrize("size", [0, 1, 1000, PART - 1, PART, PART + 1, 2 * PART, 20 * MIB + 7])
async def test_a_file_of_any_size_in_one_request(stand: ProxyStand, size: int) -> None:
    vfid, data = await stand.folder(), os.urandom(size)
    token = await stand.upload_token(vfid, "d/file ü+%.bin", size)
    head = await stand.client("HEAD", "/upload", token)
    assert (head.status, head.headers["Upload-Offset"], head.headers["Upload-Length"]) == (200, "0", str(size))
    answer = await stand.patch(token, 0, data, **{"Upload-Checksum": sha256(data)})
    assert (answer.status, answer.headers["Upload-Offset"], answer.headers["Tus-Resumable"]) == (
        204,
        str(size),
        "1.0.0",
    )
    assert await stand.get(vfid, "d/file ü+%.bin") == data
    info = await stand.s3.head(stand.bucket, f"{stand.prefix(vfid)}d/file ü+%.bin")
    assert info.metadata["mode"] == str(0o100644)
    assert {"uid", "gid", "mtime"} <= set(info.metadata)
    assert await nothing_left(stand)
    # A client that missed the answer asks, or repeats the end.
    assert (await stand.client("HEAD", "/upload", token)).headers["Upload-Offset"] == str(size)
    assert (await stand.patch(token, size, b"")).status == 204


@pytest.mark.parametrize("step", [1 * MIB, 3 * MIB + 1, 5 * MIB, 16 * MIB])
async def test_an_upload_in_many_requests(stand: ProxyStand, step: int) -> None:
    vfid, data = await stand.folder(), os.urandom(18 * MIB + 5)
    token = await stand.upload_token(vfid, "f", len(data))
    for start in range(0, len(data), step):
        last = {"Upload-Checksum": sha256(data)} if start + step >= len(data) else {"Upload-Checksum": "sha256"}
        answer = await stand.patch(token, start, data[start : start + step], **last)
        assert answer.status == 204, answer.body
        assert answer.headers["Upload-Offset"] == str(min(start + step, len(data)))
        if start + step < len(data):
            assert "f" not in await stand.names(vfid)
    assert await stand.get(vfid, "f") == data
    assert await nothing_left(stand)


@pytest.mark.semantics(2)
async def test_an_upload_replaces_a_file_only_when_it_is_whole(stand: ProxyStand) -> None:
    vfid = await stand.folder()
    await stand.put(vfid, "f", b"old")
    data = os.urandom(PART + 100)
    token = await stand.upload_token(vfid, "f", len(data))
    await stand.patch(token, 0, data[:PART])
    assert await stand.get(vfid, "f") == b"old"
    await stand.patch(token, PART, data[PART:])
    assert await stand.get(vfid, "f") == data


@pytest.mark.semantics(3)
async def test_wrong_offsets_sizes_and_headers(stand: ProxyStand) -> None:
    vfid = await stand.folder()
    token = await stand.upload_token(vfid, "f", 10)
    wrong = await stand.patch(token, 5, b"12345")
    assert (wrong.status, wrong.json()["data"]["offset"]) == (409, 0)
    assert wrong.json()["type"].endswith("/upload-offset-mismatch")
    assert (await stand.patch(token, 0, b"x" * 11)).status == 413
    assert (await stand.client("PATCH", "/upload", token, data=b"x")).status == 400
    assert (await stand.client("PATCH", "/upload", token, data=b"x", headers={"Upload-Offset": "-1"})).status == 400
    for bad in ("md5 AAAA", "sha256 AAAA", "sha256 !!"):
        assert (await stand.patch(token, 0, b"x", **{"Upload-Checksum": bad})).status == 400

    async def too_long() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"12345"

    assert (await stand.patch(token, 0, too_long())).status == 413
    assert (await stand.client("HEAD", "/upload", token)).headers["Upload-Offset"] in ("0", "5")
    assert await stand.names(vfid) == []
    big = {"volume": "minio", "vfid": vfid, "relpath": "f", "size": 101 * 1024**3}
    assert (await stand.call("POST", "/folder/file/upload", big)).status == 413


@pytest.mark.expects_log("another SHA-256")
@pytest.mark.parametrize("size", [100, 2 * PART + 1])
async def test_a_wrong_checksum_publishes_nothing(stand: ProxyStand, size: int) -> None:
    vfid, data = await stand.folder(), os.urandom(size)
    await stand.put(vfid, "f", b"old")
    token = await stand.upload_token(vfid, "f", size)
    answer = await stand.patch(token, 0, data, **{"Upload-Checksum": sha256(data + b"x")})
    assert answer.status == 460
    assert await stand.get(vfid, "f") == b"old"
    assert await nothing_left(stand)
    assert (await stand.client("HEAD", "/upload", token)).status == 404


@pytest.mark.expects_log("another SHA-256")
async def test_a_checksum_after_a_restart_is_compared_with_what_is_stored(stand: ProxyStand) -> None:
    vfid, data = await stand.folder(), os.urandom(PART + 10)
    for wrong in (False, True):
        token = await stand.upload_token(vfid, f"f{wrong}", len(data))
        await stand.patch(token, 0, data[:PART], **{"Upload-Checksum": "sha256"})
        stand.proxy.services.uploads._hashes.clear()  # what a restart does
        sum_ = sha256(data + b"x" if wrong else data)
        answer = await stand.patch(token, PART, data[PART:], **{"Upload-Checksum": sum_})
        assert answer.status == (460 if wrong else 204)
    assert await stand.names(vfid) == ["fFalse"]


@pytest.mark.semantics(4)
async def test_a_broken_connection_keeps_what_came(stand: ProxyStand) -> None:
    vfid, data = await stand.folder(), os.urandom(3 * PART)
    token = await stand.upload_token(vfid, "f", len(data))
    sent = PART + PART // 2
    url = yarl.URL(stand.client_url)
    _, writer = await asyncio.open_connection(url.host, url.port)
    head = f"PATCH /upload?token={token} HTTP/1.1\r\nHost: x\r\nUpload-Offset: 0\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data[:sent])
    await writer.drain()
    received = stand.proxy.services.metrics.received

    async def all_is_there() -> bool:
        return received._value.get() >= sent

    async def offset() -> int:
        return int((await stand.client("HEAD", "/upload", token)).headers["Upload-Offset"])

    async def settled() -> bool:
        return await offset() > 0

    await until(all_is_there)
    writer.transport.abort()
    await until(settled)
    assert await offset() == sent
    assert (await stand.patch(token, sent, data[sent:], **{"Upload-Checksum": sha256(data)})).status == 204
    assert await stand.get(vfid, "f") == data
    assert await nothing_left(stand)


async def test_only_one_request_writes_an_upload(stand: ProxyStand) -> None:
    vfid = await stand.folder()
    token = await stand.upload_token(vfid, "f", 10)
    go_on = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"01234"
        await go_on.wait()
        yield b"56789"

    async def is_held() -> bool:
        async with stand.proxy.database.session() as session:
            return (await session.execute(select(Upload.lease))).scalar_one() is not None

    first = asyncio.create_task(stand.patch(token, 0, slow()))
    await until(is_held)
    second = await stand.patch(token, 0, b"0123456789")
    assert (second.status, second.json()["type"].rpartition("/")[2]) == (409, "tus-lease-held")
    go_on.set()
    assert (await first).status == 204
    assert await stand.get(vfid, "f") == b"0123456789"


async def test_many_uploads_at_once_stay_within_their_memory(stand: ProxyStand) -> None:
    vfid, data = await stand.folder(), os.urandom(17 * MIB)
    budget = stand.proxy.services.uploads.budget
    highest = 0

    async def watch() -> None:
        nonlocal highest
        while True:
            highest = max(highest, budget.used)
            await asyncio.sleep(0)

    watcher = asyncio.create_task(watch())
    async with asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(stand.put(vfid, f"f{number}", data))
    watcher.cancel()
    assert 0 < highest <= budget.total == 16 * MIB
    assert budget.used == 0
    assert len(await stand.names(vfid)) == 8
    assert await stand.get(vfid, "f7") == data


async def test_presigned_upload(stand: ProxyStand) -> None:
    vfid, data = await stand.folder(), os.urandom(33 * MIB)
    token = await stand.upload_token(vfid, "big", len(data))
    plan = (await stand.client("POST", "/upload/presigned", token)).json()
    assert [part["size"] for part in plan["parts"]] == [16 * MIB, 16 * MIB, 1 * MIB]
    assert plan["part_size"] == 16 * MIB
    etags = {}
    for part in plan["parts"][1:]:
        start = (part["number"] - 1) * plan["part_size"]
        etags[part["number"]] = await stand.put_part(part["url"], data[start : start + part["size"]])
    parts = [{"number": number, "etag": etag} for number, etag in etags.items()]
    early = await stand.client("POST", "/upload/complete", token, json={"parts": parts})
    assert (early.status, early.json()["data"]) == (400, {"1": "missing, or has another ETag"})
    assert (await stand.patch(token, 0, b"x")).status == 409
    # A part of the wrong size is noticed although its ETag is right; links are refreshed by asking again.
    plan = (await stand.client("POST", "/upload/presigned", token)).json()
    for size, status in ((5 * MIB, 400), (16 * MIB, 204)):
        first = {"number": 1, "etag": await stand.put_part(plan["parts"][0]["url"], data[:size])}
        done = await stand.client("POST", "/upload/complete", token, json={"parts": [first, *parts]})
        assert done.status == status, done.body
    assert await stand.get(vfid, "big") == data
    assert (await stand.client("POST", "/upload/complete", token, json={"parts": [first, *parts]})).status == 204
    assert await nothing_left(stand)


@pytest.mark.parametrize("size", [0, 3])
async def test_presigned_upload_of_a_small_file(stand: ProxyStand, size: int) -> None:
    vfid, data = await stand.folder(), b"x" * size
    token = await stand.upload_token(vfid, "small", size)
    plan = (await stand.client("POST", "/upload/presigned", token)).json()
    assert len(plan["parts"]) == min(size, 1)
    parts = [{"number": part["number"], "etag": await stand.put_part(part["url"], data)} for part in plan["parts"]]
    assert (await stand.client("POST", "/upload/complete", token, json={"parts": parts})).status == 204
    assert await stand.get(vfid, "small") == data


async def test_expired_uploads_are_swept(stand: ProxyStand) -> None:
    vfid, data = await stand.folder(), os.urandom(PART + 100)
    token = await stand.upload_token(vfid, "f", 3 * PART)
    assert (await stand.patch(token, 0, data)).status == 204
    assert not await nothing_left(stand)
    uploads = stand.proxy.services.uploads
    assert await uploads.sweep() == 0
    await stand.expire_uploads()
    assert await uploads.sweep() == 1
    assert await nothing_left(stand)
    assert (await stand.client("HEAD", "/upload", token)).status == 404


async def test_an_upload_of_a_dead_process_goes_on_at_its_last_part(stand: ProxyStand) -> None:
    vfid, data = await stand.folder(), os.urandom(3 * PART)
    token = await stand.upload_token(vfid, "f", len(data))
    assert (await stand.patch(token, 0, data[: 2 * PART])).status == 204
    await stand.forget_progress()  # the process died: parts in S3, the row still says 0 and holds a lease
    head = await stand.client("HEAD", "/upload", token)
    assert head.headers["Upload-Offset"] == str(2 * PART)
    assert (await stand.patch(token, 2 * PART, data[2 * PART :])).status == 204
    assert await stand.get(vfid, "f") == data
    # And one that died after it had published, before it could write that down.
    await stand.forget_progress()
    assert (await stand.client("HEAD", "/upload", token)).headers["Upload-Offset"] == str(len(data))


async def test_deleting_a_folder_ends_its_uploads(stand: ProxyStand) -> None:
    vfid = await stand.folder()
    token = await stand.upload_token(vfid, "f", 3 * PART)
    await stand.patch(token, 0, os.urandom(PART + 5))
    await stand.ok("POST", "/folder/delete", volume="minio", vfid=vfid)
    assert await nothing_left(stand)
    assert (await stand.patch(token, PART + 5, b"x")).status == 404


# --- downloads --------------------------------------------------------------------------------------------------------


async def test_download_ranges_and_conditions(stand: ProxyStand) -> None:
    vfid, data = await stand.folder(), os.urandom(3 * MIB)
    await stand.put(vfid, 'd/ä "b.bin', data)
    token = await stand.download_token(vfid, 'd/ä "b.bin')
    whole = await stand.client("GET", "/download", token)
    assert whole.body == data
    assert whole.headers["Accept-Ranges"] == "bytes"
    assert whole.headers["Content-Disposition"].endswith("filename*=UTF-8''%C3%A4%20%22b.bin")
    etag, modified = whole.headers["ETag"], whole.headers["Last-Modified"]
    head = await stand.client("HEAD", "/download", token)
    assert (head.status, head.headers["Content-Length"], head.body) == (200, str(len(data)), b"")
    cases = [
        ("bytes=0-9", 206, data[:10]),
        ("bytes=100-", 206, data[100:]),
        ("bytes=-5", 206, data[-5:]),
        (f"bytes=0-{len(data) * 2}", 206, data),
        ("bytes=5-2", 200, data),
        ("bytes=0-1,5-6", 200, data),
        ("lines=1-2", 200, data),
        (f"bytes={len(data)}-", 416, None),
        ("bytes=-0", 416, None),
    ]
    for header, status, body in cases:
        answer = await stand.client("GET", "/download", token, headers={"Range": header})
        assert answer.status == status, header
        if body is not None:
            assert answer.body == body, header
        else:
            assert answer.headers["Content-Range"] == f"bytes */{len(data)}"
    for condition, status in ((etag, 206), (modified, 206), ('"other"', 200), ("Mon, 01 Jan 2001 00:00:00 GMT", 200)):
        answer = await stand.client("GET", "/download", token, headers={"Range": "bytes=1-2", "If-Range": condition})
        assert answer.status == status
    ranged = await stand.client("GET", "/download", token, headers={"Range": "bytes=1-2"})
    assert ranged.headers["Content-Range"] == f"bytes 1-2/{len(data)}"
    assert (await stand.client("GET", "/download", token, "&no_cache=true")).headers["Cache-Control"] == "no-store"


async def test_download_refusals(stand: ProxyStand) -> None:
    vfid = await stand.folder()
    await stand.put(vfid, "d/f", b"1")
    token = await stand.download_token(vfid, "d/f")
    assert (await stand.client("GET", "/download", await stand.download_token(vfid, "gone"))).status == 404
    assert (await stand.client("GET", "/download", await stand.download_token(vfid, "d"))).status == 400
    for query in ("&dst_dir=../..", "&dst_dir=other", "&archive=true", "&redirect=elsewhere", "&no_cache=perhaps"):
        assert (await stand.client("GET", "/download", token, query)).status == 400, query
    upload = await stand.upload_token(vfid, "d/g", 1)
    for bad in ("", "x", token + "x", upload, token.rpartition(".")[0] + "."):
        answer = await stand.client("GET", "/download", bad)
        assert answer.status == 400, answer.body
        assert "token" in answer.json()["data"]
        assert len(bad) < 20 or bad.encode() not in answer.body
    assert (await stand.client("PATCH", "/upload", token, data=b"x", headers={"Upload-Offset": "0"})).status == 400
    foreign = stand.proxy.services.signer.issue(
        Purpose.DOWNLOAD, "x", stand.config.session_lifetime, {"volume": "minio", "vfid": vfid, "relpath": "../x"}
    )
    assert (await stand.client("GET", "/download", foreign)).status == 400


async def test_presigned_download(stand: ProxyStand) -> None:
    vfid, data = await stand.folder(), os.urandom(MIB)
    await stand.put(vfid, "d/ü+.bin", data)
    token = await stand.download_token(vfid, "d/ü+.bin")
    answer = await stand.client("GET", "/download", token, "&redirect=presigned")
    assert answer.status == 302
    location = answer.headers["Location"]
    assert "X-Amz-Expires=300" in location
    async with stand.http.get(yarl.URL(location, encoded=True)) as got:
        assert await got.read() == data
    async with stand.http.get(yarl.URL(location.replace(".bin", ".bim"), encoded=True)) as got:
        assert got.status == 403


async def test_tus_options_and_cors(stand: ProxyStand) -> None:
    async with stand.http.options(f"{stand.client_url}/upload") as answer:
        assert answer.status == 200
        assert answer.headers["Tus-Version"] == "1.0.0"
        assert answer.headers["Tus-Max-Size"] == str(100 * 1024**3)
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    async with stand.http.get(f"{stand.client_url}/download") as answer:
        assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (400, "*")
    async with aiohttp.ClientSession() as http, http.get(f"{stand.client_url}/nothing") as answer:
        assert (answer.status, answer.content_type) == (404, "application/problem+json")
