"""Where the parts of a one-machine stack listen, all on 127.0.0.1, counted from one base port."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from ..core.errors import PortTaken, UsageError

HOST = "127.0.0.1"
DEFAULT_BASE = 6020
GRPC_OFFSET = 10000  # SeaweedFS listens for gRPC at each HTTP port + 10000
HIGHEST_BASE = 65535 - GRPC_OFFSET - 10


@dataclass(frozen=True, slots=True)
class PortPlan:
    """The ports of one stack. Two stacks side by side need bases that differ by 11 or more."""

    base: int = DEFAULT_BASE

    def __post_init__(self) -> None:
        if not 1024 <= self.base <= HIGHEST_BASE:
            raise UsageError(
                f"--port-base {self.base} is out of range.", hint=f"Choose a number from 1024 to {HIGHEST_BASE}."
            )

    @property
    def client_api(self) -> int:
        return self.base + 1

    @property
    def manager_api(self) -> int:
        return self.base + 2

    @property
    def manager(self) -> int:
        return self.base + 4

    @property
    def redis(self) -> int:
        return self.base + 5

    @property
    def s3(self) -> int:
        return self.base + 6

    @property
    def weed_master(self) -> int:
        return self.base + 7

    @property
    def weed_volume(self) -> int:
        return self.base + 8

    @property
    def weed_filer(self) -> int:
        return self.base + 9

    @property
    def weed_admin(self) -> int:
        return self.base + 10

    @property
    def internal_api(self) -> int:
        return self.base + 10003

    def listeners(self, *, redis: bool = True, s3: bool = True) -> Iterator[tuple[int, str]]:
        """(port, what for) of everything this machine will listen on; parts given by URL are left out."""
        yield self.client_api, "the storage proxy's client API"
        yield self.manager_api, "the storage proxy's manager API"
        yield self.internal_api, "the storage proxy's metrics"
        yield self.manager, "the manager extension"
        if redis:
            yield self.redis, "Redis"
        if s3:
            for port, part in (
                (self.s3, "the S3 server"),
                (self.weed_master, "the S3 server's master"),
                (self.weed_volume, "the S3 server's volumes"),
                (self.weed_filer, "the S3 server's filer"),
                (self.weed_admin, "the S3 server's admin"),
            ):
                yield port, part
                yield port + GRPC_OFFSET, f"{part} (gRPC)"

    def check(self, *, redis: bool = True, s3: bool = True) -> None:
        """Raises `PortTaken` for the first port that somebody else listens on."""
        for port, purpose in self.listeners(redis=redis, s3=s3):
            if not is_free(port):
                raise PortTaken(
                    f"Port {HOST}:{port} for {purpose} is taken by another program.",
                    hint="Stop that program, or choose other ports with --port-base N.",
                    detail={"port": port},
                )


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do it: a connection in TIME_WAIT is no obstacle, a listener is.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as err:
            if err.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True
