"""The `minio` backend: managed folders as prefixes of one bucket, bound folders as rows that point anywhere.

A managed folder exists while anything has its prefix; its marker keeps it when it is empty. The prefix is computed from
the vfolder id, so no row is needed and the bucket alone is the truth. A bound folder is a row with its own credential,
encrypted.
"""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from functools import partial

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError as DuplicateRow

from ..config import VolumeSection, refuse_plain_http
from ..core.crypto import Keyring
from ..core.errors import (
    AlreadyExists,
    BucketNotFound,
    ConfigError,
    FileNotFound,
    InvalidRequest,
    ReadOnly,
    S3PreconditionFailed,
    VFolderNotFound,
)
from ..core.ids import BucketRef, VFolderID, VolumeName
from ..core.wire import Location, S3Credential
from ..db import Database
from ..db.types import open_column, seal_column
from ..s3 import Endpoint, S3Client, S3Pool
from ..state import BoundFolder
from .interface import Binding, Capability, Folder, Usage, Volume
from .tree import DIRECTORY_TYPE, FolderTree, directory_metadata, measure

VOLUME_USAGE_AGE = timedelta(minutes=5)


class MinioVolume(Volume):
    """One `[volume.NAME]` section with `backend = "minio"`."""

    backend = "minio"

    def __init__(
        self, name: VolumeName, section: VolumeSection, *, pool: S3Pool, database: Database, keyring: Keyring
    ) -> None:
        self.name = name
        self.section = section
        self.path = section.path or f"/vfroot/{name}"
        self.capacity = section.capacity
        self.bucket = section.bucket
        self.endpoint = self._endpoint(section.endpoint, section.region)
        self.credential = section.options.credential()
        self._pool = pool
        self._database = database
        self._keyring = keyring
        self._usage: Usage | None = None
        self._usage_lock = asyncio.Lock()

    def _endpoint(self, url: str, region: str) -> Endpoint:
        ca_file = self.section.ca_file if url == self.section.endpoint else None
        return Endpoint(url, region=region, path_style=self.section.path_style, ca_file=ca_file)

    @property
    def capabilities(self) -> frozenset[Capability]:
        # A prefix is counted by LIST and limits are not kept yet, so nothing else would hold.
        return frozenset({Capability.VFOLDER})

    async def client(self) -> S3Client:
        return await self._pool.client(self.endpoint, self.credential)

    async def check(self) -> None:
        await (await self.client()).head_bucket(self.bucket)

    async def prepare(self) -> None:
        """At start: `check`, and the bucket is made if the configuration says so."""
        try:
            await self.check()
        except BucketNotFound as err:
            if not self.section.create_bucket:
                raise BucketNotFound(
                    f"Bucket {self.bucket!r} of volume {self.name!r} does not exist on {self.endpoint.url}.",
                    hint="Create it, correct `bucket`, or set create-bucket = true in the volume's section.",
                    detail=err.detail,
                ) from None
            await (await self.client()).create_bucket(self.bucket)

    # --- folders ------------------------------------------------------------------------------------------------------

    async def create(self, vfid: VFolderID) -> None:
        if await self._bound(vfid) is not None:
            raise _exists(vfid)
        client, prefix = await self.client(), vfid.managed_prefix
        if await _anything(client, self.bucket, prefix):
            raise _exists(vfid)
        marker = partial(
            client.put, self.bucket, prefix, b"", metadata=directory_metadata(), content_type=DIRECTORY_TYPE
        )
        try:
            await marker(if_none_match=True)
        except S3PreconditionFailed:
            # Two creators at once, or SeaweedFS remembering a deleted directory that no LIST shows.
            if await _anything(client, self.bucket, prefix):
                raise _exists(vfid) from None
            await marker()

    async def bind(self, vfid: VFolderID, binding: Binding) -> None:
        location = binding.location
        if not self.section.allow_plain_http:
            try:
                refuse_plain_http(location.endpoint)
            except ValueError as err:
                raise InvalidRequest(f"The endpoint is not allowed: {err}.", detail={"endpoint": str(err)}) from None
        try:
            endpoint = self._endpoint(location.endpoint, location.region)
        except ConfigError as err:
            raise InvalidRequest(err.message, hint=err.hint, detail={"endpoint": "invalid"}) from None
        if await self._bound(vfid) is not None or await _anything(
            await self.client(), self.bucket, vfid.managed_prefix
        ):
            raise _exists(vfid)
        async with S3Client(endpoint, binding.credential) as client:  # not the pool's: this one may be refused
            # A credential may be good for its prefix only, so exactly that is asked.
            if not await _anything(client, location.bucket, location.prefix) and location.prefix:
                raise FileNotFound(
                    f"There is nothing below s3://{location.bucket}/{location.prefix}.",
                    hint="Correct the prefix, or put a first object there.",
                )
        row_id = uuid.uuid4().hex
        row = BoundFolder(
            id=row_id,
            volume=self.name,
            vfid=str(vfid),
            endpoint=location.endpoint,
            region=location.region,
            bucket=location.bucket,
            prefix=location.prefix,
            read_only=binding.read_only,
            access_key=binding.credential.access_key,
            secret_key=seal_column(
                self._keyring, binding.credential.secret_key, BoundFolder.__tablename__, "secret_key", row_id
            ),
            created_at=datetime.now(UTC),
        )
        try:
            async with self._database.session() as session:
                session.add(row)
        except DuplicateRow:
            raise _exists(vfid) from None

    async def delete(self, vfid: VFolderID) -> int:
        row = await self._bound(vfid)
        if row is None:
            folder = await self._managed(vfid)
            return await FolderTree(folder).remove_everything()
        async with self._database.session() as session:
            await session.execute(delete(BoundFolder).where(BoundFolder.id == row.id))
        return 0

    async def folder(self, vfid: VFolderID, *, write: bool = False) -> Folder:
        row = await self._bound(vfid)
        if row is not None:
            if write and row.read_only:
                raise ReadOnly("The folder is bound read-only.", hint="Bind it again with read_only = false.")
            return await self._bound_folder(vfid, row)
        folder = await self._managed(vfid)
        if not await _anything(folder.client, self.bucket, folder.ref.prefix):
            raise VFolderNotFound(f"VFolder {vfid} does not exist on volume {self.name!r}.")
        return folder

    async def place(self, vfid: VFolderID) -> Folder:
        """Where the folder is or was, without a look whether it exists; for cleaning up."""
        row = await self._bound(vfid)
        return await self._managed(vfid) if row is None else await self._bound_folder(vfid, row)

    async def tree(self, vfid: VFolderID, *, write: bool = False) -> FolderTree:
        return FolderTree(await self.folder(vfid, write=write))

    async def usage(self, vfid: VFolderID) -> Usage:
        return await (await self.tree(vfid)).usage()

    async def volume_usage(self) -> Usage:
        async with self._usage_lock:  # one walk serves everybody who asks meanwhile
            if self._usage is None or datetime.now(UTC) - self._usage.as_of > VOLUME_USAGE_AGE:
                self._usage = await measure(await self.client(), self.bucket, "")
            return self._usage

    async def _managed(self, vfid: VFolderID) -> Folder:
        ref = BucketRef(self.bucket, vfid.managed_prefix)
        return Folder(
            self.name,
            vfid,
            ref,
            self._location(self.endpoint, ref),
            read_only=False,
            managed=True,
            client=await self.client(),
        )

    async def _bound_folder(self, vfid: VFolderID, row: BoundFolder) -> Folder:
        secret = open_column(self._keyring, row.secret_key, BoundFolder.__tablename__, "secret_key", row.id)
        endpoint = self._endpoint(row.endpoint, row.region)
        client = await self._pool.client(endpoint, S3Credential(access_key=row.access_key, secret_key=secret))
        ref = BucketRef(row.bucket, row.prefix)
        return Folder(
            self.name,
            vfid,
            ref,
            self._location(endpoint, ref),
            read_only=row.read_only,
            managed=False,
            client=client,
        )

    async def _bound(self, vfid: VFolderID) -> BoundFolder | None:
        async with self._database.session() as session:
            query = select(BoundFolder).where(BoundFolder.volume == self.name, BoundFolder.vfid == str(vfid))
            return (await session.execute(query)).scalar_one_or_none()

    @staticmethod
    def _location(endpoint: Endpoint, ref: BucketRef) -> Location:
        return Location(
            endpoint=endpoint.url,
            region=endpoint.region,
            path_style=endpoint.path_style,
            bucket=ref.bucket,
            prefix=ref.prefix,
        )


async def _anything(client: S3Client, bucket: str, prefix: str) -> bool:
    page = await client.list_page(bucket, prefix, max_keys=2)
    return bool(page.objects or page.prefixes)


def _exists(vfid: VFolderID) -> AlreadyExists:
    return AlreadyExists(f"VFolder {vfid} exists.", hint="Choose another id, or delete it first.")
