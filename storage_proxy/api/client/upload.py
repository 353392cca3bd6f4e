"""/upload: resumable uploads (tus 1.0.0, core protocol with a checksum), and uploads straight to the object store."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import AsyncIterator

from aiohttp import web
from pydantic import Field

from ...core.errors import InvalidRequest
from ...web import json_answer, public, read_json, read_query, require
from ..fields import PathField, RequestModel
from ..services import SERVICES
from ..tokens import UploadClaims, claims_of
from .download import refuse_directory

routes = web.RouteTableDef()

TUS = {"Tus-Resumable": "1.0.0"}


class UploadQuery(RequestModel):
    dst_dir: PathField | None = None


class FinishedPart(RequestModel):
    number: int = Field(ge=1, le=10_000)
    etag: str = Field(max_length=128)


class CompleteRequest(RequestModel):
    parts: list[FinishedPart] = Field(default_factory=list, max_length=10_000)


def _session(request: web.Request) -> UploadClaims:
    refuse_directory(read_query(request, UploadQuery).dst_dir)
    return claims_of(request, UploadClaims)


@routes.options("/upload")
@public
async def options(request: web.Request) -> web.Response:
    return web.Response(
        headers={
            **TUS,
            "Tus-Version": "1.0.0",
            "Tus-Max-Size": str(request.app[SERVICES].uploads.max_size),
            "Tus-Checksum-Algorithm": "sha256",
        }
    )


@routes.options("/upload/presigned")
@routes.options("/upload/complete")
@public
async def preflight(_: web.Request) -> web.Response:
    return web.Response(status=204)


@routes.head("/upload")
@require("upload")
async def status(request: web.Request) -> web.Response:
    found = await request.app[SERVICES].uploads.status(_session(request).session)
    return web.Response(
        headers={
            **TUS,
            "Cache-Control": "no-store",
            "Upload-Length": str(found.size),
            "Upload-Offset": str(found.offset),
        }
    )


@routes.patch("/upload")
@require("upload")
async def append(request: web.Request) -> web.Response:
    claims = _session(request)
    text = request.headers.get("Upload-Offset", "")
    if not re.fullmatch(r"\d{1,19}", text):
        raise InvalidRequest("The request has no Upload-Offset.", detail={"Upload-Offset": "must be a number"})
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise InvalidRequest("Encoded bodies are not taken.", detail={"Content-Encoding": "must be identity"})
    announced, checksum = _checksum(request.headers.get("Upload-Checksum"))
    offset = await request.app[SERVICES].uploads.append(
        claims.session,
        int(text),
        _body(request),
        length=request.content_length,
        checksum=checksum,
        announced=announced,
    )
    return web.Response(status=204, headers={**TUS, "Upload-Offset": str(offset)})


async def _body(request: web.Request) -> AsyncIterator[bytes]:
    received = request.app[SERVICES].metrics.received
    async for chunk in request.content.iter_any():
        received.inc(len(chunk))
        yield chunk


def _checksum(header: str | None) -> tuple[bool, bytes | None]:
    """(announced, SHA-256 of the whole file if given). `sha256` alone says that the sum comes with the last request."""
    if header is None:
        return False, None
    name, _, text = header.strip().partition(" ")
    try:
        value = base64.b64decode(text.strip(), validate=True) if text else None
    except binascii.Error:
        value = b""
    if name.lower() != "sha256" or (value is not None and len(value) != 32):
        raise InvalidRequest(
            "The Upload-Checksum is not a SHA-256.",
            hint="Write: sha256 and the sum of the whole file in base64.",
            detail={"Upload-Checksum": "must be sha256 and 32 bytes in base64"},
        )
    return True, value


@routes.post("/upload/presigned")
@require("upload")
async def presign(request: web.Request) -> web.Response:
    plan = await request.app[SERVICES].uploads.presign(_session(request).session)
    return json_answer(
        {
            "part_size": plan.part_size,
            "parts": [{"number": part.number, "url": part.url, "size": part.size} for part in plan.parts],
            "expires_at": plan.expires_at.isoformat(),
        }
    )


@routes.post("/upload/complete")
@require("upload")
async def complete(request: web.Request) -> web.Response:
    claims = _session(request)
    body = await read_json(request, CompleteRequest)
    await request.app[SERVICES].uploads.complete(claims.session, {part.number: part.etag for part in body.parts})
    return web.Response(status=204)
