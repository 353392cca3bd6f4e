"""`endpoints.json`: how the command line and other tools find the running stack. Mode 0600, only while it runs."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ..core.config import describe
from ..core.errors import ConfigError, ServiceUnavailable
from ..core.secrets import Secret, check_private, write_private
from .state import StateDirectory, disk_error

FORMAT_VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class S3Endpoint(_Part):
    """The object store of the stack, with a key that may do everything there."""

    url: str
    region: str = "us-east-1"
    bucket: str
    access_key: str
    secret_key: Secret
    embedded: bool


class ProxyEndpoint(_Part):
    manager_url: str
    client_url: str
    internal_url: str
    secret: Secret


class ManagerEndpoint(_Part):
    """`token` acts for the stack's one user; `admin_token` for its administrator."""

    url: str
    token: Secret
    admin_token: Secret


class AgentEndpoint(_Part):
    id: str
    socket: Path


class Endpoints(_Part):
    """What runs where. Secrets print masked; `save` is the only place that writes them out."""

    version: int = FORMAT_VERSION
    pid: int
    started_at: datetime
    state: Path
    s3: S3Endpoint
    redis_url: Secret
    proxy: ProxyEndpoint
    manager: ManagerEndpoint
    agent: AgentEndpoint
    volumes: list[str]
    logs: dict[str, Path]
    user_id: str

    def save(self, path: Path) -> None:
        """Atomically, mode 0600. Raises `NoSpace`, `ConfigError`."""
        data = _plain(self)
        try:
            write_private(path, json.dumps(data, indent=2).encode() + b"\n")
        except OSError as err:
            raise disk_error(err, str(path)) from None


def _plain(value: object) -> object:
    if isinstance(value, Secret):
        return value.reveal()
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, Path) else value


def find_endpoints(state: Path | None = None) -> Endpoints:
    """The running stack of `--state`, `$MOORING_STATE` or the default directory.

    Raises `ServiceUnavailable` when none runs there, `ConfigError` when the file is damaged or not private.
    """
    directory = StateDirectory.locate(state)
    path = directory.endpoints_file
    advice = f"Start it with: mooring up --state {directory.path}"
    try:
        check_private(path)
        found = Endpoints.model_validate_json(path.read_bytes())
    except ConfigError:
        if not os.path.lexists(path):  # unlike Path.exists, no error for a directory of somebody else
            raise ServiceUnavailable(f"No stack runs on {directory.path}.", hint=advice) from None
        raise
    except FileNotFoundError:
        raise ServiceUnavailable(f"No stack runs on {directory.path}.", hint=advice) from None
    except ValidationError as err:
        raise ConfigError(f"{path} is damaged: {describe(err)}.", hint="Stop the stack and start it again.") from None
    if not _alive(found.pid):
        raise ServiceUnavailable(f"The stack on {directory.path} (pid {found.pid}) was killed.", hint=advice)
    return found


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
