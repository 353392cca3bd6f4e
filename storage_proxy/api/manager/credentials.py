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
    """`credential_id`: the one that the session has already and that is to be renewed."""

    mode: AccessMode
    recipient_key: str = Field(min_length=40, max_length=64)
    session_id: SessionText
    credential_id: str | None = Field(default=None, pattern=r"^[0-9a-f]{32}$")


class RevokeRequest(VolumeRequest):
    revoke_ref: str = Field(min_length=1, max_length=256)


@routes.post("/folder/mount-credential")
@require("manager")
async def issue(request: web.Request) -> web.Response:
    body = await read_json(request, IssueRequest)
    services = request.app[SERVICES]
    volume = services.volumes.get(body.volume)
    if body.credential_id is None:
        issued = await services.credentials.issue(
            volume, body.vfid, body.mode, recipient_key=body.recipient_key, session_id=body.session_id
        )
    else:
        issued = await services.credentials.renew(
            volume,
            body.vfid,
            body.mode,
            recipient_key=body.recipient_key,
            session_id=body.session_id,
            credential_id=body.credential_id,
        )
    return json_answer(
        {
            "location": issued.location.model_dump(mode="json"),
            "read_only": issued.read_only,
            "credential_id": issued.credential_id,
            "revoke_ref": issued.revoke_ref,
            "method": issued.method,
            "expires_at": issued.expires_at.isoformat() if issued.expires_at else None,
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
