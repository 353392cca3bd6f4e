"""The tokens that a manager gets for its clients: each is good for one file and one direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from aiohttp import web
from pydantic import Field

from ..core.config import parse_request
from ..core.errors import TokenInvalid
from ..core.ids import VFolderID
from ..core.paths import RelPath
from ..core.tokens import Purpose
from ..web import Principal, policy_of
from ..web.auth import PRINCIPAL
from .fields import FilePathField, FolderRequest
from .services import SERVICES, Services


class DownloadClaims(FolderRequest):
    relpath: FilePathField


class UploadClaims(FolderRequest):
    relpath: FilePathField
    size: int = Field(ge=0)
    session: str = Field(pattern=r"^[0-9a-f]{32}$")


C = TypeVar("C", DownloadClaims, UploadClaims)


def issue_download(services: Services, volume: str, vfid: VFolderID, path: RelPath) -> str:
    data = {"op": "download", "volume": volume, "vfid": str(vfid), "relpath": path.text}
    return services.signer.issue(Purpose.DOWNLOAD, str(vfid), services.token_lifetime, data)


def issue_upload(services: Services, volume: str, vfid: VFolderID, path: RelPath, size: int, session: str) -> str:
    data: Mapping[str, Any] = {  # Any: JSON
        "op": "upload",
        "volume": volume,
        "vfid": str(vfid),
        "relpath": path.text,
        "size": size,
        "session": session,
    }
    return services.signer.issue(Purpose.UPLOAD, str(vfid), services.token_lifetime, data)


async def authenticate(request: web.Request) -> Principal:
    """The holder of the token in the query; the route's scope is the purpose that the token must have."""
    policy = policy_of(request.match_info.handler)
    purpose = Purpose(policy.scope) if policy is not None and policy.scope else Purpose.DOWNLOAD
    token = request.query.get("token", "")
    if not token:
        raise TokenInvalid("The request has no token.", hint="Send it as ?token=...", detail={"token": "missing"})
    try:
        claims = request.app[SERVICES].signer.verify(token, purpose)
    except TokenInvalid as err:
        err.detail.setdefault("token", err.message)
        raise
    return Principal(f"client of {claims.subject}", frozenset({purpose.value}), claims.data)


def claims_of(request: web.Request, model: type[C]) -> C:
    """The claims of an authenticated request, guarded again as if they came from outside."""
    return parse_request(model, dict(request[PRINCIPAL].data))
