"""Folders as a whole: create, bind, delete, where they are, how much they hold."""

from __future__ import annotations

import uuid

from aiohttp import web

from ...client.proxy import BindingOptions
from ...core.paths import RelPath
from ...core.wire import Location
from ...volumes import Binding, Usage
from ...web import json_answer, read_json, require
from ..fields import FolderRequest, PathField, RequestModel, VolumeRequest
from ..services import SERVICES

routes = web.RouteTableDef()


class CreateOptions(RequestModel):
    binding: BindingOptions | None = None


class CreateRequest(FolderRequest):
    mode: int | None = None  # accepted as Backend.AI sends it; S3 has no mode for a prefix
    options: CreateOptions | None = None


class MountRequest(FolderRequest):
    subpath: PathField = RelPath("")


@routes.post("/folder/create")
@require("manager")
async def create(request: web.Request) -> web.Response:
    body = await read_json(request, CreateRequest)
    volume = request.app[SERVICES].volumes.get(body.volume)
    options = body.options.binding if body.options else None
    if options is None:
        await volume.create(body.vfid)
        return web.Response(status=204)
    location = Location(
        endpoint=options.endpoint or volume.endpoint.url,
        region=options.region or volume.endpoint.region,
        path_style=volume.endpoint.path_style,
        bucket=options.bucket,
        prefix=options.prefix,
    )
    await volume.bind(body.vfid, Binding(location, options.credential, options.read_only))
    return web.Response(status=204)


@routes.post("/folder/delete")
@require("manager")
async def delete(request: web.Request) -> web.Response:
    """All done when it answers; the task id is there because Backend.AI's manager reads one."""
    body = await read_json(request, FolderRequest)
    services = request.app[SERVICES]
    volume = services.volumes.get(body.volume)
    await services.uploads.drop_folder(volume, body.vfid)
    await services.credentials.revoke_folder(volume, body.vfid)
    await volume.delete(body.vfid)
    return json_answer({"bgtask_id": str(uuid.uuid4())}, status=202)


@routes.get("/folder/mount")
@require("manager")
async def mount(request: web.Request) -> web.Response:
    body = await read_json(request, MountRequest)
    volume = request.app[SERVICES].volumes.get(body.volume)
    folder = await volume.folder(body.vfid)
    return json_answer(
        {
            "path": volume.mount_path(body.vfid),
            "location": folder.location.model_dump(mode="json"),
            "read_only": folder.read_only,
        }
    )


@routes.get("/folder/usage")
@require("manager")
async def usage(request: web.Request) -> web.Response:
    body = await read_json(request, FolderRequest)
    found = await request.app[SERVICES].volumes.get(body.volume).usage(body.vfid)
    return json_answer({"file_count": found.file_count, **_figures(found)})


@routes.get("/folder/used-bytes")
@require("manager")
async def used_bytes(request: web.Request) -> web.Response:
    body = await read_json(request, FolderRequest)
    return json_answer(_figures(await request.app[SERVICES].volumes.get(body.volume).usage(body.vfid)))


@routes.get("/folder/fs-usage")
@require("manager")
async def fs_usage(request: web.Request) -> web.Response:
    volume = request.app[SERVICES].volumes.get((await read_json(request, VolumeRequest)).volume)
    return json_answer({"capacity_bytes": volume.capacity, **_figures(await volume.volume_usage())})


def _figures(usage: Usage) -> dict[str, object]:
    return {
        "used_bytes": usage.used_bytes,
        "as_of": usage.as_of.isoformat(),
        "error_bound_bytes": usage.error_bound_bytes,
    }
