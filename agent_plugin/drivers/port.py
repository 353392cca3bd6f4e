"""What a mount driver is: a program that runs in the foreground, mounts one place, and ends when it is unmounted.

A driver gets no text from users as options: it builds its argument list from a `MountPlan` whose parts were validated,
and from the operator's typed settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from storage_proxy.core.ids import AccessMode, MountKey
from storage_proxy.core.secrets import Secret
from storage_proxy.core.wire import Location, MountRequest, Ownership, S3Credential, Wire


class MountPlan(Wire):
    """Everything about a mount but its credential; goes into the journal as it is."""

    key: MountKey
    driver: str
    volume: str
    location: Location
    mode: AccessMode
    ownership: Ownership = Ownership()
    credential_id: str

    @classmethod
    def of(cls, request: MountRequest, driver: str) -> MountPlan:
        return cls(
            key=request.mount_key(driver),
            driver=driver,
            volume=request.volume,
            location=request.location,
            mode=request.mode,
            ownership=request.ownership,
            credential_id=request.credential_id,
        )

    @property
    def place(self) -> str:
        """For messages: `s3://bucket/prefix`."""
        return f"s3://{self.location.bucket}/{self.location.prefix}"


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a mount process. Neither `argv` nor `environment` holds a secret: both are readable in /proc."""

    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: Path = Path("/")


@dataclass(frozen=True, slots=True)
class DriverInfo:
    """`lists_bucket`: the program lists the bucket without a prefix when it starts, so a credential limited to a prefix
    must have that right as well."""

    name: str
    program: str
    version: str
    lists_bucket: bool = False


class Driver(Protocol):
    """Ready means for every driver: in the mount table at its mount point, and a `stat` of the root answers."""

    @property
    def name(self) -> str: ...

    def check(self) -> DriverInfo:
        """Raises `DriverMissing` if the program is not there or does not run. Blocks for a moment: call it off the
        loop.
        """
        ...

    def accept(self, plan: MountPlan, credential: S3Credential) -> None:
        """Raises `Unsupported` for what this driver cannot do, before anything is touched."""
        ...

    def credential_file(self, credential: S3Credential) -> Secret:
        """The content of the 0600 file that the program reads its keys from."""
        ...

    def read_credential(self, content: Secret) -> S3Credential:
        """The reverse of `credential_file`. Raises `MountError` for something else."""
        ...

    def launch(self, plan: MountPlan, *, mount_point: Path, credential: Path, scratch: Path) -> Launch: ...
