"""`FolderTree`: files and directories of one folder, on object keys.

A file is an object whose key is its path. A directory exists if its marker (`dir/`, zero bytes, content type
application/x-directory) or anything below it does. Owner, mode and time live in the metadata names of s3fs (uid, gid,
mode, mtime), so files written here look right on a mount and the other way round.

Whether something is a directory is asked by LIST, never by HEAD of `dir/`: SeaweedFS answers that for directories that
are gone and for files of the same name. Names are never replaced by a move or a copy; S3 has no rename, so these copy
first and delete last: a failure in between leaves the source whole.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import stat as stat_
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime

from ..core.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FileNotFound,
    InvalidPath,
    InvalidRequest,
    MooringError,
    ReadOnly,
    S3AccessDenied,
    S3Error,
)
from ..core.logs import get_logger
from ..core.paths import RelPath
from ..s3 import ListPage, ObjectInfo, S3Client
from .interface import EPOCH, Entry, EntryPage, EntryType, Folder, Usage

log = get_logger(__name__)

DIRECTORY_TYPE = "application/x-directory"
FILE_MODE = stat_.S_IFREG | 0o644
DIRECTORY_MODE = stat_.S_IFDIR | 0o755
MAX_PAGE = 1000
COPY_PARALLEL = 8
USAGE_DEADLINE = 240.0  # seconds; a manager waits 300


def file_metadata(extra: dict[str, str] | None = None) -> dict[str, str]:
    """Metadata of a new file, as s3fs writes it."""
    return {"uid": "0", "gid": "0", "mode": str(FILE_MODE), "mtime": str(int(time.time())), **(extra or {})}


def directory_metadata() -> dict[str, str]:
    return {"uid": "0", "gid": "0", "mode": str(DIRECTORY_MODE), "mtime": str(int(time.time()))}


class FolderTree:
    """Made by `Volume.tree`. Paths are guarded already; writes to a read-only folder raise `ReadOnly`."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._client: S3Client = folder.client
        self._bucket = folder.ref.bucket

    def key(self, path: RelPath) -> str:
        return self.folder.ref.key(path.text)

    def prefix(self, path: RelPath) -> str:
        return self.folder.ref.key(path.as_prefix)

    # --- looking ------------------------------------------------------------------------------------------------------

    async def is_directory(self, path: RelPath) -> bool:
        # Two, not one: SeaweedFS ends a listing of one entry after a marker.
        page = await self._client.list_page(self._bucket, self.prefix(path), max_keys=2)
        return bool(page.objects or page.prefixes)

    async def head_file(self, path: RelPath) -> ObjectInfo | None:
        """The file of that name, or None. The root is no file."""
        if path.is_root:
            return None
        try:
            return await self._client.head(self._bucket, self.key(path))
        except FileNotFound:
            return None

    async def open_file(self, path: RelPath) -> ObjectInfo:
        """Raises `FileNotFound` for a missing file, `InvalidPath` for a directory."""
        info = await self.head_file(path)
        if info is not None:
            return info
        if path.is_root or await self.is_directory(path):
            raise InvalidPath(f"{str(path)!r} is a directory.", hint="Give the path of a file in the folder.")
        raise _missing(path)

    async def stat(self, path: RelPath) -> Entry:
        """A file wins over a directory of the same name, as on a mount. Raises `FileNotFound`."""
        info = await self.head_file(path)
        if info is not None:
            return Entry(
                path.name,
                EntryType.FILE,
                _number(info.metadata.get("mode"), FILE_MODE),
                info.size,
                _mtime(info),
                info.etag,
            )
        if path.is_root or await self.is_directory(path):
            return Entry(path.name, EntryType.DIRECTORY, DIRECTORY_MODE, 0, EPOCH)
        raise _missing(path)

    async def list_dir(self, path: RelPath, *, cursor: str | None = None, limit: int = MAX_PAGE) -> EntryPage:
        """At most `limit` (1 to 1,000) entries, in the server's order. Raises `FileNotFound` when there is nothing
        there.

        `cursor` comes from the page before; `InvalidRequest` for any other text.
        """
        token, skip = _parse_cursor(cursor)
        prefix = self.prefix(path)
        skipped = 0
        while True:
            page = await self._page(prefix, token, max(2, limit), from_outside=cursor is not None)
            if cursor is None and not page.objects and not page.prefixes:
                if not path.is_root:
                    if await self.head_file(path) is not None:
                        raise InvalidPath(f"{str(path)!r} is a file.", hint="List the directory that holds it.")
                    raise _missing(path)
                return EntryPage([], None)
            entries, bad = _entries(page, prefix)
            skipped += bad
            if len(entries) > skip + limit:
                return EntryPage(entries[skip : skip + limit], _make_cursor(token, skip + limit), skipped)
            following = _make_cursor(page.continuation, 0) if page.continuation else None
            if following is None or len(entries) > skip:
                return EntryPage(entries[skip:], following, skipped)
            token, skip, cursor = page.continuation, 0, ""  # a page of the marker alone: go on

    async def _page(self, prefix: str, token: str | None, limit: int, *, from_outside: bool) -> ListPage:
        try:
            return await self._client.list_page(
                self._bucket, prefix, delimiter="/", continuation=token, max_keys=min(limit, MAX_PAGE)
            )
        except S3Error as err:
            if from_outside and err.detail.get("s3_code") in ("InvalidArgument", "IncorrectContinuationToken"):
                raise _bad_cursor() from None
            raise

    async def walk(self, path: RelPath) -> AsyncIterator[list[ObjectInfo]]:
        """Every object below a directory, its marker included, page by page."""
        prefix = self.prefix(path)
        async for page in self._client.list(self._bucket, prefix):
            # A server that ignored the prefix must not make us delete a neighbour.
            yield [info for info in page.objects if info.key.startswith(prefix)]

    async def usage(self) -> Usage:
        return await measure(self._client, self._bucket, self.folder.ref.prefix)

    # --- changing -----------------------------------------------------------------------------------------------------

    def _writable(self) -> None:
        if self.folder.read_only:
            raise ReadOnly("The folder is bound read-only.", hint="Bind it again with read_only = false.")

    async def mkdir(self, path: RelPath, *, parents: bool = True, exist_ok: bool = False) -> None:
        """Makes a directory. Raises `AlreadyExists`, or `FileNotFound` for a missing parent without `parents`."""
        self._writable()
        if await self.head_file(path) is not None:
            raise AlreadyExists(f"{str(path)!r} is a file.", hint="Choose another name.")
        if path.is_root or await self.is_directory(path):
            if exist_ok:
                return
            raise AlreadyExists(f"Directory {str(path)!r} exists.", hint="Send exist_ok to accept that.")
        if not parents and not path.parent.is_root and not await self.is_directory(path.parent):
            raise _missing(path.parent)
        await self.make_parents(path)
        await self._put_marker(path)

    async def make_parents(self, path: RelPath) -> None:
        """Puts the missing markers of the directories above `path`, so that they outlive their last file and are seen
        by drivers that know markers only. Raises `AlreadyExists` when one of them is a file."""
        missing: list[RelPath] = []
        parent = path.parent
        while not parent.is_root:
            if await self.head_file(parent) is not None:
                raise AlreadyExists(f"{str(parent)!r} is a file, not a directory.", hint="Choose another path.")
            if await self.is_directory(parent):
                break
            missing.append(parent)
            parent = parent.parent
        for directory in reversed(missing):
            await self._put_marker(directory)

    async def _put_marker(self, path: RelPath) -> None:
        await self._client.put(
            self._bucket, self.prefix(path), b"", metadata=directory_metadata(), content_type=DIRECTORY_TYPE
        )

    async def move(self, source: RelPath, target: RelPath, *, into: bool = True) -> RelPath:
        """Moves a file or a tree; returns where it is now. Into an existing directory, if `into`.

        Raises `FileNotFound`, `AlreadyExists`, or `InvalidPath` for a move into itself.
        """
        self._writable()
        target = await self._transfer(source, target, into=into)
        if await self.head_file(source) is not None:
            await self._client.delete(self._bucket, self.key(source))
        else:
            await self._delete_tree(source)
        return target

    async def copy(self, source: RelPath, target: RelPath, *, into: bool = True) -> RelPath:
        """Copies a file or a tree inside the server; otherwise as `move`."""
        self._writable()
        return await self._transfer(source, target, into=into)

    async def _transfer(self, source: RelPath, target: RelPath, *, into: bool) -> RelPath:
        if source.is_root:
            raise InvalidPath("The folder itself cannot be moved or copied.", hint="Name something inside it.")
        info = await self.head_file(source)
        if info is None and not await self.is_directory(source):
            raise _missing(source)
        if target.is_root or (into and await self.is_directory(target)):
            target = target.child(source.name)
        if target == source or (info is None and target.is_inside(source)):
            raise InvalidPath(f"{str(source)!r} cannot be put into itself.", hint="Choose another target.")
        if await self.head_file(target) is not None or await self.is_directory(target):
            raise AlreadyExists(f"{str(target)!r} exists.", hint="Delete it first, or choose another name.")
        await self.make_parents(target)
        if info is not None:
            await self._client.copy(self._bucket, info.key, self._bucket, self.key(target), size=info.size)
        else:
            await self._copy_tree(source, target)
        return target

    async def _copy_tree(self, source: RelPath, target: RelPath) -> None:
        old, new = self.prefix(source), self.prefix(target)
        made: list[str] = []
        slots = asyncio.Semaphore(COPY_PARALLEL)

        async def copy_one(info: ObjectInfo) -> None:
            key = new + info.key.removeprefix(old)
            async with slots:
                made.append(key)
                if info.key.endswith("/"):
                    # Markers are made anew: not every server copies them, and they have no content.
                    metadata = directory_metadata()
                    await self._client.put(self._bucket, key, b"", metadata=metadata, content_type=DIRECTORY_TYPE)
                else:
                    await self._client.copy(self._bucket, info.key, self._bucket, key, size=info.size)

        try:
            async for objects in self.walk(source):
                async with asyncio.TaskGroup() as group:
                    for info in objects:
                        group.create_task(copy_one(info))
        except BaseException as err:
            # The target did not exist before, so what is there is ours alone.
            await asyncio.shield(self._client.delete_many(self._bucket, made))
            if isinstance(err, ExceptionGroup):
                raise err.exceptions[0] from None
            raise

    async def remove(self, paths: Sequence[RelPath], *, recursive: bool = False) -> int:
        """Deletes files, and directories if `recursive`; returns how many objects went. Missing names, and directories
        without `recursive`, are passed over. Repeat it after a failure."""
        self._writable()
        files: list[str] = []
        trees: list[RelPath] = []
        for path in paths:
            if path.is_root:
                raise InvalidPath("The folder itself is not deleted this way.", hint="Delete the folder.")
        for path in paths:
            if await self.head_file(path) is not None:
                files.append(self.key(path))
            elif recursive:
                trees.append(path)
        await self._delete_keys(files)
        return len(files) + sum([await self._delete_tree(path) for path in trees])

    async def remove_everything(self) -> int:
        """Deletes every object of the folder, the folder's own marker last, so that a failure can be repeated."""
        prefix = self.folder.ref.prefix
        count = 0
        async for objects in self.walk(RelPath("")):
            keys = [info.key for info in objects if info.key != prefix]
            await self._delete_keys(keys)
            count += len(keys)
        await self._client.delete(self._bucket, prefix)
        return count + 1

    async def _delete_tree(self, path: RelPath) -> int:
        count = 0
        async for objects in self.walk(path):
            # Deepest first: SeaweedFS keeps the entry of a directory whose marker went before its files.
            keys = sorted((info.key for info in objects), reverse=True)
            await self._delete_keys(keys)
            count += len(keys)
        return count

    async def _delete_keys(self, keys: list[str]) -> None:
        failures = await self._client.delete_many(self._bucket, keys) if keys else []
        if failures:
            first = failures[0]
            kind: type[MooringError] = S3AccessDenied if first.code == "AccessDenied" else S3Error
            raise kind(
                f"{len(failures)} of {len(keys)} objects were not deleted, the first is {first.key!r} ({first.code}).",
                hint="Check the policy of the bucket and repeat the request.",
                detail={"s3_code": first.code, "key": first.key},
            )


async def measure(client: S3Client, bucket: str, prefix: str) -> Usage:
    """Sums a LIST of everything below `prefix`, within `USAGE_DEADLINE` (else `DeadlineExceeded`)."""
    start = datetime.now(UTC)
    count = total = newer = 0
    try:
        async with asyncio.timeout(USAGE_DEADLINE):
            async for page in client.list(bucket, prefix):
                for info in page.objects:
                    total += info.size
                    count += not info.key.endswith("/")
                    # S3 gives whole seconds, so the second of the start itself counts as newer.
                    if info.last_modified is None or info.last_modified >= start.replace(microsecond=0):
                        newer += info.size
    except TimeoutError:
        raise DeadlineExceeded(
            f"Counting s3://{bucket}/{prefix} took over {USAGE_DEADLINE:.0f} s; {count} files had been seen.",
            hint="It is a very large folder: ask again at a quieter time.",
        ) from None
    return Usage(count, total, start, newer)


def _entries(page: ListPage, prefix: str) -> tuple[list[Entry], int]:
    """(entries, number of keys that cannot be a name). The marker of the directory itself is not an entry."""
    found: list[Entry] = []
    skipped = 0
    root = RelPath("")
    for text in page.prefixes:
        name = text.removeprefix(prefix).removesuffix("/")
        try:
            found.append(Entry(root.child(name).text, EntryType.DIRECTORY, DIRECTORY_MODE, 0, EPOCH))
        except InvalidPath:
            skipped += 1
    for info in page.objects:
        if info.key == prefix:
            continue
        try:
            name = root.child(info.key.removeprefix(prefix)).text
            found.append(Entry(name, EntryType.FILE, FILE_MODE, info.size, info.last_modified or EPOCH, info.etag))
        except InvalidPath:
            skipped += 1
    return found, skipped


def _make_cursor(token: str | None, skip: int) -> str:
    return base64.urlsafe_b64encode(json.dumps([token, skip]).encode()).decode()


def _parse_cursor(cursor: str | None) -> tuple[str | None, int]:
    if cursor is None:
        return None, 0
    try:
        token, skip = json.loads(base64.b64decode(cursor, altchars=b"-_", validate=True))
    except (ValueError, TypeError, RecursionError, binascii.Error):
        raise _bad_cursor() from None
    if not (token is None or (isinstance(token, str) and len(token) <= 4096)) or type(skip) is not int:
        raise _bad_cursor()
    if not 0 <= skip <= MAX_PAGE:
        raise _bad_cursor()
    return token, skip


def _bad_cursor() -> InvalidRequest:
    return InvalidRequest(
        "The cursor is not one of ours.",
        hint="Send next_cursor of the page before, unchanged.",
        detail={"cursor": "invalid"},
    )


def _missing(path: RelPath) -> FileNotFound:
    return FileNotFound(f"{str(path)!r} does not exist in this folder.")


def _mtime(info: ObjectInfo) -> datetime:
    """s3fs keeps the time of the last write as seconds, perhaps with a fraction, in metadata."""
    try:
        return datetime.fromtimestamp(float(info.metadata["mtime"]), UTC)
    except (KeyError, ValueError, OverflowError, OSError):
        return info.last_modified or EPOCH


def _number(text: str | None, default: int) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() else default
