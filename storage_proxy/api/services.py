"""What the handlers work with; `main` fills it once."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from aiohttp import web

from ..core.secrets import Secret
from ..core.tokens import TokenSigner
from ..volumes import VolumeRegistry
from ..volumes.credentials import MountCredentials
from ..volumes.uploads import UploadService
from .metrics import ProxyMetrics

if TYPE_CHECKING:
    from ..cluster.storages import Storages

AUDIENCE = "mooring-client"


@dataclass(frozen=True, slots=True)
class Services:
    """The use cases and settings behind the routes. `storages` is None without Redis."""

    volumes: VolumeRegistry
    uploads: UploadService
    credentials: MountCredentials
    signer: TokenSigner
    manager_secrets: tuple[Secret, ...]
    token_lifetime: timedelta
    presigned_download: timedelta
    metrics: ProxyMetrics
    storages: Storages | None = None


SERVICES: web.AppKey[Services] = web.AppKey("services", Services)
