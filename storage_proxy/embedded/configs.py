"""The configuration files that `mooring up` writes for its daemons: ordinary ones, as an operator would, mode 0600."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import tomlkit

from ..core.secrets import Secret, write_private
from ..core.tokens import Purpose, SigningKey, TokenSigner
from ..core.wire import S3Credential
from ..s3 import Endpoint
from .ports import HOST, PortPlan
from .state import StateDirectory, disk_error

VOLUME = "minio"
PROXY_NAME = "local"
AGENT_ID = "local"
MANAGER_AUDIENCE = "mooring-manager"
# The stack renews its tokens at every start; this only has to outlast the longest run.
TOKEN_LIFETIME = timedelta(days=366)
GRACE_SECONDS = 45


@dataclass(frozen=True, slots=True)
class StackParts:
    """What the daemons are pointed at."""

    endpoint: Endpoint
    credential: S3Credential
    bucket: str
    embedded_s3: bool
    redis_url: Secret
    database_url: Secret | None = None
    allow_plain_http: bool = False


@dataclass(frozen=True, slots=True)
class Written:
    """The files, and the tokens that go into endpoints.json."""

    proxy: Path
    manager: Path
    agent: Path
    proxy_secret: Secret
    user_token: Secret
    admin_token: Secret
    user_id: str


def write_configs(state: StateDirectory, ports: PortPlan, parts: StackParts) -> Written:
    """Writes proxy.toml, manager.toml and agent.toml with the secrets they name. Raises `NoSpace`, `ConfigError`."""
    user_id = _user_id(state)
    signer = TokenSigner(MANAGER_AUDIENCE, [SigningKey.hs256(state.secret("manager-tokens"))])
    proxy_secret = state.secret("proxy-manager-api")
    state.secret("proxy-tokens")
    grant_key = state.secrets_dir / "grant-key.pem"
    agent_token = state.config_dir / "agent.token"
    credential = {
        "access_key": parts.credential.access_key,
        "secret_key": parts.credential.secret_key.reveal(),
    }
    try:
        SigningKey.ed25519_load_or_create(grant_key)
        write_private(agent_token, _token(signer, AGENT_ID, "agent").reveal().encode() + b"\n")
        write_private(state.config_dir / "s3-credential", "\n".join([*credential.values(), ""]).encode())
    except OSError as err:
        raise disk_error(err, f"Directory {state.secrets_dir}") from None
    database = parts.database_url.reveal() if parts.database_url else None
    return Written(
        proxy=_write(state, "proxy", _proxy(state, ports, parts, database)),
        manager=_write(state, "manager", _manager(state, ports, parts, database)),
        agent=_write(state, "agent", _agent(state, ports, parts, agent_token)),
        proxy_secret=proxy_secret,
        user_token=_token(signer, user_id, "user"),
        admin_token=_token(signer, user_id, "admin"),
        user_id=user_id,
    )


def _user_id(state: StateDirectory) -> str:
    """The one user of the stack, the same at every start."""
    path = state.data_dir / "user-id"
    try:
        if not path.exists():
            write_private(path, f"{uuid.uuid4()}\n".encode())
        return str(uuid.UUID(path.read_text(encoding="ascii").strip()))
    except OSError as err:
        raise disk_error(err, str(path)) from None


def _token(signer: TokenSigner, subject: str, role: str) -> Secret:
    return Secret(signer.issue(Purpose.API, subject, TOKEN_LIFETIME, {"role": role, "projects": []}))


def _write(state: StateDirectory, name: str, data: dict[str, Any]) -> Path:
    path = state.config_dir / f"{name}.toml"
    head = "# Written by `mooring up` at every start; changes are lost.\n\n"
    try:
        write_private(path, (head + tomlkit.dumps(data)).encode())
    except OSError as err:
        raise disk_error(err, str(path)) from None
    return path


def _proxy(state: StateDirectory, ports: PortPlan, parts: StackParts, database: str | None) -> dict[str, Any]:
    folder = state.data_dir / "proxy"
    volume: dict[str, Any] = {
        "backend": "minio",
        "endpoint": parts.endpoint.url,
        "region": parts.endpoint.region,
        "path-style": parts.endpoint.path_style,
        "bucket": parts.bucket,
        "flavor": "seaweedfs" if parts.embedded_s3 else "auto",
        "allow-plain-http": parts.allow_plain_http,
        # Somebody else's S3 server may have no way to make limited keys; ours has, and must use it.
        "allow-parent-credential": not parts.embedded_s3,
        "options": {"minio-credential-file": str(state.config_dir / "s3-credential")},
    }
    if parts.endpoint.ca_file is not None:
        volume["ca-file"] = str(parts.endpoint.ca_file)
    return {
        "storage-proxy": {
            "node-id": "local",
            "secret-file": str(state.secrets_dir / "proxy-tokens"),
            "state-dir": str(folder),
        },
        "client-api": {"host": HOST, "port": ports.client_api},
        "manager-api": {
            "host": HOST,
            "port": ports.manager_api,
            "secret-files": [str(state.secrets_dir / "proxy-manager-api")],
        },
        "internal-api": {"host": HOST, "port": ports.internal_api},
        "database": {
            "url": database or f"sqlite:///{folder / 'proxy.sqlite'}",
            "key-file": str(state.secrets_dir / "proxy-keys.json"),
        },
        "redis": {"url": parts.redis_url.reveal()},
        "volume": {VOLUME: volume},
    }


def _manager(state: StateDirectory, ports: PortPlan, parts: StackParts, database: str | None) -> dict[str, Any]:
    folder = state.data_dir / "manager"
    return {
        "manager": {"state-dir": str(folder)},
        "api": {
            "host": HOST,
            "port": ports.manager,
            "secret-file": str(state.secrets_dir / "manager-tokens"),
        },
        "database": {
            "url": database or f"sqlite:///{folder / 'manager.sqlite'}",
            "key-file": str(state.secrets_dir / "manager-keys.json"),
        },
        "proxy": {
            PROXY_NAME: {
                "manager-url": f"http://{HOST}:{ports.manager_api}",
                "client-url": f"http://{HOST}:{ports.client_api}",
                "secret-file": str(state.secrets_dir / "proxy-manager-api"),
            }
        },
        "grants": {"key-file": str(state.secrets_dir / "grant-key.pem")},
    }


def _agent(state: StateDirectory, ports: PortPlan, parts: StackParts, token_file: Path) -> dict[str, Any]:
    return {
        "agent": {
            "id": AGENT_ID,
            "state-dir": str(state.data_dir / "agent"),
            "runtime-dir": str(state.agent_runtime_dir),
            "grace-period": GRACE_SECONDS,
            "stop-mounts-on-exit": True,
            "allowed-uids": [os.geteuid()],
        },
        "grants": {"public-key-files": [str(state.secrets_dir / "grant-key.pub")]},
        "manager": {"url": f"http://{HOST}:{ports.manager}", "token-file": str(token_file)},
        "redis": {"url": parts.redis_url.reveal()},
    }
