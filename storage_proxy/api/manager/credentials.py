"""Credentials for the mounts of a session: limited to one folder, sealed to one agent."""

from __future__ import annotations

from aiohttp import web
from pydantic import Field

from ...core.ids import AccessMode
from ...core.wire import SessionText
from ...web import json_answer, read_json, require
from ..fields import FolderRequest, VolumeRequest
from ..services import SERVICES

routes = web.RouteTableDef()


class IssueRequest(FolderRequest):
    mode: AccessMode
    recipient_key: str = Field(min_length=40, max_length=64)
    session_id: SessionText


class RevokeRequest(VolumeRequest):
    revoke_ref: str = Field(min_length=1, max_length=256)


@routes.post("/folder/mount-credential")
@require("manager")
async def issue(request: web.Request) -> web.Response:
    body = await read_json(request, IssueRequest)
    services = request.app[SERVICES]
    volume = services.volumes.get(body.volume)
    issued = await services.credentials.issue(
        volume, body.vfid, body.mode, recipient_key=body.recipient_key, session_id=body.session_id
    )
    return json_answer(
        {
            "location": issued.location.model_dump(mode="json"),
            "read_only": issued.read_only,
            "credential_id": issued.credential_id,
            "revoke_ref": issued.revoke_ref,
            "method": issued.method,
            "expires_at": issued.expires_at.isoformat(),
            "sealed_credential": issued.sealed,
        }
    )


@routes.post("/folder/mount-credential/revoke")
@require("manager")
async def revoke(request: web.Request) -> web.Response:
    body = await read_json(request, RevokeRequest)
    services = request.app[SERVICES]
    await services.credentials.release(services.volumes.get(body.volume), body.revoke_ref)
    return web.Response(status=204)
