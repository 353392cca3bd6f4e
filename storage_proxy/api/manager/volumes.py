"""Status of the proxy, and what it knows of its volumes."""

from __future__ import annotations

import asyncio

from aiohttp import web

from ... import __version__
from ...core.errors import MooringError, S3Unavailable
from ...volumes import MinioVolume
from ...web import json_answer, public, read_json, require
from ..fields import VolumeRequest
from ..services import SERVICES

routes = web.RouteTableDef()

CHECK_SECONDS = 10.0


@routes.get("/")
@routes.get("/status")
@public
async def status(_: web.Request) -> web.Response:
    return json_answer({"status": "ok", "type": "manager-facing", "storage-proxy": __version__})


@routes.get("/volumes")
@require("manager")
async def list_volumes(request: web.Request) -> web.Response:
    return json_answer({"volumes": [_volume(volume) for volume in request.app[SERVICES].volumes]})


def _volume(volume: MinioVolume) -> dict[str, object]:
    return {
        "name": volume.name,
        "backend": volume.backend,
        "path": volume.path,
        "fsprefix": ".",
        "capabilities": sorted(volume.capabilities),
        "endpoint": volume.endpoint.url,
    }


@routes.get("/volume/hwinfo")
@require("manager")
async def hwinfo(request: web.Request) -> web.Response:
    volume = request.app[SERVICES].volumes.get((await read_json(request, VolumeRequest)).volume)
    state, info = "healthy", None
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await volume.check()
    except TimeoutError:
        state, info = "offline", f"No answer within {CHECK_SECONDS:g} s."
    except S3Unavailable as err:
        state, info = "offline", err.message
    except MooringError as err:
        state, info = "unavailable", err.message
    metadata = {"endpoint": volume.endpoint.url, "bucket": volume.bucket, "flavor": volume.section.flavor.value}
    return json_answer({"status": state, "status_info": info, "metadata": metadata})
