"""`Endpoint`: where an S3 server is and how patient to be with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from ..core.config import is_loopback
from ..core.errors import ConfigError

# What RFC 3986 leaves unreserved: SigV4 wants everything else percent-encoded, in upper-case hex.
_UNRESERVED = "-_.~"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One S3 server. Hashable: `S3Pool` keeps one client per endpoint and credential.

    Times are seconds. `deadline` bounds a control call with all its retries; it is less than 15 s so that a command
    built on one failing call still ends within 15 s. A call with a body gets `size / minimum_rate` on top of it.
    `read_timeout` is the longest silence while a body arrives.
    """

    url: str
    region: str = "us-east-1"
    path_style: bool = True
    ca_file: Path | None = None
    connect_timeout: float = 5.0
    read_timeout: float = 30.0
    max_connections: int = 64
    attempts: int = 4
    deadline: float = 12.0
    minimum_rate: int = 128 * 1024

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"S3 endpoint {self.url[:80]!r} is not a URL.",
                hint="Write it as https://host or http://127.0.0.1:9000.",
            )
        if parts.path.strip("/") or parts.query or parts.fragment or parts.username or parts.password:
            raise ConfigError(
                f"S3 endpoint at {parts.hostname!r} has a path, a query or a user name in its URL.",
                hint="Give only scheme, host and port; the bucket and the keys are separate settings.",
            )
        object.__setattr__(self, "url", f"{parts.scheme}://{parts.netloc}")

    @property
    def secure(self) -> bool:
        return self.url.startswith("https:")

    @property
    def is_loopback(self) -> bool:
        return is_loopback(urlsplit(self.url).hostname or "")

    def object_url(self, bucket: str = "", key: str = "", query: str = "") -> str:
        """The encoded URL of the service, a bucket or an object. Nothing in a key is normalised."""
        base, path = self.url, "/"
        if bucket and self.path_style:
            path = f"/{bucket}"
        elif bucket:
            scheme, _, rest = self.url.partition("://")
            base = f"{scheme}://{bucket}.{rest}"
        if key:
            path = f"{path.rstrip('/')}/{quote(key, safe='/' + _UNRESERVED)}"
        return f"{base}{path}{'?' if query else ''}{query}"


def encode_query(params: dict[str, str]) -> str:
    """Sorted and encoded as SigV4 wants it, so the same text is sent and signed."""
    return "&".join(f"{quote(k, safe=_UNRESERVED)}={quote(v, safe=_UNRESERVED)}" for k, v in sorted(params.items()))
