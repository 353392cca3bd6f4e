"""Files inside a folder, and the tokens with which clients move their content."""

from __future__ import annotations

from typing import Annotated

from aiohttp import web
from pydantic import BeforeValidator, Field

from ...core.errors import MooringError, Unsupported
from ...core.paths import RelPath
from ...volumes import Entry
from ...web import json_answer, read_json, require
from ..fields import FilePathField, FolderRequest, PathField
from ..services import SERVICES
from ..streaming import stream_file
from ..tokens import issue_download, issue_upload

routes = web.RouteTableDef()

PathList = Annotated[
    list[PathField],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]


class MkdirRequest(FolderRequest):
    relpath: PathList = Field(min_length=1, max_length=50)
    parents: bool = True
    exist_ok: bool = False


class ListRequest(FolderRequest):
    relpath: PathField = RelPath("")
    cursor: str | None = Field(default=None, max_length=8192)
    limit: int = Field(default=1000, ge=1, le=1000)


class RenameRequest(FolderRequest):
    relpath: PathField
    new_name: str


class MoveRequest(FolderRequest):
    src_relpath: PathField
    dst_relpath: PathField


class DeleteRequest(FolderRequest):
    relpaths: list[PathField] = Field(max_length=10_000)
    recursive: bool = False


class FileRequest(FolderRequest):
    relpath: FilePathField


class DownloadRequest(FileRequest):
    archive: bool = False
    unmanaged_path: str | None = None


class UploadRequest(FileRequest):
    size: int = Field(ge=0)


@routes.post("/folder/file/mkdir")
@require("manager")
async def mkdir(request: web.Request) -> web.Response:
    """200 if all were made, 207 if some, 422 if none; each path with its own result."""
    body = await read_json(request, MkdirRequest)
    tree = await request.app[SERVICES].volumes.get(body.volume).tree(body.vfid, write=True)
    success: list[object] = []
    failed: list[object] = []
    for path in body.relpath:
        try:
            await tree.mkdir(path, parents=body.parents, exist_ok=body.exist_ok)
            success.append({"msg": None, "item": str(path)})
        except MooringError as err:
            if err.temporary:
                raise
            failed.append({"msg": str(err), "item": str(path), "error_code": err.code})
    status = 200 if not failed else 207 if success else 422
    return json_answer({"results": {"success": success, "failed": failed}}, status=status)


@routes.post("/folder/file/list")
@require("manager")
async def list_files(request: web.Request) -> web.Response:
    body = await read_json(request, ListRequest)
    tree = await request.app[SERVICES].volumes.get(body.volume).tree(body.vfid)
    page = await tree.list_dir(body.relpath, cursor=body.cursor, limit=body.limit)
    return json_answer(
        {"items": [_item(entry) for entry in page.entries], "next_cursor": page.cursor, "skipped": page.skipped}
    )


def _item(entry: Entry) -> dict[str, object]:
    modified = entry.modified.isoformat()
    stat = {"mode": entry.mode, "size": entry.size, "created": modified, "modified": modified}
    return {"name": entry.name, "type": entry.type.value, "stat": stat, "symlink_target": ""}


@routes.post("/folder/file/rename")
@require("manager")
async def rename(request: web.Request) -> web.Response:
    body = await read_json(request, RenameRequest)
    target = body.relpath.parent.child(body.new_name)
    tree = await request.app[SERVICES].volumes.get(body.volume).tree(body.vfid, write=True)
    await tree.move(body.relpath, target, into=False)
    return web.Response(status=204)


@routes.post("/folder/file/move")
@require("manager")
async def move(request: web.Request) -> web.Response:
    body = await read_json(request, MoveRequest)
    tree = await request.app[SERVICES].volumes.get(body.volume).tree(body.vfid, write=True)
    await tree.move(body.src_relpath, body.dst_relpath)
    return web.Response(status=204)


@routes.post("/folder/file/delete")
@require("manager")
async def delete(request: web.Request) -> web.Response:
    body = await read_json(request, DeleteRequest)
    tree = await request.app[SERVICES].volumes.get(body.volume).tree(body.vfid, write=True)
    await tree.remove(body.relpaths, recursive=body.recursive)
    return json_answer({"status": "ok"})


@routes.post("/folder/file/fetch")
@require("manager")
async def fetch(request: web.Request) -> web.StreamResponse:
    body = await read_json(request, FileRequest)
    tree = await request.app[SERVICES].volumes.get(body.volume).tree(body.vfid)
    info = await tree.open_file(body.relpath)
    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(info.size)}
    return await stream_file(request, tree, info, status=200, headers=headers, start=0, length=info.size)


@routes.post("/folder/file/download")
@require("manager")
async def download(request: web.Request) -> web.Response:
    body = await read_json(request, DownloadRequest)
    if body.archive or body.unmanaged_path is not None:
        raise Unsupported("Only single files are downloaded.", hint="Leave out archive and unmanaged_path.")
    services = request.app[SERVICES]
    volume = services.volumes.get(body.volume)
    return json_answer({"token": issue_download(services, volume.name, body.vfid, body.relpath)})


@routes.post("/folder/file/upload")
@require("manager")
async def upload(request: web.Request) -> web.Response:
    body = await read_json(request, UploadRequest)
    services = request.app[SERVICES]
    volume = services.volumes.get(body.volume)
    session = await services.uploads.begin(volume, body.vfid, body.relpath, body.size)
    token = issue_upload(services, volume.name, body.vfid, body.relpath, body.size, session)
    return json_answer({"token": token})
