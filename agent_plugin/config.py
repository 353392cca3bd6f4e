"""Settings of the agent. `AgentConfig` is the whole file of `mooring agent serve --config FILE`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from storage_proxy.core.config import ConfigModel, Seconds, Size, is_loopback
from storage_proxy.core.errors import MooringError
from storage_proxy.core.ids import parse_agent_id, parse_bucket_name, parse_name
from storage_proxy.core.paths import parse_prefix

# sun_path holds 108 bytes with the NUL at its end (unix(7)).
MAX_SOCKET_BYTES = 107


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


def _socket(path: Path) -> Path:
    size = len(str(_absolute(path)).encode())
    if size > MAX_SOCKET_BYTES:
        raise ValueError(
            f"is {size} bytes long, but a unix socket path may have {MAX_SOCKET_BYTES}: choose a shorter one"
        )
    return path


SocketPath = Annotated[Path, AfterValidator(_socket)]


class AgentSection(ConfigModel):
    """The node."""

    id: Annotated[str, AfterValidator(lambda text: str(parse_agent_id(text)))] = Field(
        description="Name of this node; grants are made out to it.", examples=["node-1"]
    )
    state_dir: AbsolutePath = Field(
        default=Path("/var/lib/mooring/agent"),
        description="Journal, the key that credentials are sealed to, and room for the temporary files of mounts.",
    )
    runtime_dir: AbsolutePath = Field(
        default=Path("/run/mooring/agent"),
        description="Mount base, credential files (in memory only) and the socket. Made with mode 0700.",
    )
    socket: SocketPath | None = Field(
        default=None,
        description="Unix socket of the API; its directory should be 0700. Default: agent.sock in runtime-dir.",
        examples=["/run/mooring/agent/agent.sock"],
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="How much is logged.")
    grace_period: float = Field(
        default=45.0,
        ge=0,
        le=3600,
        description="Seconds that a mount without sessions stays, for the next session of the same folder.",
    )
    mount_deadline: float = Field(
        default=10.0, ge=1, le=120, description="Seconds within which a mount must be ready, or the attach fails."
    )
    warn_mounts: int = Field(
        default=200, ge=1, description="From this number of mounts on, the status carries a warning."
    )
    max_mounts: int = Field(default=500, ge=1, description="No more mounts than this; further attaches are refused.")
    watch_interval: float = Field(
        default=1.0, ge=0.1, le=60, description="Seconds between two looks at the mount processes."
    )
    hang_deadline: float = Field(
        default=5.0,
        ge=1,
        le=600,
        description="Seconds after which a mount process that does not answer is given up: its callers are freed and\n"
        "another one takes its place.",
    )
    s3_check_interval: float = Field(
        default=60.0, ge=1, le=3600, description="Seconds between two looks through each used mount into S3."
    )
    repair_attempts: int = Field(
        default=8,
        ge=1,
        le=1000,
        description="How often in a row a dead mount is started anew before it is failed.\n"
        "Attempts while the S3 server is away do not count.",
    )
    repair_pause: float = Field(
        default=15.0, ge=0, le=600, description="Longest pause in seconds between two attempts."
    )
    reconcile_interval: float = Field(
        default=60.0,
        ge=1,
        le=3600,
        description="Seconds between two comparisons of journal, mount table, processes and containers.",
    )
    release_unheld_after: float = Field(
        default=3600.0,
        ge=0,
        description="Seconds after which an attachment is released that a container held and none holds any more.\n"
        "0: never.",
    )
    mount_memory_limit: Size | None = Field(
        default=None,
        description="Memory that one mount process may use; above it the kernel ends it and it is started anew.",
        examples=["1GiB"],
    )
    metrics_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="Port on 127.0.0.1 for Prometheus and health checks. Default: only on the socket.",
        examples=[16025],
    )
    allowed_uids: tuple[int, ...] = Field(
        default=(0,), description="Users that may call the API, checked by the kernel's word on who is connected."
    )
    stop_mounts_on_exit: bool = Field(
        default=False,
        description="Take all mounts down when the agent stops, and at start what a killed one left.\n"
        "Without it, mounts outlive the agent and are taken over by the next one.",
    )

    @property
    def api_socket(self) -> Path:
        return self.socket or self.runtime_dir / "agent.sock"

    @model_validator(mode="after")
    def _check(self) -> AgentSection:
        _socket(self.api_socket)
        if self.max_mounts < self.warn_mounts:
            raise ValueError("max-mounts is less than warn-mounts")
        return self


class GrantsSection(ConfigModel):
    """Who may grant mounts."""

    public_key_files: tuple[AbsolutePath, ...] = Field(
        description="Ed25519 public keys (PEM) of the manager extensions whose grants count here.",
        examples=[["/etc/mooring/grant-key.pub"]],
        min_length=1,
    )


class ManagerSection(ConfigModel):
    """Optional: the manager extension. The agent registers its public key there and asks for fresh grants, when the
    credential of a mount ends soon."""

    url: str = Field(description="Base URL of the manager extension.", examples=["http://127.0.0.1:6024"])
    token_file: AbsolutePath = Field(
        description="API token with the role agent, first line of a 0600 file.", examples=["/etc/mooring/agent.token"]
    )


class RedisSection(ConfigModel):
    """Optional: where the state of the mounts is published. Mounting never waits for it."""

    url: str = Field(description="Redis URL.", examples=["redis://127.0.0.1:6379/0"])
    heartbeat: float = Field(default=5.0, ge=0.1, le=300, description="Seconds between two reports.")
    ttl: float = Field(
        default=20.0, ge=1, le=3600, description="Seconds after which a report that is not renewed vanishes."
    )
    retention: float = Field(
        default=86400.0,
        ge=1,
        le=30 * 86400,
        description="Seconds that the last word of a node which went away stays, so that it is seen to be away.",
    )

    @model_validator(mode="after")
    def _check(self) -> RedisSection:
        if not self.url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("url must start with redis://, rediss:// or unix://")
        if self.ttl <= self.heartbeat:
            raise ValueError("ttl must be longer than heartbeat")
        if self.retention < self.ttl:
            raise ValueError("retention must not be shorter than ttl")
        return self


class S3fsConfig(ConfigModel):
    """The s3fs driver. These are all the options of s3fs that can be set; nobody else's text reaches its command
    line.
    """

    program: str = Field(default="s3fs", description="Name or path of the program.")
    ca_file: AbsolutePath | None = Field(
        default=None,
        description="PEM file with the authorities that signed the endpoints' certificates. Default: the system's.",
        examples=["/etc/ssl/certs/ca-certificates.crt"],
    )
    connect_timeout: int = Field(default=5, ge=1, le=300, description="Seconds to wait for a connection.")
    readwrite_timeout: int = Field(
        default=10,
        ge=1,
        le=600,
        description="Seconds of silence that end a request. While the server is silent, an operation on the mount\n"
        "ends with EIO after about 4 * retries * (readwrite-timeout + 5) seconds.",
    )
    retries: int = Field(default=2, ge=1, le=10, description="How often one request is tried in all.")
    parallel_count: int = Field(default=8, ge=1, le=64, description="Parallel part requests of one large file.")
    multipart_size: int = Field(default=16, ge=5, le=5120, description="MiB per part.")
    multireq_max: int = Field(default=20, ge=1, le=500, description="Parallel requests of one directory listing.")
    max_stat_cache_size: int = Field(
        default=100_000, ge=1_000, le=10_000_000, description="Entries of the attribute cache (about 400 bytes each)."
    )
    stat_cache_expire: int = Field(
        default=30, ge=1, le=86_400, description="Seconds after which a change by others is seen at the latest."
    )
    ensure_diskfree: int = Field(
        default=0, ge=0, le=1_000_000, description="MiB of disk that temporary files leave free; 0 is no limit."
    )
    kernel_cache: bool = Field(
        default=False,
        description="Keep file pages between opens. Faster; may show old content after a change by others.",
    )


class DriversConfig(ConfigModel):
    """Mount drivers."""

    s3fs: S3fsConfig = Field(default=S3fsConfig(), description="s3fs-fuse.")


@dataclass(frozen=True, slots=True)
class Allowance:
    """A part of a volume that a credential may be used for. `bucket` is None for every bucket; `prefix` is empty or
    ends with a slash."""

    volume: str
    bucket: str | None
    prefix: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `VOLUME/*`, `VOLUME/BUCKET` or `VOLUME/BUCKET/DIRECTORY`. Raises ValueError."""
        volume, _, place = text.partition("/")
        bucket, _, prefix = place.partition("/")
        try:
            parse_name(volume, "volume name")
            if place == "*":
                return cls(volume, None)
            return cls(volume, parse_bucket_name(bucket), parse_prefix(prefix))
        except MooringError as err:
            raise ValueError(
                f"{text[:80]!r}: write VOLUME/*, VOLUME/BUCKET or VOLUME/BUCKET/DIRECTORY; {err}"
            ) from None

    def covers(self, volume: str, bucket: str, prefix: str) -> bool:
        return self.volume == volume and (
            self.bucket is None or (self.bucket == bucket and prefix.startswith(self.prefix))
        )


class PluginVolume(ConfigModel):
    """An S3 server that container volumes may be on."""

    endpoint: str = Field(description="URL of the S3 server.", examples=["https://minio.example.com"])
    region: str = Field(default="us-east-1", description="Region name that goes into signatures.")
    path_style: bool = Field(default=True, description="Address buckets as endpoint/bucket, not bucket.endpoint.")
    bucket: str | None = Field(
        default=None,
        description="Bucket of the volumes that name none. Default: each must name one.",
        examples=["data"],
    )
    credential: str | None = Field(
        default=None,
        description="Credential of the volumes that name none. Default: each must name one.",
        examples=["example"],
    )
    allow_plain_http: bool = Field(
        default=False, description="Allow an http endpoint that is not on this machine. Data and names travel in clear."
    )

    @model_validator(mode="after")
    def _check(self) -> PluginVolume:
        url = urlsplit(self.endpoint)
        if url.scheme not in ("http", "https") or not url.hostname or url.username or url.query or url.path.strip("/"):
            raise ValueError("write endpoint as https://HOST or https://HOST:PORT, without user, path or query")
        if url.scheme == "http" and not self.allow_plain_http and not is_loopback(url.hostname):
            raise ValueError("plain http is for this machine only: use https, or set allow-plain-http = true")
        if self.bucket is not None:
            _checked(parse_bucket_name, self.bucket)
        return self


class PluginCredential(ConfigModel):
    """A key that container volumes may use by its name. The key itself never appears in their options."""

    file: AbsolutePath = Field(
        description="0600 file with access key and secret key: on two lines, or as JSON.",
        examples=["/etc/mooring/volumes.key"],
    )
    allow: tuple[str, ...] = Field(
        description="What it may be used for: VOLUME/BUCKET, VOLUME/BUCKET/DIRECTORY, or VOLUME/* for every bucket.",
        examples=[["example/data"]],
        min_length=1,
    )
    read_only: bool = Field(default=False, description="Only for volumes with mode=ro.")

    @property
    def allowances(self) -> tuple[Allowance, ...]:
        return tuple(Allowance.parse(text) for text in self.allow)

    @model_validator(mode="after")
    def _check(self) -> PluginCredential:
        _ = self.allowances
        return self


class VolumePluginSection(ConfigModel):
    """Volumes for Docker and Podman by their volume plugin protocol. Off without this section."""

    socket: SocketPath = Field(
        description="Unix socket of the plugin. Docker finds it in /run/docker/plugins by its name; Podman is told in\n"
        "containers.conf.",
        examples=["/run/docker/plugins/mooring.sock"],
    )
    allowed_uids: tuple[int, ...] = Field(
        default=(0,), description="Users whose container engine may use it, checked by the kernel's word."
    )
    answer_within: float = Field(
        default=4.0,
        ge=1,
        le=60,
        description="Seconds within which an engine is answered. Podman waits for 5 and then says only that it waited.",
    )
    volumes: Mapping[str, PluginVolume] = Field(description="The S3 servers, by name.")
    credentials: Mapping[str, PluginCredential] = Field(description="The keys, by name.")

    @model_validator(mode="after")
    def _check(self) -> VolumePluginSection:
        for name in (*self.volumes, *self.credentials):
            _checked(lambda text: parse_name(text, "name"), name)
        for name, volume in self.volumes.items():
            if volume.credential is not None and volume.credential not in self.credentials:
                raise ValueError(f"volume {name} names the credential {volume.credential!r}, which is not configured")
        for name, credential in self.credentials.items():
            for allowance in credential.allowances:
                if allowance.volume not in self.volumes:
                    raise ValueError(f"credential {name} allows volume {allowance.volume!r}, which is not configured")
        return self


def _checked(parse: Callable[[str], object], text: str) -> None:
    try:
        parse(text)
    except MooringError as err:
        raise ValueError(str(err)) from None


class VolumeRootEntry(ConfigModel):
    """One volume whose folders appear on this node at the paths where Backend.AI looks for them."""

    path: AbsolutePath = Field(
        description="The volume's `path` in the storage proxy's configuration. Empty directory, or made at start.",
        examples=["/vfroot/minio"],
    )
    volume: str | None = Field(
        default=None,
        pattern=r"^([A-Za-z0-9._-]+:)?[A-Za-z0-9._-]+$",
        description="The volume as the manager extension calls it: VOLUME, or PROXY:VOLUME.\n"
        "Default: the name of this section.",
        examples=["proxy-1:minio"],
    )


class BackendAISection(ConfigModel):
    """Optional: serves unmodified Backend.AI agents on this node; see docs/backend-ai.md. Off without a root."""

    idle_time: Seconds = Field(
        default=600,
        description="How long a folder stays mounted after its last use if no container holds it: 600, or 10m.",
    )
    lookup_deadline: Seconds = Field(
        default=20, description="Within which a look-up of a folder has its mount, or ends with an error."
    )
    lookup_uids: tuple[int, ...] = Field(
        default=(0,), description="Users whose look-ups may mount a folder: those that container runtimes run as."
    )
    events_url: str | None = Field(
        default=None,
        pattern=r"^(redis|rediss|unix)://",
        description="Redis of Backend.AI, database 4: when a kernel ends, its folders are released at once instead of"
        " when idle.\nIt is only read from. Default: not read.",
        examples=["redis://127.0.0.1:6379/4"],
    )
    root: dict[str, VolumeRootEntry] = Field(default={}, description="One section for each volume.")

    @model_validator(mode="after")
    def _check(self) -> BackendAISection:
        paths = [root.path for root in self.root.values()]
        for path in paths:
            if any(other != path and other.is_relative_to(path) for other in paths) or paths.count(path) > 1:
                raise ValueError(f"the roots at {path} lie in each other")
        return self


class AgentConfig(ConfigModel):
    """The whole file."""

    agent: AgentSection
    grants: GrantsSection | None = Field(
        default=None, description="Without it no grants are taken, and only what this file itself allows is mounted."
    )
    manager: ManagerSection | None = Field(
        default=None, description="Optional: where to register the public key and to ask for fresh grants."
    )
    redis: RedisSection | None = Field(default=None, description="Optional: publish the state of mounts.")
    volume_plugin: VolumePluginSection | None = Field(
        default=None, description="Optional: volumes for Docker and Podman; see docs/volume-plugin.md."
    )
    backend_ai: BackendAISection = Field(
        default=BackendAISection(), description="Optional: unmodified Backend.AI agents; see docs/backend-ai.md."
    )
    driver: DriversConfig = Field(default=DriversConfig())

    @model_validator(mode="after")
    def _check(self) -> AgentConfig:
        if self.backend_ai.root and (self.manager is None or self.grants is None):
            raise ValueError("[backend-ai.root] needs [manager] and [grants]: folders come from a manager extension")
        if self.grants is None and self.volume_plugin is None:
            raise ValueError("nothing could ever be mounted: write [grants], [volume-plugin] or both")
        return self
