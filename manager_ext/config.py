"""Settings of the manager extension (`configs/manager-ext.sample.toml` is generated from these models)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator

from storage_proxy.client.manager import parse_endpoint
from storage_proxy.core.config import ConfigModel, Seconds, is_loopback
from storage_proxy.core.errors import InvalidIdentifier, UsageError
from storage_proxy.core.ids import parse_agent_id, parse_name
from storage_proxy.core.secrets import Secret


def _url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("write it as https://HOST:PORT")
    return url.rstrip("/")


def _endpoint(text: str) -> str:
    try:
        return parse_endpoint(text)
    except UsageError as err:
        raise ValueError(str(err)) from None


Url = Annotated[str, AfterValidator(_url)]


class ManagerSection(ConfigModel):
    """What concerns the whole process."""

    log_level: str = Field(
        default="info", pattern="^(debug|info|warning|error)$", description="debug, info, warning or error."
    )
    state_dir: Path = Field(
        default=Path("/var/lib/mooring/manager"),
        description="Where keys and the SQLite database are kept, unless their own settings say otherwise.",
    )


class ApiSection(ConfigModel):
    """The REST API."""

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=6024, ge=1, le=65535, description="Port to listen on.")
    secret_file: Path | None = Field(
        default=None,
        description="0600 file with the secret that signs API tokens (32 bytes or more); made at first start."
        "\nDefault: api.secret in the state directory.",
        examples=["/etc/mooring/manager-tokens.secret"],
    )
    tls_cert: Path | None = Field(
        default=None,
        description="PEM certificate chain; with it the API speaks HTTPS. Without it keep host on this machine,"
        "\nor put a server that speaks HTTPS before it.",
        examples=["/etc/mooring/tls/manager.pem"],
    )
    tls_key: Path | None = Field(
        default=None, description="PEM private key of tls-cert, mode 0600.", examples=["/etc/mooring/tls/manager.key"]
    )

    @model_validator(mode="after")
    def _tls_pair(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls-cert and tls-key go together")
        return self


class DatabaseSection(ConfigModel):
    """Where rows live."""

    url: Secret | None = Field(
        default=None,
        description="sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME."
        "\nDefault: manager.db in the state directory.",
        examples=["postgresql://mooring@db.example.com/mooring"],
    )
    key_file: Path | None = Field(
        default=None,
        description="0600 JSON file with the keys that encrypt stored credentials; made at first start. Back it up."
        "\nDefault: keys.json in the state directory.",
        examples=["/etc/mooring/manager-keys.json"],
    )


class ProxyEntry(ConfigModel):
    """One storage proxy."""

    manager_url: Url = Field(description="Its manager-facing API.", examples=["http://127.0.0.1:6022"])
    client_url: Url = Field(
        description="Its client-facing API, as users' programs reach it.", examples=["https://storage.example.com:6021"]
    )
    secret_file: Path = Field(
        description="0600 file with the secret of its manager API.", examples=["/etc/mooring/manager-api.secret"]
    )
    allow_plain_http: bool = Field(
        default=False, description="Permit a manager-url with http:// that is not on this machine."
    )

    @model_validator(mode="after")
    def _secret_not_in_clear(self) -> Self:
        parts = urlsplit(self.manager_url)
        if parts.scheme == "http" and not self.allow_plain_http and not is_loopback(parts.hostname or ""):
            raise ValueError("manager-url sends a secret over http://; use https:// or set allow-plain-http = true")
        return self


class GrantsSection(ConfigModel):
    """Permissions for agents to attach a folder."""

    key_file: Path | None = Field(
        default=None,
        description="0600 PEM file with the Ed25519 key that signs grants; made at first start. Its public half is"
        " written beside it\nas NAME.pub, for the agents. Default: grant.pem in the state directory.",
        examples=["/etc/mooring/grant.pem"],
    )
    lifetime: Seconds = Field(
        default=300,
        ge=10,
        le=3600,
        description="How long a grant is good: seconds, or text as in 5m (at most 1h). The agent attaches within it.",
    )


class BindingSection(ConfigModel):
    """Buckets that users bring."""

    allowed_endpoints: list[Annotated[str, AfterValidator(_endpoint)]] = Field(
        default=[],
        description="Endpoints that users may bind buckets of, beside the one of the volume. Admins may use any.",
        examples=['["https://s3.example.com"]'],
    )


class NodeWideEntry(ConfigModel):
    """A volume whose folders some agents may mount on their own word, for sessions that another manager plans."""

    agents: list[Annotated[str, AfterValidator(lambda text: str(parse_agent_id(text)))]] = Field(
        min_length=1,
        description="Ids of the agents. Whoever starts containers there can read and write every folder of the volume.",
        examples=[["node-1", "node-2"]],
    )
    uid: int = Field(
        default=1000, ge=0, le=2**32 - 2, description="Owner of the files, unless the folder's binding fixed one."
    )
    gid: int = Field(default=1000, ge=0, le=2**32 - 2, description="Their group, likewise.")
    umask: int = Field(default=0o022, ge=0, le=0o777, description="Mask of their modes, likewise (022 is 18).")


class ManagerConfig(ConfigModel):
    """Everything of `mooring manager serve`."""

    manager: ManagerSection = Field(default=ManagerSection(), description="What concerns the whole process.")
    api: ApiSection = Field(default=ApiSection(), description="The REST API.")
    database: DatabaseSection = Field(default=DatabaseSection(), description="Where rows live.")
    proxy: dict[str, ProxyEntry] = Field(min_length=1, description="The storage proxies, each under a name of its own.")
    grants: GrantsSection = Field(default=GrantsSection(), description="Permissions for agents to attach a folder.")
    binding: BindingSection = Field(default=BindingSection(), description="Buckets that users bring.")
    node_wide: dict[str, NodeWideEntry] = Field(
        default={},
        description="Volumes (VOLUME, or PROXY:VOLUME) whose folders some agents may mount without a session of this"
        " manager:\nfor nodes of Backend.AI, see docs/backend-ai.md. Nothing is open that is not named here.",
    )

    @field_validator("proxy")
    @classmethod
    def _names(cls, value: dict[str, ProxyEntry]) -> dict[str, ProxyEntry]:
        try:
            for name in value:
                parse_name(name, "storage proxy name")
        except InvalidIdentifier as err:
            raise ValueError(str(err)) from None
        return value

    @property
    def api_secret_file(self) -> Path:
        return self.api.secret_file or self.manager.state_dir / "api.secret"

    @property
    def grant_key_file(self) -> Path:
        return self.grants.key_file or self.manager.state_dir / "grant.pem"

    @property
    def database_url(self) -> str:
        return self.database.url.reveal() if self.database.url else f"sqlite:///{self.manager.state_dir / 'manager.db'}"

    @property
    def key_file(self) -> Path:
        return self.database.key_file or self.manager.state_dir / "keys.json"
