"""Uploads: from a declared size to a published file, through this process or straight to S3 by presigned links.

S3 holds the bytes, the `uploads` row says how far an upload is and who writes. The file appears only when it is whole:

* up to one part: a single PUT under its own name, when the last byte is here (and its checksum, if given, is right);
* larger: a multipart upload, completed at the end.

What a request leaves behind the last whole part (the tail) waits as an object under `.mooring/uploads/` of the volume's
own bucket, outside of every vfolder. One request writes at a time: it holds a lease in the row, which a dead process
loses by time. `committed` never reaches the declared size before the file is published, so a client that asks knows the
truth.

Checksum: if the first request announces one (header `Upload-Checksum`), bytes are hashed as they come and a wrong sum
publishes nothing. If the upload went on in another process meanwhile, the stored file is read back and removed again
when it is wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from ..core.errors import (
    AlreadyExists,
    ChecksumMismatch,
    Conflict,
    InvalidRequest,
    LimitExceeded,
    MooringError,
    OffsetMismatch,
    UploadBusy,
    UploadNotFound,
)
from ..core.ids import VFolderID
from ..core.logs import get_logger
from ..core.paths import RelPath
from ..db import Database
from ..s3 import PartInfo
from ..s3.transfer import DEFAULT_PART, MIB, plan_part_size
from ..state import Upload, UploadMode
from .memory import MemoryBudget
from .minio import MinioVolume
from .parts import PartWriter, RunningHash
from .registry import VolumeRegistry
from .tree import FolderTree, file_metadata
from .upload_rows import UploadRows

log = get_logger(__name__)

STAGING = ".mooring/uploads/"
SESSION_METADATA = "mooring-upload"
PRESIGNED_PART = 16 * MIB
PRESIGNED_PARTS = 1000
MAX_PRESIGNED_PART = 1024 * MIB
MAX_HASHES = 1024
FILE_TYPE = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class UploadStatus:
    """How far an upload is. `offset` equals `size` only for a published file (or an empty one)."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class PresignedPart:
    number: int
    url: str
    size: int


@dataclass(frozen=True, slots=True)
class PresignedUpload:
    """Links for every part; an empty file has none. `part_size` is that of all parts but the last."""

    part_size: int
    parts: list[PresignedPart]
    expires_at: datetime


class UploadService:
    """The uploads of all volumes. One per process; several processes may share the database."""

    def __init__(
        self,
        volumes: VolumeRegistry,
        database: Database,
        *,
        memory: int,
        max_size: int,
        expire: timedelta,
        presigned_expire: timedelta,
        node_id: str,
    ) -> None:
        self._volumes = volumes
        self._rows = UploadRows(database, expire, node_id)
        self.budget = MemoryBudget(memory, DEFAULT_PART)
        self.max_size = max_size
        self._presigned_expire = presigned_expire
        self._hashes: OrderedDict[str, RunningHash] = OrderedDict()
        self.running = 0

    async def start(self) -> None:
        """Frees what a former life of this process was writing."""
        await self._rows.end_own_leases()

    # --- for the manager ----------------------------------------------------------------------------------------------

    async def begin(self, volume: MinioVolume, vfid: VFolderID, path: RelPath, size: int) -> str:
        """Opens an upload session and makes the directories above the file; returns the session id.

        Raises `LimitExceeded`, `ReadOnly`, `VFolderNotFound`, `AlreadyExists` (the name is a directory).
        """
        if size > self.max_size:
            raise LimitExceeded(
                f"The file has {size} bytes; {self.max_size} are allowed.",
                hint="Ask the operator for a higher max-upload-size.",
                detail={"max_size": self.max_size},
            )
        tree = await volume.tree(vfid, write=True)
        if await tree.is_directory(path):
            raise AlreadyExists(f"{str(path)!r} is a directory.", hint="Choose another name for the file.")
        await tree.make_parents(path)
        return await self._rows.add(volume.name, vfid, path.text, size)

    async def drop_folder(self, volume: MinioVolume, vfid: VFolderID) -> None:
        """Ends every upload into a folder that goes away."""
        rows = await self._rows.of_folder(volume.name, vfid)
        for row in rows:
            await self._drop(row)

    # --- through this process -----------------------------------------------------------------------------------------

    async def status(self, session_id: str) -> UploadStatus:
        """Raises `UploadNotFound`."""
        row = await self._row(session_id)
        return UploadStatus(row.offset, row.size)

    async def append(
        self,
        session_id: str,
        offset: int,
        source: AsyncIterator[bytes],
        *,
        length: int | None = None,
        checksum: bytes | None = None,
        announced: bool = False,
    ) -> int:
        """Adds the bytes of `source` at `offset` and returns the new offset; with the last byte the file is published.

        `checksum` is the SHA-256 of the whole file, `announced` says that one will come. When the source breaks or this
        is cancelled, whole parts and the tail are kept before the error goes on. Raises `OffsetMismatch`, `UploadBusy`,
        `UploadNotFound`, `LimitExceeded`, `ChecksumMismatch`, `DeadlineExceeded`.
        """
        self.running += 1
        try:
            async with self._lease(session_id, UploadMode.PROXIED, offset) as row:
                if row.done:
                    return row.size
                if length is not None and offset + length > row.size:
                    raise LimitExceeded(
                        f"{offset + length} bytes would be more than the {row.size} that were declared.",
                        hint="Ask for a new upload with the right size.",
                        detail={"declared": row.size},
                    )
                await self._append(row, source, checksum, announced=announced or checksum is not None)
                return row.offset
        finally:
            self.running -= 1

    async def _append(
        self, row: Upload, source: AsyncIterator[bytes], checksum: bytes | None, *, announced: bool
    ) -> None:
        """Moves `row.offset` on, also when it raises."""
        target = await self._target(row)
        row.part_size = row.part_size or plan_part_size(row.size)
        if row.size > row.part_size and row.upload_id is None:
            await _uninterrupted(self._start_multipart(row, target))
        old = row.offset
        writer = PartWriter(
            start=old,
            size=row.size,
            part_size=row.part_size,
            tail=await self._read_tail(target, row),
            budget=self.budget,
            send=lambda number, data: target.send(row.upload_id or "", number, data),
            running_hash=self._take_hash(row, announced=announced),
        )
        try:
            try:
                await writer.receive(source)
            finally:
                # Also after a broken connection or a cancel: what is on its way arrives, then it is known what we have.
                await writer.settle()
                row.offset = writer.stored
                if writer.error is None and writer.stored < writer.position < row.size:
                    await self._write_tail(target, row, writer)
                if writer.hash is not None and writer.hash.position == writer.stored:
                    self._keep_hash(row.session, writer.hash)
            if writer.position == row.size:
                await self._finish(row, target, writer, checksum)
        finally:
            await writer.close()
            if row.offset != old and old % row.part_size:
                await self._delete_tail(target, row.session, old)

    async def _finish(self, row: Upload, target: _Target, writer: PartWriter, checksum: bytes | None) -> None:
        hash_ = writer.hash
        if hash_ is not None:
            await writer.hash_tail()
            if checksum is not None and hash_.digest() != checksum:
                await self._drop(row)
                raise _wrong_sum(row)
        self._hashes.pop(row.session, None)
        if row.upload_id is None:
            metadata = file_metadata({SESSION_METADATA: row.session})
            await target.tree.folder.client.put(
                target.bucket, target.key, writer.tail, metadata=metadata, content_type=FILE_TYPE
            )
        else:
            await target.send(row.upload_id, -(-row.size // _part_size(row)), writer.tail)
            await self._complete(row, target, target.sent, all_named=False)
        row.offset, row.done = row.size, True
        if checksum is not None and hash_ is None:
            await self._read_back(row, target, checksum)

    async def _read_back(self, row: Upload, target: _Target, checksum: bytes) -> None:
        running = hashlib.sha256()
        async with await target.tree.folder.client.get(target.bucket, target.key) as stream:
            async for chunk in stream.chunks():
                await asyncio.to_thread(running.update, chunk)
        if running.digest() != checksum:
            await target.tree.folder.client.delete(target.bucket, target.key)
            await self._drop(row)
            raise _wrong_sum(row)

    # --- straight to S3 -----------------------------------------------------------------------------------------------

    async def presign(self, session_id: str) -> PresignedUpload:
        """Links for all parts; asked again, the same parts with fresh links. A file of any size but 0 is a multipart
        upload here, so it appears only at `complete`. Raises `UploadNotFound`, `Conflict` if bytes came through the
        proxy."""
        async with self._lease(session_id, UploadMode.PRESIGNED, None) as row:
            if row.done:
                raise UploadNotFound("This upload is finished.", hint="Ask for a new one.")
            target = await self._target(row)
            preferred = min(max(PRESIGNED_PART, -(-row.size // (PRESIGNED_PARTS * MIB)) * MIB), MAX_PRESIGNED_PART)
            row.part_size = part_size = row.part_size or plan_part_size(row.size, preferred)
            if row.size and row.upload_id is None:
                await _uninterrupted(self._start_multipart(row, target))
            seconds = int(self._presigned_expire.total_seconds())
            expires_at = datetime.now(UTC) + self._presigned_expire
            parts = []
            for number, start in enumerate(range(0, row.size, part_size), start=1):
                url = target.tree.folder.client.presign_part(
                    target.bucket, target.key, row.upload_id or "", number, expires=seconds
                )
                parts.append(PresignedPart(number, url, min(part_size, row.size - start)))
                if number % 100 == 0:
                    await asyncio.sleep(0)  # 0.1 ms each: let others in between
            return PresignedUpload(part_size, parts, expires_at)

    async def complete(self, session_id: str, parts: Mapping[int, str]) -> None:
        """Publishes a presigned upload: `parts` maps numbers to ETags. Sizes are those that S3 has, not what the client
        says.

        Raises `InvalidRequest` naming the parts that are missing or wrong; they may be sent again. Idempotent.
        """
        async with self._lease(session_id, UploadMode.PRESIGNED, None) as row:
            if row.done:
                return
            target = await self._target(row)
            if row.size == 0:
                metadata = file_metadata({SESSION_METADATA: row.session})
                await target.tree.folder.client.put(
                    target.bucket, target.key, b"", metadata=metadata, content_type=FILE_TYPE
                )
            elif row.upload_id is None:
                raise InvalidRequest("No link was asked for yet.", hint="Ask for the links of the parts first.")
            else:
                etags = {number: etag.strip('"') for number, etag in parts.items()}
                await self._complete(row, target, etags, all_named=True)
            row.offset, row.done = row.size, True

    async def _complete(self, row: Upload, target: _Target, etags: Mapping[int, str], *, all_named: bool) -> None:
        """Checks every part against the declared size and the ETags that are known, then publishes."""
        part_size = _part_size(row)
        count = -(-row.size // part_size)
        stored = await target.parts(row.upload_id or "")
        chosen: list[PartInfo] = []
        wrong: dict[str, object] = {}
        for number in range(1, count + 1):
            wanted = part_size if number < count else row.size - (count - 1) * part_size
            # SeaweedFS lists each version of a part that was sent twice, so there may be several.
            versions = [part for part in stored if part.number == number]
            if number in etags or all_named:
                versions = [part for part in versions if part.etag == etags.get(number)]
            right = [part for part in versions if part.size == wanted]
            if right:
                chosen.append(right[-1])
            elif versions:
                wrong[str(number)] = f"has {versions[-1].size} bytes, not {wanted}"
            else:
                wrong[str(number)] = "missing, or has another ETag"
        wrong |= {str(number): "is one too many" for number in etags if number > count}
        if wrong:
            raise InvalidRequest(
                f"{len(wrong)} of {count} parts are not right.",
                hint="Send these parts again, then complete the upload.",
                detail=dict(list(wrong.items())[:20]),
            )
        client = target.tree.folder.client
        await client.complete_multipart(target.bucket, target.key, row.upload_id or "", chosen)

    # --- rows and leases ----------------------------------------------------------------------------------------------

    async def _row(self, session_id: str) -> Upload:
        """The row; if its writer died, first brought in line with what S3 has."""
        row = await self._rows.get(session_id)
        if row.lease is not None and row.lease_until is not None and row.lease_until < datetime.now(UTC):
            await self._recover(row)
        return row

    async def _recover(self, row: Upload) -> None:
        dead, row.lease = row.lease, None
        target = await self._target(row)
        published = False
        if row.mode == UploadMode.PROXIED and row.upload_id is not None:
            try:
                whole, part_size = 0, _part_size(row)
                stored = {part.number for part in await target.parts(row.upload_id) if part.size == part_size}
                while whole + 1 in stored and (whole + 1) * part_size < row.size:
                    whole += 1
                row.offset = max(row.offset, whole * part_size)
            except UploadNotFound:
                published = True
        if published or row.upload_id is None:
            info = await target.tree.head_file(RelPath(row.relpath))
            row.done = info is not None and info.metadata.get(SESSION_METADATA) == row.session
            if published and not row.done:
                await self._rows.forget(row.session)
                raise UploadNotFound("The object store has dropped this upload.", hint="Ask for a new one.")
            row.offset = row.size if row.done else row.offset
        await self._rows.save_recovered(row, dead)
        log.info("recovered an upload of a dead writer", session=row.session, offset=row.offset, done=row.done)

    @contextlib.asynccontextmanager
    async def _lease(self, session_id: str, mode: UploadMode, offset: int | None) -> AsyncIterator[Upload]:
        """The row, while nobody else may write it; what the caller changed in it is saved at the end, whatever
        happens."""
        row = await self._row(session_id)
        async with self._rows.lease(row, mode, offset) as got:
            if not got:
                raise await self._why_not(session_id, mode, offset)
            yield row

    async def _why_not(self, session_id: str, mode: UploadMode, offset: int | None) -> MooringError:
        row = await self._row(session_id)
        if row.mode is not None and row.mode != mode:
            return Conflict(f"This upload is {row.mode} already.", hint="Finish it that way, or ask for a new one.")
        if offset is not None and row.offset != offset:
            return OffsetMismatch(
                f"The upload stands at {row.offset}, not at {offset}.",
                hint="Ask for the offset with HEAD and go on there.",
                detail={"offset": row.offset},
            )
        return UploadBusy(
            "Another request writes this upload.", hint="Wait, ask for the offset with HEAD, go on there."
        )

    # --- what lies in S3 ----------------------------------------------------------------------------------------------

    async def _target(self, row: Upload) -> _Target:
        volume = self._volumes.get(row.volume)
        tree = await volume.tree(VFolderID.parse(row.vfid), write=True)
        return _Target(volume, tree, tree.folder.ref.bucket, tree.key(RelPath(row.relpath)))

    async def _start_multipart(self, row: Upload, target: _Target) -> None:
        row.upload_id = await target.tree.folder.client.create_multipart(
            target.bucket, target.key, metadata=file_metadata({SESSION_METADATA: row.session}), content_type=FILE_TYPE
        )
        await self._rows.save_multipart(row)

    async def _read_tail(self, target: _Target, row: Upload) -> bytes:
        length = row.offset % _part_size(row)
        if not length:
            return b""
        client = await target.volume.client()
        async with await client.get(target.volume.bucket, _tail_key(row.session, row.offset)) as stream:
            data = await stream.read()
        if len(data) != length:
            raise UploadNotFound("The kept bytes of this upload are damaged.", hint="Ask for a new upload.")
        return data

    async def _write_tail(self, target: _Target, row: Upload, writer: PartWriter) -> None:
        client = await target.volume.client()
        await client.put(target.volume.bucket, _tail_key(row.session, writer.position), writer.tail)
        row.offset = writer.position

    async def _delete_tail(self, target: _Target, session_id: str, offset: int) -> None:
        try:
            await (await target.volume.client()).delete(target.volume.bucket, _tail_key(session_id, offset))
        except MooringError as err:
            log.info("a kept rest of an upload stays until it expires", session=session_id, error=str(err))

    def _take_hash(self, row: Upload, *, announced: bool) -> RunningHash | None:
        """The running hash if it has seen every whole part so far, a new one at the start if a checksum will come."""
        known = self._hashes.pop(row.session, None)
        whole = row.offset - row.offset % _part_size(row)
        if known is not None and known.position == whole:
            return known
        return RunningHash() if announced and whole == 0 else None

    def _keep_hash(self, session_id: str, running: RunningHash) -> None:
        self._hashes[session_id] = running
        while len(self._hashes) > MAX_HASHES:
            self._hashes.popitem(last=False)

    # --- the end of uploads -------------------------------------------------------------------------------------------

    async def sweep(self) -> int:
        """Drops expired uploads with all that they left in S3; returns how many. Called now and then."""
        rows = await self._rows.expired()
        for row in rows:
            await self._drop(row)
        return len(rows)

    async def _drop(self, row: Upload) -> None:
        """Removes what the upload left, then its row. A server that does not answer keeps the row for the next time."""
        self._hashes.pop(row.session, None)
        try:
            volume = self._volumes.get(row.volume)
            client = await volume.client()
            async for page in client.list(volume.bucket, f"{STAGING}{row.session}/"):
                await client.delete_many(volume.bucket, [info.key for info in page.objects])
            if row.upload_id is not None and not row.done:
                folder = await volume.place(VFolderID.parse(row.vfid))
                await folder.client.abort_multipart(folder.ref.bucket, folder.ref.key(row.relpath), row.upload_id)
        except MooringError as err:
            if err.temporary:
                raise
            log.info("an expired upload could not be cleaned up", session=row.session, error=str(err))
        await self._rows.forget(row.session)


@dataclass(frozen=True, slots=True)
class _Target:
    """Where an upload goes."""

    volume: MinioVolume
    tree: FolderTree
    bucket: str
    key: str
    sent: dict[int, str] = field(default_factory=dict)  # ETags of the parts that this request stored

    async def send(self, upload_id: str, number: int, data: memoryview) -> None:
        part = await self.tree.folder.client.upload_part(self.bucket, self.key, upload_id, number, data)
        self.sent[number] = part.etag

    async def parts(self, upload_id: str) -> list[PartInfo]:
        return await self.tree.folder.client.list_parts(self.bucket, self.key, upload_id)


def _part_size(row: Upload) -> int:
    return row.part_size or plan_part_size(row.size)


def _tail_key(session_id: str, offset: int) -> str:
    # Named by the offset, so the old tail stays good until the row says otherwise.
    return f"{STAGING}{session_id}/{offset}"


def _wrong_sum(row: Upload) -> ChecksumMismatch:
    return ChecksumMismatch(
        f"The {row.size} bytes of {row.relpath!r} have another SHA-256 than was given; the file was not kept.",
        hint="Compare the file with its source and upload it again from the start.",
    )


async def _uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Runs `work` to its end even if this is cancelled meanwhile; then the cancel goes on."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
