"""Wires the storage proxy: settings in, listening process out."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from .api.client import client_app
from .api.internal import internal_app
from .api.manager import manager_app
from .api.metrics import ProxyMetrics
from .api.services import AUDIENCE, Services
from .config import ClientApiSection, ManagerApiSection, ProxyConfig, RedisSection
from .core import logs
from .core.crypto import Keyring
from .core.errors import ConfigError, MooringError
from .core.tokens import SigningKey, TokenSigner
from .db import Database
from .s3 import S3Pool
from .state import upgrade_state
from .volumes import VolumeRegistry
from .volumes.credentials import MountCredentials
from .volumes.uploads import UploadService
from .web import HealthCheck, Listener, Server

if TYPE_CHECKING:
    from .cluster.storages import Storages

log = logs.get_logger(__name__)

SWEEP_SECONDS = 60.0
STOP_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Proxy:
    """A wired proxy that does not listen yet."""

    services: Services
    database: Database
    listeners: list[Listener]


async def serve(config: ProxyConfig) -> None:
    """Serves until SIGTERM or SIGINT. A setting, database or volume that is wrong is raised at once: operators want it
    loud. What fails later is answered per request."""
    logs.configure(component="storage-proxy", level=config.storage_proxy.log_level)
    async with open_proxy(config) as proxy:
        await Server(proxy.listeners).run_until_signal()


@asynccontextmanager
async def open_proxy(config: ProxyConfig) -> AsyncIterator[Proxy]:
    """Opens the database (migrated), the volumes (each looked at once), and starts the sweeper; closes all at the
    end."""
    section = config.storage_proxy
    signer = TokenSigner(AUDIENCE, [SigningKey.hs256(section.token_secret())])
    secrets = tuple(config.manager_api.all_secrets())
    tls = [_tls(config.manager_api), _tls(config.client_api)]
    section.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    keyring = Keyring.load_or_create(config.key_file)
    async with AsyncExitStack() as stack:
        database = Database(config.database_url)
        stack.push_async_callback(database.close)
        await upgrade_state(database)
        pool = await stack.enter_async_context(S3Pool())
        volumes = VolumeRegistry.from_config(config.volume, pool=pool, database=database, keyring=keyring)
        await volumes.prepare()
        uploads = UploadService(
            volumes,
            database,
            memory=section.upload_memory,
            max_size=section.max_upload_size,
            expire=timedelta(seconds=section.upload_expire),
            presigned_expire=timedelta(seconds=section.presigned_upload_expire),
            node_id=section.node_id,
        )
        await uploads.start()
        credentials = MountCredentials(
            volumes, database, keyring, lifetime=timedelta(seconds=section.mount_credential_lifetime)
        )
        stack.push_async_callback(credentials.close)
        storages = None
        if config.redis is not None:
            storages = _open_storages(config.redis, volumes)
            stack.push_async_callback(storages.close)
        services = Services(
            volumes=volumes,
            uploads=uploads,
            credentials=credentials,
            signer=signer,
            manager_secrets=secrets,
            token_lifetime=config.session_lifetime,
            presigned_download=timedelta(seconds=section.presigned_download_expire),
            metrics=ProxyMetrics(uploads),
            storages=storages,
        )
        checks = [HealthCheck("database", "sql", database.check)]
        checks += [HealthCheck("volume", str(volume.name), volume.check) for volume in volumes]
        if storages is not None:
            checks.append(HealthCheck("cache", "redis", storages.check, critical=False))
        api = config.manager_api, config.client_api, config.internal_api
        listeners = [
            Listener(manager_app(services, checks), "manager API", api[0].host, api[0].port, tls=tls[0]),
            Listener(client_app(services), "client API", api[1].host, api[1].port, tls=tls[1]),
            Listener(internal_app(services, checks), "internal API", api[2].host, api[2].port),
        ]
        stopping = asyncio.Event()
        sweeper = asyncio.create_task(_sweep([uploads.sweep, credentials.sweep], stopping), name="sweeper")
        stack.push_async_callback(_stop, sweeper, stopping)
        yield Proxy(services, database, listeners)


async def _sweep(works: list[Callable[[], Awaitable[int]]], stopping: asyncio.Event) -> None:
    """Cleans up at start and once a minute; nothing that fails here stops it."""
    while not stopping.is_set():
        for work in works:
            try:
                await work()
            except MooringError as err:
                log.warning("cleaning up was not possible", error=str(err))
            except Exception:
                log.exception("cleaning up failed")
        with suppress(TimeoutError):
            async with asyncio.timeout(SWEEP_SECONDS):
                await stopping.wait()


async def _stop(task: asyncio.Task[None], stopping: asyncio.Event) -> None:
    """Between two works if it can be; in the middle of one its database would complain."""
    stopping.set()
    await asyncio.wait([task], timeout=STOP_SECONDS)
    task.cancel()
    await asyncio.wait([task])


def _tls(section: ManagerApiSection | ClientApiSection) -> ssl.SSLContext | None:
    if section.tls_cert is None or section.tls_key is None:
        return None
    section.check_tls_key()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(section.tls_cert, section.tls_key)
    except (OSError, ssl.SSLError) as err:
        raise ConfigError(f"The TLS certificate {section.tls_cert} or its key cannot be used: {err}.") from None
    return context


def _open_storages(section: RedisSection, volumes: VolumeRegistry) -> Storages:
    from .cluster.storages import Storages  # only when it is configured: redis-py costs 6 MiB

    return Storages(section.url, volumes)
