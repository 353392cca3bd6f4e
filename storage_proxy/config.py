"""Settings of the storage proxy (`configs/storage-proxy.sample.toml` is generated from these models)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from .core.config import ConfigModel, Seconds, Size, is_loopback
from .core.errors import ConfigError, InvalidIdentifier
from .core.ids import ByteSize, parse_bucket_name, parse_volume_name
from .core.secrets import Secret, check_private, read_secret
from .core.wire import S3Credential


class ProxySection(ConfigModel):
    """What concerns the whole process."""

    node_id: str = Field(
        default="storage-proxy-1", description="Name of this replica; another one for each that shares the database."
    )
    secret: Secret | None = Field(
        default=None, description="Signs client tokens (at least 32 bytes). Better: secret-file.", examples=[""]
    )
    secret_file: Path | None = Field(
        default=None,
        description="0600 file with the secret that signs client tokens (32 bytes or more, the same on all replicas).",
        examples=["/etc/mooring/client-token.secret"],
    )
    session_expire: Seconds = Field(
        default=3600, description="How long an upload or download token is good: seconds, or text as in 1h."
    )
    upload_expire: Seconds = Field(
        default=86400, description="An unfinished upload is dropped after this time without a new byte."
    )
    max_upload_size: Size = Field(
        default=int(ByteSize.parse("100g")), description="The biggest file a client may upload, as in 100g."
    )
    upload_memory: Size = Field(
        default=int(ByteSize.parse("16m")),
        ge=16 * 1024 * 1024,
        description="Bytes that all running uploads together may hold in memory.",
    )
    presigned_download_expire: Seconds = Field(
        default=300, le=86400, description="How long a presigned download link is good (at most 24h)."
    )
    presigned_upload_expire: Seconds = Field(
        default=3600, le=3600, description="How long the presigned links of one upload are good (at most 1h)."
    )
    mount_credential_lifetime: Seconds = Field(
        default=7 * 86400,
        description="How long a credential made for a session's mount is good unless it is revoked before.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="How much is logged.")
    state_dir: Path = Field(
        default=Path("/var/lib/mooring/proxy"), description="Where the default database and its key file are."
    )

    @model_validator(mode="after")
    def _one_secret(self) -> ProxySection:
        if (self.secret is None) == (self.secret_file is None):
            raise ValueError("give either secret-file or secret")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> ProxySection:
        # S3 takes 10,000 parts of whole MiB, and one part of the biggest file must fit.
        if self.max_upload_size > (self.upload_memory - 1024 * 1024) * 10_000:
            raise ValueError("upload-memory must be over a ten-thousandth of max-upload-size")
        return self

    def token_secret(self) -> Secret:
        """Raises `ConfigError` if the file is missing, open to others, or too short."""
        if self.secret is not None:
            return self.secret
        assert self.secret_file is not None  # noqa: S101  # the validator above
        return read_secret(self.secret_file)


class _ListenerSection(ConfigModel):
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    tls_cert: Path | None = Field(
        default=None, description="PEM certificate chain; with it the port speaks TLS.", examples=[""]
    )
    tls_key: Path | None = Field(default=None, description="PEM private key of tls-cert, mode 0600.", examples=[""])

    @model_validator(mode="after")
    def _both_or_none(self) -> _ListenerSection:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls-cert and tls-key go together")
        return self

    def check_tls_key(self) -> None:
        if self.tls_key is not None:
            check_private(self.tls_key)


class ClientApiSection(_ListenerSection):
    """The port that users' programs reach with a token."""

    port: int = Field(default=6021, ge=0, le=65535, description="Port of the client API.")
    public_url: str = Field(
        default="",
        description="How clients reach this port from outside, as in https://storage.example.com; "
        "empty means the host and port above.",
    )

    def url(self) -> str:
        scheme = "https" if self.tls_cert else "http"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.public_url.rstrip("/") or f"{scheme}://{host}:{self.port}"


class ManagerApiSection(_ListenerSection):
    """The port that managers reach with a secret."""

    port: int = Field(default=6022, ge=0, le=65535, description="Port of the manager API.")
    secrets: list[Secret] = Field(
        default_factory=list, description="Secrets of the managers, each accepted. Better: secret-files."
    )
    secret_files: list[Path] = Field(
        default_factory=list,
        description="0600 files with one secret each; give every manager its own, and two while one is rotated.",
    )

    @model_validator(mode="after")
    def _some_secret(self) -> ManagerApiSection:
        if not self.secrets and not self.secret_files:
            raise ValueError("give at least one of secret-files or secrets")
        return self

    def all_secrets(self) -> list[Secret]:
        """Raises `ConfigError` for a file that is missing, empty or open to others."""
        return [*self.secrets, *(read_secret(path) for path in self.secret_files)]


class InternalApiSection(ConfigModel):
    """Health and metrics, for the operator's network only; no authentication."""

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=16023, ge=0, le=65535, description="Port of health and metrics.")


class DatabaseSection(ConfigModel):
    """Where bound folders, uploads and issued credentials are kept."""

    url: Secret | None = Field(
        default=None,
        description="sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME; empty means a SQLite file in state-dir.",
        examples=[""],
    )
    key_file: Path | None = Field(
        default=None,
        description="Keys that encrypt credentials in the database (0600, made at first start); empty means state-dir. "
        "Back it up: without it bound folders must be bound again.",
        examples=[""],
    )


class RedisSection(ConfigModel):
    """Optional: the Redis that the agents report to; from it the proxy knows what the nodes do."""

    url: Secret = Field(description="redis://HOST:PORT/DB", examples=["redis://127.0.0.1:6379/0"])


class Flavor(StrEnum):
    """Whose S3 server it is. Behaviour is decided by what the server can do, never by this name."""

    AUTO = "auto"
    AWS = "aws"
    CEPH = "ceph"
    MINIO = "minio"
    RUSTFS = "rustfs"
    SEAWEEDFS = "seaweedfs"


class VolumeOptions(ConfigModel):
    """The credential of the volume: an access key and a secret key, each given directly, by file or by environment."""

    minio_access_key: str | None = Field(default=None, description="Access key.", examples=["your-access-key"])
    minio_access_key_env: str | None = Field(
        default=None, description="Name of an environment variable that holds the access key.", examples=[""]
    )
    minio_secret_key: Secret | None = Field(
        default=None, description="Secret key. Better: minio-secret-key-file.", examples=[""]
    )
    minio_secret_key_file: Path | None = Field(
        default=None, description="A 0600 file with the secret key.", examples=["/etc/mooring/minio.secret"]
    )
    minio_secret_key_env: str | None = Field(
        default=None, description="Name of an environment variable that holds the secret key.", examples=[""]
    )
    minio_credential_file: Path | None = Field(
        default=None,
        description="A 0600 file with both: JSON with access_key and secret_key, or two lines.",
        examples=[""],
    )

    @model_validator(mode="after")
    def _one_source(self) -> VolumeOptions:
        access = [self.minio_access_key, self.minio_access_key_env]
        secret = [self.minio_secret_key, self.minio_secret_key_file, self.minio_secret_key_env]
        given = (sum(item is not None for item in access), sum(item is not None for item in secret))
        if given != ((0, 0) if self.minio_credential_file else (1, 1)):
            raise ValueError(
                "give one access key (minio-access-key or -env) and one secret key (minio-secret-key, -file or -env), "
                "or only minio-credential-file"
            )
        return self

    def credential(self, environ: Mapping[str, str] = os.environ) -> S3Credential:
        """Raises `ConfigError` for a missing file or variable, or one that cannot be used."""
        if self.minio_credential_file is not None:
            return S3Credential.read(self.minio_credential_file)
        access = self.minio_access_key or _variable(environ, self.minio_access_key_env)
        if self.minio_secret_key is not None:
            secret = self.minio_secret_key
        elif self.minio_secret_key_file is not None:
            secret = read_secret(self.minio_secret_key_file)
        else:
            secret = Secret(_variable(environ, self.minio_secret_key_env))
        return S3Credential(access_key=access, secret_key=secret)


class VolumeSection(ConfigModel):
    """A volume: an S3 endpoint with the bucket that holds its managed folders."""

    backend: Literal["minio"] = Field(
        description="`minio`: any S3 server that passes the core profile.", examples=["minio"]
    )
    endpoint: str = Field(description="URL of the S3 server.", examples=["https://minio.example.com"])
    region: str = Field(default="us-east-1", description="Region name that goes into signatures.")
    flavor: Flavor = Field(default=Flavor.AUTO, description="Whose server it is; shown to operators only.")
    bucket: str = Field(default="mooring", description="Bucket of the managed folders. It must exist.")
    create_bucket: bool = Field(default=False, description="Create the bucket at start if it is missing.")
    path_style: bool = Field(default=True, description="Address buckets as endpoint/bucket, not bucket.endpoint.")
    ca_file: Path | None = Field(
        default=None, description="PEM certificates to trust for this endpoint instead of the system's.", examples=[""]
    )
    allow_plain_http: bool = Field(
        default=False, description="Allow an http endpoint that is not on this machine. Data and names travel in clear."
    )
    allow_parent_credential: bool = Field(
        default=False,
        description="When the server cannot make credentials limited to one folder, mount with the volume's own. "
        "Every agent then holds a key to the whole bucket.",
    )
    path: str = Field(
        default="",
        description="The path that stands for this volume on agents; empty means /vfroot/NAME.",
        examples=[""],
    )
    capacity: Size = Field(
        default=int(ByteSize.parse("1p")), description="What is shown as the size of the volume; S3 itself has none."
    )
    options: VolumeOptions = Field(description="Credential of the volume.")

    @field_validator("endpoint")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        url = urlsplit(value)
        if url.scheme not in ("http", "https") or not url.hostname or url.username or url.query or url.fragment:
            raise ValueError("write it as https://HOST or https://HOST:PORT, without user, query or fragment")
        return value.rstrip("/")

    @field_validator("bucket")
    @classmethod
    def _bucket(cls, value: str) -> str:
        try:
            return parse_bucket_name(value)
        except InvalidIdentifier as err:
            raise ValueError(str(err)) from None

    @model_validator(mode="after")
    def _tls(self) -> VolumeSection:
        if not self.allow_plain_http:
            refuse_plain_http(self.endpoint)
        return self


def refuse_plain_http(endpoint: str) -> None:
    """Raises ValueError for an http URL of another machine."""
    url = urlsplit(endpoint)
    if url.scheme == "http" and not is_loopback(url.hostname or ""):
        raise ValueError("plain http is for this machine only: use https, or set allow-plain-http = true")


class ProxyConfig(ConfigModel):
    """The whole file."""

    storage_proxy: ProxySection = Field(description="What concerns the whole process.")
    client_api: ClientApiSection = Field(
        default_factory=ClientApiSection, description="The port that users' programs reach with a token."
    )
    manager_api: ManagerApiSection = Field(description="The port that managers reach with a secret.")
    internal_api: InternalApiSection = Field(
        default_factory=InternalApiSection, description="Health and metrics, for the operator's network only."
    )
    database: DatabaseSection = Field(default_factory=DatabaseSection, description="Where the proxy keeps its rows.")
    redis: RedisSection | None = Field(default=None, description="Optional.")
    volume: dict[str, VolumeSection] = Field(description="One section per volume; NAME is what users see.")

    @field_validator("volume")
    @classmethod
    def _names(cls, value: dict[str, VolumeSection]) -> dict[str, VolumeSection]:
        if not value:
            raise ValueError("configure at least one volume, as [volume.NAME]")
        for name in value:
            try:
                parse_volume_name(name)
            except InvalidIdentifier as err:
                raise ValueError(str(err)) from None
            if name == "noop":
                raise ValueError("the volume name 'noop' is taken by Backend.AI")
        return value

    @property
    def database_url(self) -> str:
        given = self.database.url
        return given.reveal() if given else f"sqlite:///{self.storage_proxy.state_dir / 'proxy.sqlite'}"

    @property
    def key_file(self) -> Path:
        return self.database.key_file or self.storage_proxy.state_dir / "proxy.keys.json"

    @property
    def session_lifetime(self) -> timedelta:
        return timedelta(seconds=self.storage_proxy.session_expire)


def _variable(environ: Mapping[str, str], name: str | None) -> str:
    value = environ.get(name or "", "")
    if not value:
        raise ConfigError(
            f"The environment variable {name} is not set.", hint="Set it, or give the key by file in the configuration."
        )
    return value
