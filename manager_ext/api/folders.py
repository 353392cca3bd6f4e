"""Routes of folders and their files."""

from __future__ import annotations

from aiohttp import web

from storage_proxy.client.manager import (
    BindFolderRequest,
    CreateFolderRequest,
    DeleteFilesRequest,
    DownloadRequest,
    FilesQuery,
    MkdirRequest,
    PageQuery,
    UploadRequest,
)
from storage_proxy.web import json_answer, read_json, read_query, require

from ..services import Folders
from .auth import caller


class FolderHandlers:
    """Each parses, calls one use case, renders."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders

    def routes(self) -> list[web.RouteDef]:
        one = "/v1/folders/{folder}"
        return [
            web.post("/v1/folders", self.create),
            web.post("/v1/folders/bind", self.bind),
            web.get("/v1/folders", self.page),
            web.get(one, self.get),
            web.delete(one, self.delete),
            web.get(f"{one}/files", self.files),
            web.post(f"{one}/files/mkdir", self.mkdir),
            web.post(f"{one}/files/delete", self.delete_files),
            web.get(f"{one}/usage", self.usage),
            web.post(f"{one}/request-upload", self.request_upload),
            web.post(f"{one}/request-download", self.request_download),
        ]

    @require("user")
    async def create(self, request: web.Request) -> web.Response:
        body = await read_json(request, CreateFolderRequest)
        return json_answer(await self._folders.create(caller(request), body), status=201)

    @require("user")
    async def bind(self, request: web.Request) -> web.Response:
        body = await read_json(request, BindFolderRequest)
        return json_answer(await self._folders.bind(caller(request), body), status=201)

    @require("user")
    async def page(self, request: web.Request) -> web.Response:
        return json_answer(await self._folders.page(caller(request), read_query(request, PageQuery)))

    @require("user")
    async def get(self, request: web.Request) -> web.Response:
        return json_answer(await self._folders.get(caller(request), request.match_info["folder"]))

    @require("user")
    async def delete(self, request: web.Request) -> web.Response:
        await self._folders.delete(caller(request), request.match_info["folder"])
        return web.Response(status=204)

    @require("user")
    async def files(self, request: web.Request) -> web.Response:
        query = read_query(request, FilesQuery)
        return json_answer(await self._folders.files(caller(request), request.match_info["folder"], query))

    @require("user")
    async def mkdir(self, request: web.Request) -> web.Response:
        body = await read_json(request, MkdirRequest)
        await self._folders.mkdir(caller(request), request.match_info["folder"], body)
        return web.Response(status=204)

    @require("user")
    async def delete_files(self, request: web.Request) -> web.Response:
        body = await read_json(request, DeleteFilesRequest)
        await self._folders.delete_files(caller(request), request.match_info["folder"], body)
        return web.Response(status=204)

    @require("user")
    async def usage(self, request: web.Request) -> web.Response:
        return json_answer(await self._folders.usage(caller(request), request.match_info["folder"]))

    @require("user")
    async def request_upload(self, request: web.Request) -> web.Response:
        body = await read_json(request, UploadRequest)
        return json_answer(await self._folders.request_upload(caller(request), request.match_info["folder"], body))

    @require("user")
    async def request_download(self, request: web.Request) -> web.Response:
        body = await read_json(request, DownloadRequest)
        return json_answer(await self._folders.request_download(caller(request), request.match_info["folder"], body))
