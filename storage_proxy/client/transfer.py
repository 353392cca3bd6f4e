"""Moving files and trees between this machine and folders, through the public APIs: what `mooring folder put|get` and
programs use.

A ticket comes from the manager extension, the bytes go to the client port of the storage proxy (`Mode.PROXIED`) or, by
presigned URLs, straight to the object store (`Mode.PRESIGNED`). Broken connections are resumed, with a bound on
failures in a row. `progress` is called on the event loop with counts of bytes; negative when some have to be sent
again.
"""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Self, TypeVar

from ..core.errors import InvalidPath, MooringError, NotFound, UsageError
from ..core.paths import RelPath
from .channel import Channels, together
from .downloading import Downloaded, FileDownload, PartFile, file_size
from .localtree import LocalFile, LocalScan, LocalTarget, Remark, local_error, open_source, scan_file, scan_tree
from .manager import ManagerClient
from .proxy import EntryType
from .uploading import FileUpload, Mode, Progress, Uploaded

__all__ = [
    "Downloaded",
    "Failure",
    "LocalFile",
    "LocalScan",
    "Mode",
    "Progress",
    "Remark",
    "RemoteFile",
    "RemoteScan",
    "TransferClient",
    "TransferReport",
    "Uploaded",
    "scan_file",
    "scan_tree",
]

FILES_AT_ONCE = 8
SPOOL_CHUNK = 1024 * 1024

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Failure:
    """A file that did not arrive; the others did."""

    path: str
    error: MooringError


@dataclass(slots=True)
class TransferReport:
    """What happened. `bytes` of the files that arrived; `sha256` maps each uploaded name to its hash in hex."""

    files: int = 0
    bytes: int = 0
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    skipped: list[Remark] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)

    def raise_first(self) -> None:
        """Raises the first failure, if there is one."""
        if self.failures:
            raise self.failures[0].error


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file in a folder; `target` is its name below the local directory."""

    relpath: str
    size: int
    target: str


@dataclass(slots=True)
class RemoteScan:
    """What a directory of a folder holds. `refused`: names that cannot be files below a local directory."""

    files: list[RemoteFile] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)
    refused: list[Remark] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


class TransferClient:
    """Transfers for one `ManagerClient`. Use as an async context manager, or call `close`."""

    def __init__(self, manager: ManagerClient, *, mode: Mode = Mode.PROXIED, ca_file: Path | None = None) -> None:
        self._manager = manager
        self._mode = mode
        self._channels = Channels(ca_file=ca_file)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channels.close()

    # --- up -----------------------------------------------------------------------------------------------------------

    async def upload_file(
        self,
        folder: str,
        relpath: str,
        source: Path | BinaryIO,
        *,
        mode: Mode | None = None,
        progress: Progress | None = None,
    ) -> Uploaded:
        """Uploads one file, replacing one of that name. A stream without a file behind it (a pipe) is written to a
        temporary file first, because its size must be known before.

        Raises `InvalidPath`, `UsageError` (unreadable), `ReadOnly`, `LimitExceeded`, `IntegrityError` (changed while it
        was read), `ServiceUnavailable`. Cancelling cuts the connection; what the proxy has stored of it expires there.
        """
        name = RelPath.parse_file(relpath).text
        async with _opened(source, name) as (fd, size):
            return await self._upload(folder, name, fd, size, mode, progress)

    async def upload_tree(
        self,
        folder: str,
        local_dir: Path,
        dest: str = "",
        *,
        concurrency: int = FILES_AT_ONCE,
        mode: Mode | None = None,
        progress: Progress | None = None,
    ) -> TransferReport:
        """Everything below `local_dir` into the directory `dest` of the folder. Raises `InvalidPath` before anything is
        sent when a name cannot be a name in a folder; a file that fails is in the report and the others go on."""
        scan = await asyncio.to_thread(scan_tree, local_dir, dest)
        scan.refuse_invalid()
        return await self.upload_scan(folder, scan, concurrency=concurrency, mode=mode, progress=progress)

    async def upload_scan(
        self,
        folder: str,
        scan: LocalScan,
        *,
        concurrency: int = FILES_AT_ONCE,
        mode: Mode | None = None,
        progress: Progress | None = None,
    ) -> TransferReport:
        report = TransferReport(skipped=list(scan.skipped))

        async def send(file: LocalFile) -> None:
            with open_source(file) as fd:
                size = os.fstat(fd).st_size
                done = await self._upload(folder, file.relpath, fd, size, mode, progress)
            report.files += 1
            report.bytes += done.size
            report.sha256[done.relpath] = done.sha256

        async def make(directory: str) -> None:
            await self._manager.mkdir(folder, directory, parents=True, exist_ok=True)

        begin = time.monotonic()
        await _each(scan.empty_dirs, make, lambda name: name, concurrency, report)
        await _each(scan.files, send, lambda file: str(file.path), concurrency, report)
        report.seconds = time.monotonic() - begin
        return report

    async def _upload(
        self, folder: str, relpath: str, fd: int, size: int, mode: Mode | None, progress: Progress | None
    ) -> Uploaded:
        upload = FileUpload(self._channels, self._manager, folder, relpath, fd, size, progress)
        return await upload.run(mode or self._mode)

    # --- what is there ------------------------------------------------------------------------------------------------

    async def is_directory(self, folder: str, path: str) -> bool:
        """False for a file and for what does not exist. `path` is guarded; empty is the folder itself."""
        try:
            await self._manager.files(folder, path or ".", limit=1)
        except (NotFound, UsageError):
            return False
        return True

    async def size(self, folder: str, relpath: str) -> int:
        """Bytes of a file. Raises `FileNotFound`."""
        ticket = await self._manager.request_download(folder, RelPath.parse_file(relpath).text)
        return await file_size(self._channels, ticket, relpath)

    # --- down ---------------------------------------------------------------------------------------------------------

    async def download_file(
        self,
        folder: str,
        relpath: str,
        target: Path,
        *,
        mode: Mode | None = None,
        progress: Progress | None = None,
        checksum: bool = False,
    ) -> Downloaded:
        """Downloads one file to the path `target`, replacing a file there once it is complete. A large download that
        broke off goes on where it stopped, also in a later call. `checksum` adds the SHA-256 of what is on the disk.

        Raises `FileNotFound`, `UsageError` (the target cannot be written), `NoSpace`, `Conflict`, `ServiceUnavailable`.
        """
        name = RelPath.parse_file(relpath).text
        local = RelPath.parse_file(target.name)
        with LocalTarget(target.parent) as place:
            return await self._download(folder, name, place, local, mode, progress, checksum)

    async def download_tree(
        self,
        folder: str,
        path: str,
        local_dir: Path,
        *,
        concurrency: int = FILES_AT_ONCE,
        mode: Mode | None = None,
        progress: Progress | None = None,
    ) -> TransferReport:
        """Everything below the directory `path` of the folder into `local_dir`."""
        scan = await self.scan_remote(folder, path)
        return await self.download_scan(folder, scan, local_dir, concurrency=concurrency, mode=mode, progress=progress)

    async def download_scan(
        self,
        folder: str,
        scan: RemoteScan,
        local_dir: Path,
        *,
        concurrency: int = FILES_AT_ONCE,
        mode: Mode | None = None,
        progress: Progress | None = None,
        checksum: bool = False,
    ) -> TransferReport:
        report = TransferReport(skipped=list(scan.refused))
        begin = time.monotonic()
        with LocalTarget(local_dir) as place:

            async def make(directory: str) -> None:
                os.close(place.open_directory(RelPath.parse(directory)))

            async def get(file: RemoteFile) -> None:
                local = RelPath.parse_file(file.target)
                done = await self._download(folder, file.relpath, place, local, mode, progress, checksum)
                report.files += 1
                report.bytes += done.size
                if done.sha256 is not None:
                    report.sha256[done.relpath] = done.sha256

            await _each(scan.directories, make, lambda name: name, concurrency, report)
            await _each(scan.files, get, lambda file: file.relpath, concurrency, report)
        report.seconds = time.monotonic() - begin
        return report

    async def scan_remote(self, folder: str, path: str = "", prefix: str = "") -> RemoteScan:
        """Lists everything below a directory of a folder; targets are below `prefix`.

        Names that a local directory cannot hold safely (`..`, control characters) are listed as refused.
        """
        scan = RemoteScan()
        todo = [(RelPath.parse(path), RelPath.parse(prefix))]
        if not todo[0][1].is_root:
            scan.directories.append(todo[0][1].text)
        while todo:
            remote, local = todo.pop()
            cursor: str | None = None
            while True:
                page = await self._manager.files(folder, str(remote), cursor=cursor)
                for entry in page.items:
                    try:
                        name, target = remote.child(entry.name), local.child(entry.name)
                    except InvalidPath as err:
                        scan.refused.append(Remark(f"{remote}/{entry.name}", err.message))
                        continue
                    if entry.type is EntryType.DIRECTORY:
                        todo.append((name, target))
                        scan.directories.append(target.text)
                    elif entry.type is EntryType.FILE:
                        scan.files.append(RemoteFile(name.text, entry.stat.size, target.text))
                    else:
                        scan.refused.append(Remark(name.text, "neither a file nor a directory"))
                if not page.next_cursor:
                    break
                cursor = page.next_cursor
        return scan

    async def _download(
        self,
        folder: str,
        relpath: str,
        place: LocalTarget,
        local: RelPath,
        mode: Mode | None,
        progress: Progress | None,
        checksum: bool,
    ) -> Downloaded:
        with PartFile(place, local) as part:
            download = FileDownload(self._channels, self._manager, folder, relpath, part, mode or self._mode, progress)
            return await download.run(checksum=checksum)


async def _each(
    items: Sequence[T],
    action: Callable[[T], Awaitable[None]],
    name: Callable[[T], str],
    concurrency: int,
    report: TransferReport,
) -> None:
    """Runs `action` on all, some at a time. What fails is noted; what would fail for every file ends everything."""
    todo = iter(items)

    async def work() -> None:
        for item in todo:
            try:
                await action(item)
            except MooringError as err:
                report.failures.append(Failure(name(item), err))

    async with together() as group:
        for _ in range(max(1, min(concurrency, len(items)))):
            group.create_task(work())


@asynccontextmanager
async def _opened(source: Path | BinaryIO, name: str) -> AsyncIterator[tuple[int, int]]:
    """A seekable file descriptor and the size behind it."""
    if isinstance(source, Path):
        with open_source(scan_file(source, name)) as fd:
            yield fd, os.fstat(fd).st_size
        return
    try:
        fd = source.fileno()
        regular = stat.S_ISREG(os.fstat(fd).st_mode) and source.tell() == 0
    except (OSError, io.UnsupportedOperation):
        regular = False
    if regular:
        yield fd, os.fstat(fd).st_size
        return
    with tempfile.TemporaryFile(prefix="mooring-") as spool:
        try:
            await _spool(source, spool)
            spool.flush()
        except OSError as err:
            raise local_error(err, f"The input for {name}, kept in {tempfile.gettempdir()},") from None
        yield spool.fileno(), os.fstat(spool.fileno()).st_size


async def _spool(source: BinaryIO, spool: BinaryIO) -> None:
    """Copies a stream to its end. A pipe or terminal is read on the loop: a thread that waits for a person to type
    could not be cancelled."""
    try:
        mode = os.fstat(source.fileno()).st_mode
    except (OSError, io.UnsupportedOperation):
        await asyncio.to_thread(shutil.copyfileobj, source, spool, SPOOL_CHUNK)
        return
    if stat.S_ISREG(mode):
        await asyncio.to_thread(shutil.copyfileobj, source, spool, SPOOL_CHUNK)
        return
    reader = asyncio.StreamReader(limit=SPOOL_CHUNK)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(os.dup(source.fileno()), "rb", buffering=0)
    )
    try:
        while chunk := await reader.read(SPOOL_CHUNK):
            spool.write(chunk)
    finally:
        transport.close()
        os.set_blocking(source.fileno(), True)  # the flag is shared with whoever else has the terminal open
