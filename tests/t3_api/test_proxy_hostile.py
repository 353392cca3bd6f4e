"""Hostile paths and ids get a 400 on every route, and none gets through to S3."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web

from storage_proxy.web import check_policies, policy_of

from .proxy_stand import ProxyStand

pytestmark = pytest.mark.asyncio

HOSTILE_PATHS = [
    "..",
    "../x",
    "a/../../x",
    "a/..",
    "/etc/passwd",
    "//x",
    "a//b",
    "a/./b",
    "a\0b",
    "a\nb",
    "a\x7fb",
    "a\\..\\b",
    "\ud800",
    "x" * 256,
    "/".join(["x" * 200] * 6),
]
HOSTILE_VFIDS = [
    "",
    "x",
    "0" * 32,
    "user:x/" + "0" * 32,
    "user:00000000-0000-0000-0000-000000000000/../" + "0" * 30,
    "user:00000000-0000-0000-0000-000000000000/" + "0" * 31,
    "user:00000000-0000-0000-0000-000000000000/" + "0" * 32 + "/x",
    "robot:00000000-0000-0000-0000-000000000000/" + "0" * 32,
    "../../etc/passwd",
    "user:00000000-0000-0000-0000-000000000000/" + "0" * 32 + "\n",
    None,
    7,
]
# Routes with a path in them: (method, route, the field, its other fields).
PATHS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("GET", "/folder/mount", "subpath", {}),
    ("POST", "/folder/file/mkdir", "relpath", {}),
    ("POST", "/folder/file/list", "relpath", {}),
    ("POST", "/folder/file/rename", "relpath", {"new_name": "x"}),
    ("POST", "/folder/file/rename", "new_name", {"relpath": "x"}),
    ("POST", "/folder/file/move", "src_relpath", {"dst_relpath": "x"}),
    ("POST", "/folder/file/move", "dst_relpath", {"src_relpath": "x"}),
    ("POST", "/folder/file/delete", "relpaths", {"recursive": True}),
    ("POST", "/folder/file/fetch", "relpath", {}),
    ("POST", "/folder/file/download", "relpath", {}),
    ("POST", "/folder/file/upload", "relpath", {"size": 1}),
]
RECIPIENT = "A" * 43
# Every route that names a folder, with what else it needs.
FOLDERS: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/folder/create", {}),
    ("POST", "/folder/delete", {}),
    ("GET", "/folder/usage", {}),
    ("GET", "/folder/used-bytes", {}),
    ("POST", "/folder/mount-credential", {"mode": "ro", "recipient_key": RECIPIENT, "session_id": "s"}),
    *((method, route, {field: ["x"] if field == "relpaths" else "x", **more}) for method, route, field, more in PATHS),
]
WITHOUT_FOLDER = {"/", "/status", "/volumes", "/volume/hwinfo", "/folder/fs-usage", "/folder/mount-credential/revoke"}
WITHOUT_FOLDER |= {"/storages/{type}/status", "/storages/{type}/status/{agent}", "/storages/{type}/events"}
HEALTH = {"/livez", "/readyz", "/health"}


async def test_the_tables_above_name_every_route(stand: ProxyStand) -> None:
    manager, client, internal = (listener.app for listener in stand.proxy.listeners)
    routes = {route.resource.canonical for route in manager.router.routes() if route.resource is not None}
    assert routes == {route for _, route, _ in FOLDERS} | WITHOUT_FOLDER | HEALTH
    for app in (manager, client, internal):
        check_policies(app)
    open_routes = {_name(route) for route in manager.router.routes() if policy_of(route.handler).scope is None}  # type: ignore[union-attr]
    assert open_routes == {"/", "/status"} | HEALTH
    open_routes = {_name(route) for route in client.router.routes() if policy_of(route.handler).scope is None}  # type: ignore[union-attr]
    assert open_routes == {"/", "/upload", "/upload/presigned", "/upload/complete"}  # the latter by OPTIONS only


def _name(route: web.AbstractRoute) -> str:
    return route.resource.canonical if route.resource is not None else ""


async def test_hostile_paths(stand: ProxyStand) -> None:
    vfid = await stand.folder()
    for method, route, field, more in PATHS:
        for path in HOSTILE_PATHS:
            value = [path] if field == "relpaths" else path
            answer = await stand.call(method, route, {"volume": "minio", "vfid": vfid, field: value, **more})
            assert answer.status == 400, (route, field, path, answer.status)
            assert answer.headers["Content-Type"].startswith("application/problem+json")
    page = await stand.s3.list_page(stand.bucket)
    assert [info.key for info in page.objects] == [stand.prefix(vfid)]


async def test_hostile_folder_ids(stand: ProxyStand) -> None:
    for method, route, more in FOLDERS:
        for vfid in HOSTILE_VFIDS:
            answer = await stand.call(method, route, {"volume": "minio", "vfid": vfid, **more})
            assert answer.status == 400, (route, vfid, answer.status, answer.body)
    assert (await stand.s3.list_page(stand.bucket)).objects == []


async def test_every_guarded_route_wants_the_secret(stand: ProxyStand) -> None:
    for method, route, more in FOLDERS:
        answer = await stand.call(method, route, {"volume": "minio", "vfid": stand.vfid(), **more}, secret="x" * 32)
        assert answer.status == 403, route


async def test_percent_signs_are_ordinary_characters(stand: ProxyStand) -> None:
    vfid = await stand.folder()
    await stand.put(vfid, "%2e%2e/%2fx", b"literal")
    assert await stand.names(vfid) == ["%2e%2e"]
    assert await stand.get(vfid, "%2e%2e/%2fx") == b"literal"
    assert (await stand.s3.head(stand.bucket, f"{stand.prefix(vfid)}%2e%2e/%2fx")).size == 7


async def test_hostile_volumes_and_references(stand: ProxyStand) -> None:
    for volume in ("", "..", "a/b", "x" * 65, None, "nowhere"):
        for method, route, more in (*FOLDERS, ("GET", "/volume/hwinfo", {}), ("GET", "/folder/fs-usage", {})):
            answer = await stand.call(method, route, {"volume": volume, "vfid": stand.vfid(), **more})
            assert answer.status == 400, (route, volume)
    for ref in ("", "x", "../x", "0" * 32 + "/../x", "0" * 32 + "/a\nb", "0" * 300):
        body = {"volume": "minio", "revoke_ref": ref}
        assert (await stand.call("POST", "/folder/mount-credential/revoke", body)).status == 400, ref
