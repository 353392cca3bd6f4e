"""Wires the manager extension; nothing else does."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path

from storage_proxy.client.proxy import ProxyClient
from storage_proxy.core import logs
from storage_proxy.core.errors import ConfigError
from storage_proxy.core.secrets import check_private, read_or_create, read_secret
from storage_proxy.core.tokens import SigningKey, TokenSigner
from storage_proxy.db import Database, upgrade
from storage_proxy.web import HealthCheck, Listener, Server

from .api import AUDIENCE, Services, TokenAuth, build_app
from .config import ManagerConfig
from .janitor import run_janitor
from .models import VERSION_TABLE
from .services import Agents, Credentials, Folders, KeyFile, NodeFolders, Proxies, Sessions, StorageProxy

MIGRATIONS = Path(__file__).parent / "migrations"
# Grants name their agent (`agent:<id>`); this audience is only the default of the signer.
GRANT_AUDIENCE = "mooring-agents"


def make_state_dir(path: Path) -> None:
    """Makes the state directory if it is missing. Raises `ConfigError` if this user cannot write there."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as err:
        raise ConfigError(
            f"State directory {path} cannot be made: {err.strerror}.", hint="Choose another in [manager] state-dir."
        ) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"State directory {path} is not writable by this user.", hint="Check its owner and mode.")


def api_signer(config: ManagerConfig) -> TokenSigner:
    """Signs and verifies API tokens; makes the secret file on first use."""
    make_state_dir(config.manager.state_dir)
    return TokenSigner(AUDIENCE, [SigningKey.hs256(read_or_create(config.api_secret_file))])


def build_services(
    config: ManagerConfig, db: Database, proxies: Proxies, keys: KeyFile, grant_signer: TokenSigner
) -> Services:
    credentials = Credentials(db, keys)
    folders = Folders(db, credentials, proxies, allowed_endpoints=config.binding.allowed_endpoints)
    agents = Agents(db)
    sessions = Sessions(
        db,
        folders=folders,
        credentials=credentials,
        agents=agents,
        proxies=proxies,
        signer=grant_signer,
        grant_lifetime=timedelta(seconds=config.grants.lifetime),
    )
    node_folders = NodeFolders(db, agents=agents, proxies=proxies, sessions=sessions, permitted=config.node_wide)
    return Services(
        folders=folders, credentials=credentials, agents=agents, sessions=sessions, node_folders=node_folders
    )


def _tls(config: ManagerConfig) -> ssl.SSLContext | None:
    cert, key = config.api.tls_cert, config.api.tls_key
    if cert is None or key is None:
        return None
    check_private(key)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as err:
        raise ConfigError(f"The TLS certificate {cert} or its key cannot be used: {err}.") from None
    return context


def _answers(client: ProxyClient) -> Callable[[], Awaitable[None]]:
    async def check() -> None:
        await client.status()

    return check


async def serve(config: ManagerConfig) -> None:
    """Serves until SIGTERM or SIGINT. Makes missing keys, brings the database up to date."""
    logs.configure(component="manager-ext", level=config.manager.log_level)
    auth = TokenAuth(api_signer(config))
    grant_signer = TokenSigner(GRANT_AUDIENCE, [SigningKey.ed25519_load_or_create(config.grant_key_file)])
    keys = KeyFile(config.key_file, create=True)
    async with AsyncExitStack() as stack:
        db = Database(config.database_url)
        stack.push_async_callback(db.close)
        await upgrade(db, MIGRATIONS, VERSION_TABLE)
        checks = [HealthCheck("database", "sql", db.check)]
        entries = {}
        for name, entry in config.proxy.items():
            client = await stack.enter_async_context(ProxyClient(entry.manager_url, read_secret(entry.secret_file)))
            entries[name] = StorageProxy(name, client, entry.client_url)
            checks.append(HealthCheck("storage-proxy", name, _answers(client), critical=False))
        services = build_services(config, db, Proxies(entries), keys, grant_signer)
        app = build_app(services, auth, checks)
        listener = Listener(app, "manager API", host=config.api.host, port=config.api.port, tls=_tls(config))
        server = Server([listener])
        async with asyncio.TaskGroup() as group:
            janitor = group.create_task(run_janitor(services))
            await server.run_until_signal()
            janitor.cancel()
