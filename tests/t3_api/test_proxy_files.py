"""Files through the manager API: listing, directories, moving, deleting, fetching."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from .proxy_stand import ProxyStand

pytestmark = pytest.mark.asyncio


async def test_listing_shows_files_and_implicit_directories_but_no_markers(stand: ProxyStand) -> None:
    vfid = await stand.folder()
    prefix = stand.prefix(vfid)
    await stand.put(vfid, "a file+1%.txt", b"12345")
    await stand.s3.put(stand.bucket, f"{prefix}implicit/deep/x", b"1")
    await stand.ok("POST", "/folder/file/mkdir", volume="minio", vfid=vfid, relpath="made")
    listed = await stand.ok("POST", "/folder/file/list", volume="minio", vfid=vfid, relpath=".")
    items = {item["name"]: item for item in listed["items"]}
    assert sorted(items) == ["a file+1%.txt", "implicit", "made"]
    assert listed["next_cursor"] is None
    file = items["a file+1%.txt"]
    assert (file["type"], file["stat"]["size"], file["stat"]["mode"]) == ("FILE", 5, 0o100644)
    age = datetime.now(UTC) - datetime.fromisoformat(file["stat"]["modified"])
    assert abs(age) < timedelta(minutes=1)
    assert (items["implicit"]["type"], items["implicit"]["stat"]["mode"]) == ("DIRECTORY", 0o40755)
    assert await stand.names(vfid, "made") == []
    assert await stand.names(vfid, "implicit") == ["deep"]
    for path, status in (("nothing", 404), ("a file+1%.txt", 400)):
        answer = await stand.call("POST", "/folder/file/list", {"volume": "minio", "vfid": vfid, "relpath": path})
        assert answer.status == status


@pytest.mark.parametrize("limit", [1, 2, 3, 10])
async def test_listing_in_pages_misses_nothing(stand: ProxyStand, limit: int) -> None:
    vfid = await stand.folder()
    prefix = stand.prefix(vfid)
    names = [f"f{number}" for number in range(6)] + [f"d{number}" for number in range(5)]
    async with asyncio.TaskGroup() as group:
        for name in names:
            key = f"{prefix}{name}" + ("/x" if name.startswith("d") else "")
            group.create_task(stand.s3.put(stand.bucket, key, b""))
    found: list[str] = []
    cursor = None
    for _ in range(30):
        page = await stand.ok(
            "POST", "/folder/file/list", volume="minio", vfid=vfid, relpath="", limit=limit, cursor=cursor
        )
        assert len(page["items"]) <= limit
        found += [item["name"] for item in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert sorted(found) == sorted(names)


async def test_names_that_no_path_can_address_are_counted_not_shown(stand: ProxyStand) -> None:
    vfid = await stand.folder()
    await stand.s3.put(stand.bucket, f"{stand.prefix(vfid)}bad\x01name", b"")
    await stand.put(vfid, "good", b"")
    listed = await stand.ok("POST", "/folder/file/list", volume="minio", vfid=vfid)
    assert ([item["name"] for item in listed["items"]], listed["skipped"]) == (["good"], 1)


async def test_mkdir_reports_each_path(stand: ProxyStand) -> None:
    vfid = await stand.folder()
    await stand.put(vfid, "file", b"1")
    body = {"volume": "minio", "vfid": vfid}
    first = await stand.call("POST", "/folder/file/mkdir", {**body, "relpath": ["a/b/c", "d"]})
    assert first.status == 200
    mixed = await stand.call("POST", "/folder/file/mkdir", {**body, "relpath": ["d", "e"]})
    assert mixed.status == 207
    assert [item["item"] for item in mixed.json()["results"]["success"]] == ["e"]
    assert [item["item"] for item in mixed.json()["results"]["failed"]] == ["d"]
    none = await stand.call(
        "POST", "/folder/file/mkdir", {**body, "relpath": ["file", "file/below", "x/y"], "parents": False}
    )
    assert none.status == 422
    assert (await stand.call("POST", "/folder/file/mkdir", {**body, "relpath": "d", "exist_ok": True})).status == 200
    assert await stand.names(vfid) == ["a", "d", "e", "file"]
    assert await stand.names(vfid, "a/b") == ["c"]


async def test_rename_and_move(stand: ProxyStand) -> None:
    vfid = await stand.folder()
    body = {"volume": "minio", "vfid": vfid}
    for path in ("a.txt", "taken", "tree/one", "tree/sub/two", "tree2/x"):
        await stand.put(vfid, path, path.encode())
    await stand.ok("POST", "/folder/file/rename", **body, relpath="a.txt", new_name="b c.txt")
    taken = await stand.call("POST", "/folder/file/rename", {**body, "relpath": "b c.txt", "new_name": "taken"})
    assert taken.status == 409
    await stand.ok("POST", "/folder/file/move", **body, src_relpath="b c.txt", dst_relpath="tree")
    assert await stand.get(vfid, "tree/b c.txt") == b"a.txt"
    await stand.ok("POST", "/folder/file/move", **body, src_relpath="tree", dst_relpath="moved/here")
    assert await stand.names(vfid) == ["moved", "taken", "tree2"]
    assert await stand.get(vfid, "moved/here/sub/two") == b"tree/sub/two"
    inside = await stand.call(
        "POST", "/folder/file/move", {**body, "src_relpath": "moved", "dst_relpath": "moved/here/x"}
    )
    assert inside.status == 400
    missing = await stand.call("POST", "/folder/file/move", {**body, "src_relpath": "tree", "dst_relpath": "y"})
    assert missing.status == 404


async def test_delete_skips_what_is_missing_and_keeps_directories_unless_recursive(stand: ProxyStand) -> None:
    vfid = await stand.folder()
    for path in ("f", "d/x", "d/e/y", "d2/z"):
        await stand.put(vfid, path, b"1")
    body = {"volume": "minio", "vfid": vfid}
    assert await stand.ok("POST", "/folder/file/delete", **body, relpaths=["f", "gone", "d"]) == {"status": "ok"}
    assert await stand.names(vfid) == ["d", "d2"]
    await stand.ok("POST", "/folder/file/delete", **body, relpaths=["d"], recursive=True)
    assert await stand.names(vfid) == ["d2"]
    root = await stand.call("POST", "/folder/file/delete", {**body, "relpaths": ["."], "recursive": True})
    assert root.status == 400


async def test_a_directory_outlives_its_last_file(stand: ProxyStand) -> None:
    vfid = await stand.folder()
    await stand.put(vfid, "d/only", b"1")
    await stand.ok("POST", "/folder/file/delete", volume="minio", vfid=vfid, relpaths=["d/only"])
    assert await stand.names(vfid) == ["d"]


async def test_fetch(stand: ProxyStand) -> None:
    vfid = await stand.folder()
    await stand.put(vfid, "log", b"line\n" * 1000)
    await stand.put(vfid, "empty", b"")
    body = {"volume": "minio", "vfid": vfid}
    assert (await stand.call("POST", "/folder/file/fetch", {**body, "relpath": "log"})).body == b"line\n" * 1000
    assert (await stand.call("POST", "/folder/file/fetch", {**body, "relpath": "empty"})).body == b""
    missing = await stand.call("POST", "/folder/file/fetch", {**body, "relpath": "nothing"})
    assert (missing.status, missing.json()["error_code"]) == (404, "vfolder_read_not-found")


async def test_broken_bodies_and_cursors(stand: ProxyStand) -> None:
    vfid = await stand.folder()
    for data in ("{", "[]", '"x"', "[" * 100_000, b"\xff\xfe"):
        async with stand.http.post(
            f"{stand.manager_url}/folder/create", data=data, headers={"X-BackendAI-Storage-Auth-Token": stand.secret}
        ) as answer:
            assert answer.status == 400, data[:10]
    for cursor in ("x", "!!", "W10=", "WyJhIiwgLTFd", "WzEsIDFd"):
        answer = await stand.call("POST", "/folder/file/list", {"volume": "minio", "vfid": vfid, "cursor": cursor})
        assert (answer.status, answer.json()["error_code"]) == (400, "storage-proxy_request_invalid-parameters")
