"""An in-memory storage proxy: the port that the use cases of the manager extension need, and faults on command.

`known_keys` maps access keys to secrets, `buckets` names what exists; a binding with anything else is refused with the
error that a real proxy passes on from the object store.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from storage_proxy.client.proxy import (
    BindingOptions,
    Entry,
    EntryStat,
    EntryType,
    ItemResult,
    ItemResults,
    ListAnswer,
    MkdirAnswer,
    MountAnswer,
    MountCredentialAnswer,
    MountCredentialRequest,
    TaskAnswer,
    TokenAnswer,
    UsageAnswer,
    VolumeInfo,
)
from storage_proxy.core.crypto import seal
from storage_proxy.core.errors import (
    AlreadyExists,
    BucketNotFound,
    ReadOnly,
    S3BadCredential,
    VFolderNotFound,
    VolumeNotFound,
)
from storage_proxy.core.ids import VFolderID
from storage_proxy.core.secrets import Secret
from storage_proxy.core.wire import Location, S3Credential

ENDPOINT = "http://127.0.0.1:9000"


@dataclass
class FakeFolder:
    location: Location
    binding: BindingOptions | None = None
    files: dict[str, int] = field(default_factory=dict)


class FakeProxy:
    """Set `before[method]` or `after[method]` to a function that raises (or waits), to fail around the real work."""

    def __init__(self, volume: str = "minio") -> None:
        self.volume = volume
        self.folders: dict[str, FakeFolder] = {}
        self.known_keys: dict[str, str] = {}
        self.buckets: set[str] = {"mooring"}
        self.issued: dict[str, str] = {}  # revoke_ref -> session id
        self.credential_expires: datetime | None = None  # of what is issued from now on
        self.revoked: list[str] = []
        self.calls: list[str] = []
        self.before: dict[str, Callable[[], object]] = {}
        self.after: dict[str, Callable[[], object]] = {}

    async def _step(self, table: dict[str, Callable[[], object]], method: str) -> None:
        action = table.get(method) or table.get("*")
        if action is not None:
            result = action()
            if asyncio.iscoroutine(result):
                await result

    async def _enter(self, method: str, volume: str | None = None) -> None:
        self.calls.append(method)
        await self._step(self.before, method)
        if volume is not None and volume != self.volume:
            raise VolumeNotFound(f"There is no volume {volume!r}.")

    def _folder(self, vfid: str, *, write: bool = False) -> FakeFolder:
        folder = self.folders.get(vfid)
        if folder is None:
            raise VFolderNotFound(f"There is no folder {vfid}.")
        if write and folder.binding is not None and folder.binding.read_only:
            raise ReadOnly("The folder was bound read-only.")
        return folder

    async def volumes(self) -> list[VolumeInfo]:
        await self._enter("volumes")
        return [
            VolumeInfo(name=self.volume, backend="minio", path="/", capabilities=["vfolder"], endpoint=f"{ENDPOINT}/")
        ]

    async def create_folder(self, volume: str, vfid: str, *, binding: BindingOptions | None = None) -> None:
        await self._enter("create_folder", volume)
        if vfid in self.folders:
            raise AlreadyExists("The folder exists.")
        prefix = VFolderID.parse(vfid).managed_prefix
        location = Location(endpoint=ENDPOINT, bucket="mooring", prefix=prefix)
        if binding is not None:
            if self.known_keys.get(binding.credential.access_key) != binding.credential.secret_key.reveal():
                raise S3BadCredential("The secret key does not match the access key.", hint="Check both keys.")
            if binding.bucket not in self.buckets:
                raise BucketNotFound(f"There is no bucket {binding.bucket!r}.", hint="Check its name.")
            location = Location(endpoint=binding.endpoint or ENDPOINT, bucket=binding.bucket, prefix=binding.prefix)
        self.folders[vfid] = FakeFolder(location, binding)
        await self._step(self.after, "create_folder")

    async def delete_folder(self, volume: str, vfid: str) -> TaskAnswer:
        await self._enter("delete_folder", volume)
        self.folders.pop(vfid, None)
        await self._step(self.after, "delete_folder")
        return TaskAnswer()

    async def mount(self, volume: str, vfid: str, subpath: str = ".") -> MountAnswer:
        await self._enter("mount", volume)
        folder = self._folder(vfid)
        read_only = folder.binding is not None and folder.binding.read_only
        return MountAnswer(path=f"/mnt/{vfid}", location=folder.location, read_only=read_only)

    async def usage(self, volume: str, vfid: str) -> UsageAnswer:
        await self._enter("usage", volume)
        files = self._folder(vfid).files
        return UsageAnswer(
            file_count=len(files), used_bytes=sum(files.values()), as_of=datetime.now(UTC), error_bound_bytes=0
        )

    async def issue_mount_credential(self, request: MountCredentialRequest) -> MountCredentialAnswer:
        await self._enter("issue_mount_credential", request.volume)
        folder = self._folder(request.vfid)
        if request.credential_id is None:
            name = str(len(self.issued) + 1)
            credential_id = f"cred-{name}"
        else:  # another key under the same id
            credential_id = request.credential_id
            name = f"{credential_id.removeprefix('cred-')}-{self.calls.count('issue_mount_credential')}"
        revoke_ref = f"ref-{credential_id.removeprefix('cred-')}"
        self.issued[revoke_ref] = request.session_id
        keys = S3Credential(
            access_key=f"SCOPED{name}", secret_key=Secret(f"scoped-secret-{name}"), expires_at=self.credential_expires
        )
        await self._step(self.after, "issue_mount_credential")
        return MountCredentialAnswer(
            location=folder.location,
            credential_id=credential_id,
            revoke_ref=revoke_ref,
            method="iam",
            expires_at=self.credential_expires,
            sealed_credential=seal(keys.to_sealable(), request.recipient_key, credential_id),
        )

    async def revoke_mount_credential(self, volume: str, revoke_ref: str) -> None:
        await self._enter("revoke_mount_credential", volume)
        if self.issued.pop(revoke_ref, None) is not None:
            self.revoked.append(revoke_ref)

    async def list_files(
        self, volume: str, vfid: str, relpath: str = ".", *, cursor: str | None = None, limit: int | None = None
    ) -> ListAnswer:
        await self._enter("list_files", volume)
        names = sorted(name for name in self._folder(vfid).files if cursor is None or name > cursor)
        page = names[: limit or 1000]
        files = self._folder(vfid).files
        items = [
            Entry(name=name, type=EntryType.FILE, stat=EntryStat(mode=0o100644, size=files[name])) for name in page
        ]
        return ListAnswer(items=items, next_cursor=page[-1] if len(page) < len(names) else None)

    async def mkdir(
        self, volume: str, vfid: str, relpaths: Sequence[str], *, parents: bool = True, exist_ok: bool = False
    ) -> MkdirAnswer:
        await self._enter("mkdir", volume)
        folder = self._folder(vfid, write=True)
        results = ItemResults(success=[], failed=[])
        for path in relpaths:
            if f"{path}/" in folder.files and not exist_ok:
                results.failed.append(ItemResult(item=path, msg="File exists"))
            else:
                folder.files[f"{path}/"] = 0
                results.success.append(ItemResult(item=path))
        return MkdirAnswer(results=results)

    async def delete_files(self, volume: str, vfid: str, relpaths: Sequence[str], *, recursive: bool = False) -> None:
        await self._enter("delete_files", volume)
        for path in relpaths:
            self._folder(vfid, write=True).files.pop(path, None)

    async def request_download(self, volume: str, vfid: str, relpath: str) -> TokenAnswer:
        await self._enter("request_download", volume)
        self._folder(vfid)
        return TokenAnswer(token=json.dumps(["download", vfid, relpath]))

    async def request_upload(self, volume: str, vfid: str, relpath: str, size: int) -> TokenAnswer:
        await self._enter("request_upload", volume)
        self._folder(vfid, write=True)
        return TokenAnswer(token=json.dumps(["upload", vfid, relpath, size]))
