"""`UploadRows`: the rows of the `uploads` table and who may write them.

A lease is a random id with an end. Taking it is one conditional UPDATE, which also compares the offset, so of two
requests at the same place one wins on any database. The holder renews it; one that died loses it when it starts again,
or by time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy import ColumnElement, delete, or_, select, update
from sqlalchemy.engine import CursorResult

from ..core.errors import MooringError, UploadNotFound
from ..core.ids import VFolderID, VolumeName
from ..core.logs import get_logger
from ..db import Database
from ..state import Upload, UploadMode

log = get_logger(__name__)

LEASE = timedelta(seconds=30)
RENEW_SECONDS = 10.0
KEEP_DONE = timedelta(hours=1)


class UploadRows:
    """`expire`: how long an upload lives after its last request. `node_id` tells the processes of one database
    apart."""

    def __init__(self, database: Database, expire: timedelta, node_id: str) -> None:
        self._database = database
        self._expire = expire
        self._owner = hashlib.sha256(node_id.encode()).hexdigest()[:8]

    async def end_own_leases(self) -> None:
        """At start: whatever this node held belongs to its former life, so nobody has to wait for its end."""
        async with self._database.session() as session:
            mine = update(Upload).where(Upload.lease.startswith(self._owner))
            await session.execute(mine.values(lease_until=datetime.now(UTC) - timedelta(seconds=1)))

    async def add(self, volume: VolumeName, vfid: VFolderID, relpath: str, size: int) -> str:
        """A new row; returns the session id."""
        session_id, now = uuid.uuid4().hex, datetime.now(UTC)
        async with self._database.session() as session:
            session.add(
                Upload(
                    session=session_id,
                    volume=volume,
                    vfid=str(vfid),
                    relpath=relpath,
                    size=size,
                    offset=0,
                    done=False,
                    created_at=now,
                    expires_at=now + self._expire,
                )
            )
        return session_id

    async def get(self, session_id: str) -> Upload:
        """Raises `UploadNotFound`."""
        async with self._database.session() as session:
            row = await session.get(Upload, session_id)
        if row is None:
            raise UploadNotFound("There is no such upload, or it has expired.", hint="Ask for a new one.")
        return row

    @contextlib.asynccontextmanager
    async def lease(self, row: Upload, mode: UploadMode, offset: int | None) -> AsyncIterator[bool]:
        """Yields whether the lease was got. What the holder changes in `row` is saved at the end, whatever happens."""
        lease, now = self._owner + secrets.token_hex(12), datetime.now(UTC)
        async with self._database.session() as session:
            free = or_(Upload.lease.is_(None), Upload.lease_until < now)
            same_mode = or_(Upload.mode.is_(None), Upload.mode == mode)
            query = update(Upload).where(Upload.session == row.session, free, same_mode)
            if offset is not None:
                query = query.where(Upload.offset == offset)
            taken = await session.execute(query.values(lease=lease, lease_until=now + LEASE, mode=mode))
        if _count(taken) == 0:
            yield False
            return
        row.mode = mode
        keeper = asyncio.create_task(self._renew(row.session, lease), name=f"upload lease {row.session}")
        try:
            yield True
        finally:
            keeper.cancel()
            await asyncio.wait([keeper])
            await self._release(row, lease)

    async def _renew(self, session_id: str, lease: str) -> None:
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            try:
                async with self._database.session() as session:
                    mine = update(Upload).where(Upload.session == session_id, Upload.lease == lease)
                    await session.execute(mine.values(lease_until=datetime.now(UTC) + LEASE))
            except MooringError as err:
                log.warning("an upload lease could not be renewed", session=session_id, error=str(err))

    async def _release(self, row: Upload, lease: str) -> None:
        async with self._database.session() as session:
            mine = update(Upload).where(Upload.session == row.session, Upload.lease == lease)
            saved = await session.execute(
                mine.values(
                    offset=row.offset,
                    done=row.done,
                    part_size=row.part_size,
                    upload_id=row.upload_id,
                    lease=None,
                    expires_at=datetime.now(UTC) + (KEEP_DONE if row.done else self._expire),
                )
            )
        if _count(saved) == 0:
            log.info("an upload was dropped or taken over while it was written", session=row.session)

    async def save_multipart(self, row: Upload) -> None:
        """At once: a multipart upload that no row knows is never aborted."""
        async with self._database.session() as session:
            mine = update(Upload).where(Upload.session == row.session)
            await session.execute(mine.values(upload_id=row.upload_id, part_size=row.part_size))

    async def save_recovered(self, row: Upload, dead_lease: str | None) -> None:
        """Ends the lease of a dead writer, unless somebody else has done so meanwhile."""
        async with self._database.session() as session:
            query = update(Upload).where(Upload.session == row.session, Upload.lease == dead_lease)
            await session.execute(query.values(offset=row.offset, done=row.done, lease=None))

    async def of_folder(self, volume: VolumeName, vfid: VFolderID) -> Sequence[Upload]:
        return await self._all(Upload.volume == volume, Upload.vfid == str(vfid))

    async def expired(self) -> Sequence[Upload]:
        """Those whose time is over and that nobody writes."""
        now = datetime.now(UTC)
        return await self._all(Upload.expires_at < now, or_(Upload.lease.is_(None), Upload.lease_until < now))

    async def _all(self, *conditions: ColumnElement[bool]) -> Sequence[Upload]:
        async with self._database.session() as session:
            query = select(Upload).where(*conditions).order_by(Upload.expires_at)
            return (await session.execute(query)).scalars().all()

    async def forget(self, session_id: str) -> None:
        async with self._database.session() as session:
            await session.execute(delete(Upload).where(Upload.session == session_id))


def _count(result: object) -> int:
    assert isinstance(result, CursorResult)  # noqa: S101  # what an UPDATE returns
    return int(result.rowcount)
