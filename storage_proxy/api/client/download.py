"""GET and HEAD /download: one file, whole or a range, through the proxy or by a link to the object store."""

from __future__ import annotations

import re
from datetime import datetime
from email.utils import format_datetime
from typing import Literal
from urllib.parse import quote

from aiohttp import web

from ...core.errors import InvalidRequest, RangeNotSatisfiable, Unsupported
from ...core.logs import request_id
from ...s3 import ObjectInfo
from ...web import read_query, require
from ...web.errors import problem_answer
from ..fields import PathField, RequestModel
from ..services import SERVICES
from ..streaming import stream_file
from ..tokens import DownloadClaims, claims_of

routes = web.RouteTableDef()


class DownloadQuery(RequestModel):
    dst_dir: PathField | None = None
    archive: bool = False
    no_cache: bool = False
    redirect: Literal["presigned"] | None = None


@routes.get("/download")
@require("download")
async def download(request: web.Request) -> web.StreamResponse:
    claims = claims_of(request, DownloadClaims)
    query = read_query(request, DownloadQuery)
    refuse_directory(query.dst_dir)
    if query.archive:
        raise Unsupported("Directories are not packed here.", hint="Download their files one by one.")
    services = request.app[SERVICES]
    tree = await services.volumes.get(claims.volume).tree(claims.vfid)
    info = await tree.open_file(claims.relpath)
    if query.redirect is not None:
        seconds = int(services.presigned_download.total_seconds())
        link = tree.folder.client.presign_get(
            tree.folder.ref.bucket, info.key, expires=seconds, filename=claims.relpath.name
        )
        return web.Response(status=302, headers={"Location": link, "Cache-Control": "no-store"})
    headers = {
        "Accept-Ranges": "bytes",
        "Cache-Control": "no-store" if query.no_cache else "private, no-cache",
        "Content-Disposition": content_disposition(claims.relpath.name),
        "Content-Type": "application/octet-stream",
        "ETag": f'"{info.etag}"',
    }
    if info.last_modified is not None:
        headers["Last-Modified"] = _http_date(info.last_modified)
    try:
        wanted = parse_range(request.headers.get("Range"), info.size) if _is_fresh(request, info) else None
    except RangeNotSatisfiable as err:
        answer = problem_answer(err, request_id.get() or "")
        answer.headers.update({"Content-Range": f"bytes */{info.size}", "ETag": f'"{info.etag}"'})
        return answer
    start, length = wanted or (0, info.size)
    headers["Content-Length"] = str(length)
    if wanted:
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{info.size}"
    status = 206 if wanted else 200
    return await stream_file(request, tree, info, status=status, headers=headers, start=start, length=length)


def refuse_directory(dst_dir: object) -> None:
    """`dst_dir` stands outside of the signed token and would let its holder reach other files than the one it is
    for."""
    if str(dst_dir or ".") != ".":
        raise InvalidRequest(
            "dst_dir is not supported.",
            hint="Ask for a token with the whole path of the file.",
            detail={"dst_dir": "not supported"},
        )


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """(start, length) of a single byte range; None for no range, several, or one that does not parse (RFC 9110, 14.2:
    the whole file is sent then). Raises `RangeNotSatisfiable`."""
    match = re.fullmatch(r"\s*bytes\s*=\s*(\d{0,19})\s*-\s*(\d{0,19})\s*", header or "", re.IGNORECASE)
    if not match or not (match[1] or match[2]):
        return None
    if match[1]:
        start = int(match[1])
        end = min(int(match[2]), size - 1) if match[2] else size - 1
        if match[2] and int(match[2]) < start:
            return None
    else:
        start, end = max(0, size - int(match[2])), size - 1
    if start > end:
        raise RangeNotSatisfiable(f"The file has {size} bytes.", detail={"size": size})
    return start, end - start + 1


def _is_fresh(request: web.Request, info: ObjectInfo) -> bool:
    """False if `If-Range` names another version, so that the whole file is sent."""
    condition = request.headers.get("If-Range")
    if condition is None:
        return True
    if condition.startswith(('"', "W/")):
        return condition == f'"{info.etag}"'
    return info.last_modified is not None and condition == _http_date(info.last_modified)


def _http_date(time: datetime) -> str:
    return format_datetime(time, usegmt=True)


def content_disposition(name: str) -> str:
    plain = re.sub(r'[^\x20-\x7e]|["\\%]', "_", name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
