"""Settings of the agent. `AgentConfig` is the whole file of `mooring agent serve --config FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from storage_proxy.core.config import ConfigModel, Size
from storage_proxy.core.ids import parse_agent_id

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
        description="How often in a row a dead mount is started anew before it is failed. Attempts while the S3 server\n"
        "is away do not count.",
    )
    repair_pause: float = Field(default=15.0, ge=0, le=600, description="Longest pause in seconds between two attempts.")
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
    """Optional: the manager extension, where the agent registers its public key at start."""

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


class AgentConfig(ConfigModel):
    """The whole file."""

    agent: AgentSection
    grants: GrantsSection
    manager: ManagerSection | None = Field(
        default=None, description="Optional: register the public key of this agent at the manager extension."
    )
    redis: RedisSection | None = Field(default=None, description="Optional: publish the state of mounts.")
    driver: DriversConfig = Field(default=DriversConfig())
