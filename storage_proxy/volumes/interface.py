"""What a volume is: the interface that every backend implements, and the values that it hands out.

A backend claims a capability only if it holds for every folder of the volume. Names on the wire are Backend.AI's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING

from ..core.ids import BucketRef, VFolderID, VolumeName
from ..core.wire import Location, S3Credential

if TYPE_CHECKING:
    from ..s3.client import S3Client
    from .tree import FolderTree

EPOCH = datetime.fromtimestamp(0, UTC)


class Capability(StrEnum):
    """What a manager may expect of a volume."""

    VFOLDER = "vfolder"  # folders can be made and used
    QUOTA = "quota"  # limits per quota scope are kept
    METRIC = "metric"  # I/O counters can be read
    FAST_FS_SIZE = "fast-fs-size"  # the used bytes of the volume are known without a walk
    FAST_SCAN = "fast-scan"  # all files can be listed without a walk
    FAST_SIZE = "fast-size"  # the used bytes of a folder are known without a walk


class EntryType(StrEnum):
    FILE = "FILE"
    DIRECTORY = "DIRECTORY"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or directory. `mode` is the full st_mode; `size` in bytes, 0 for directories.

    `modified` is the epoch for a directory in a listing: S3 keeps no time for it, and a mount shows the same.
    """

    name: str
    type: EntryType
    mode: int
    size: int
    modified: datetime
    etag: str = ""


@dataclass(frozen=True, slots=True)
class EntryPage:
    """A part of a listing. `cursor` continues it; None on the last page. `skipped` counts keys that cannot be a file
    name (empty or `..` parts, control characters): they exist in the bucket and no path can address them."""

    entries: list[Entry]
    cursor: str | None
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Sum over a listing. Exact for what was not written while it ran; `error_bound_bytes` is the size of everything
    in it that is newer than its start. `file_count` does not count directories."""

    file_count: int
    used_bytes: int
    as_of: datetime
    error_bound_bytes: int


@dataclass(frozen=True, slots=True)
class Binding:
    """An existing bucket, or a directory of one, that a folder shall stand for."""

    location: Location
    credential: S3Credential
    read_only: bool


@dataclass(frozen=True, slots=True)
class Folder:
    """A vfolder, found: where it is and the client that may reach it."""

    volume: VolumeName
    vfid: VFolderID
    ref: BucketRef
    location: Location
    read_only: bool
    managed: bool
    client: S3Client


class Volume(ABC):
    """One configured volume. All methods raise `S3Error`s; those on a folder raise `VFolderNotFound`."""

    name: VolumeName
    backend: str
    path: str
    capacity: int

    @property
    @abstractmethod
    def capabilities(self) -> frozenset[Capability]: ...

    @abstractmethod
    async def check(self) -> None:
        """Returns when the bucket answers to the volume's credential; raises what is wrong otherwise."""

    @abstractmethod
    async def create(self, vfid: VFolderID) -> None:
        """Makes a managed folder. Raises `AlreadyExists`."""

    @abstractmethod
    async def bind(self, vfid: VFolderID, binding: Binding) -> None:
        """Makes a folder that stands for an existing place, after looking whether the credential reaches it.
        Raises `AlreadyExists`, `BucketNotFound`, `FileNotFound` (nothing below the prefix), access errors."""

    @abstractmethod
    async def delete(self, vfid: VFolderID) -> int:
        """Removes a folder; returns the number of objects deleted. The data of a bound folder is never touched.
        A folder that does not exist counts as deleted. May be repeated after a failure."""

    @abstractmethod
    async def folder(self, vfid: VFolderID, *, write: bool = False) -> Folder:
        """Finds a folder. Raises `VFolderNotFound`, or `ReadOnly` when `write` is asked of a read-only one."""

    @abstractmethod
    async def tree(self, vfid: VFolderID, *, write: bool = False) -> FolderTree:
        """The files of a folder; raises as `folder`."""

    @abstractmethod
    async def usage(self, vfid: VFolderID) -> Usage:
        """Counts a folder by a LIST."""

    @abstractmethod
    async def volume_usage(self) -> Usage:
        """Counts the whole bucket; the answer may be some minutes old (see `as_of`)."""

    def mount_path(self, vfid: VFolderID) -> str:
        """The absolute path that stands for the folder on agents."""
        return f"{self.path}/{vfid.managed_prefix.rstrip('/')}"
