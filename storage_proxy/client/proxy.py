"""Client of the storage proxy's manager-facing port, and the shapes of its answers.

Routes, spellings and status codes are those of Backend.AI (docs/api.md); fields it does not have are additive. Every
request carries a JSON body, also GET and DELETE, because that is how its manager calls.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import ConfigDict, Field

from ..core.errors import AccessError, ConfigError, Forbidden, MooringError, Unauthenticated
from ..core.ids import AccessMode
from ..core.secrets import Secret
from ..core.wire import BucketText, Location, PrefixText, S3Credential, SessionText, VFolderText, VolumeText, Wire
from .http import TOTAL_SECONDS, HttpService, segment
from .storages import (
    EventsLost,
    FeedItem,
    MountEvent,
    MountsWanted,
    SourceChanged,
    StorageNodeStatus,
    StorageStatus,
)

AUTH_HEADER = "X-BackendAI-Storage-Auth-Token"

# Trees are deleted, moved and measured inside one request: seconds per thousand objects, not milliseconds.
LONG_SECONDS = 300.0
EVENTS_IDLE_SECONDS = 30.0  # the proxy says something every 10 s


class Done(Wire):
    """An answer without content, or whose content says nothing."""


class StatusAnswer(Wire):
    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    status: str
    type: str
    storage_proxy: str = Field(alias="storage-proxy")


class VolumeInfo(Wire):
    name: str
    backend: str
    path: str = ""
    fsprefix: str = "."
    capabilities: list[str] = []
    endpoint: str | None = None  # additive: the object store behind the volume


class VolumesAnswer(Wire):
    volumes: list[VolumeInfo]


class HwInfoAnswer(Wire):
    status: str
    status_info: str | None = None
    metadata: dict[str, str] = {}


class BindingOptions(Wire):
    """`options.binding` of POST /folder/create: an existing bucket (or a directory of it) becomes the folder;
    without `endpoint` on the volume's own server."""

    bucket: BucketText
    prefix: PrefixText = ""
    read_only: bool = False
    credential: S3Credential
    endpoint: str | None = Field(default=None, max_length=1024)
    region: str | None = Field(default=None, max_length=64)

    def to_body(self) -> dict[str, Any]:  # Any: JSON
        """The JSON with the keys in clear, for the one request that must carry them."""
        body = self.model_dump(mode="json", exclude={"credential"}, exclude_none=True)
        body["credential"] = {
            "access_key": self.credential.access_key,
            "secret_key": self.credential.secret_key.reveal(),
        }
        return body


class MountAnswer(Wire):
    """`path` is Backend.AI's field; `location` says where the objects are."""

    path: str
    location: Location | None = None
    read_only: bool = False


class UsageAnswer(Wire):
    """Usage of one folder: bytes and files as of a moment; the true value was then within `error_bound_bytes`."""

    file_count: int
    used_bytes: int
    as_of: datetime | None = None
    error_bound_bytes: int | None = None


class FsUsageAnswer(Wire):
    capacity_bytes: int
    used_bytes: int


class MountCredentialRequest(Wire):
    """`recipient_key`: base64url of the agent's X25519 public key; only that agent opens the answer. `credential_id`:
    the credential that the session has already, to be renewed under the same id."""

    volume: VolumeText
    vfid: VFolderText
    mode: AccessMode
    recipient_key: str
    session_id: SessionText
    credential_id: str | None = None


class MountCredentialAnswer(Wire):
    """`sealed_credential` opens with context `credential_id`. `revoke_ref` is None if there is nothing to revoke,
    `expires_at` if the key does not end."""

    location: Location
    read_only: bool = False
    credential_id: str
    revoke_ref: str | None = None
    method: str
    expires_at: datetime | None = None
    sealed_credential: str


class EntryType(StrEnum):
    FILE = "FILE"
    DIRECTORY = "DIRECTORY"
    SYMLINK = "SYMLINK"


class EntryStat(Wire):
    """`mode` is the full st_mode; `size` in bytes."""

    mode: int
    size: int
    created: datetime | None = None
    modified: datetime | None = None


class Entry(Wire):
    name: str
    type: EntryType
    stat: EntryStat
    symlink_target: str = ""


class ListAnswer(Wire):
    """One page; the list is complete when `next_cursor` is None."""

    items: list[Entry]
    next_cursor: str | None = None
    skipped: int = 0  # keys of the bucket on this page that no path can name


class ItemResult(Wire):
    msg: str | None = None
    item: str
    error_code: str | None = None  # additive: which error of the tree


class ItemResults(Wire):
    success: list[ItemResult] = []
    failed: list[ItemResult] = []


class MkdirAnswer(Wire):
    results: ItemResults = ItemResults()


class TokenAnswer(Wire):
    """A signed token for the client-facing port."""

    token: str


class TaskAnswer(Wire):
    """`bgtask_id` names the job that does the work; None if it is done already."""

    bgtask_id: str | None = None


class ProxyClient(HttpService):
    """Calls the manager-facing port. Raises what the proxy raised; see `HttpService.call` for the rest."""

    def __init__(self, base_url: str, secret: Secret, *, timeout: float = TOTAL_SECONDS) -> None:
        super().__init__(
            base_url,
            service="storage proxy",
            remedy="Check that the storage proxy runs: mooring doctor.",
            headers={AUTH_HEADER: secret.reveal()},
            timeout=timeout,
        )

    def refusal(self, error: MooringError) -> MooringError:
        # The secret is this program's setting, not its caller's: a refused one is no "403" for a user.
        if type(error) in (AccessError, Unauthenticated, Forbidden):
            return ConfigError(
                f"The storage proxy at {self._where} refuses the secret of this program.",
                hint="Give both sides the same manager secret.",
            )
        return error

    # --- volumes ------------------------------------------------------------------------------------------------------

    async def status(self) -> StatusAnswer:
        return await self.get("/status", StatusAnswer)

    async def volumes(self) -> list[VolumeInfo]:
        return (await self.get("/volumes", VolumesAnswer)).volumes

    async def hwinfo(self, volume: str) -> HwInfoAnswer:
        return await self.get("/volume/hwinfo", HwInfoAnswer, body={"volume": volume})

    async def fs_usage(self, volume: str) -> FsUsageAnswer:
        return await self.get("/folder/fs-usage", FsUsageAnswer, body={"volume": volume})

    # --- nodes --------------------------------------------------------------------------------------------------------

    async def storage_status(self, kind: str = "minio", *, mounts: MountsWanted = MountsWanted.ALL) -> StorageStatus:
        """What all nodes do with the volumes of a type."""
        return await self.get(f"/storages/{segment(kind)}/status", StorageStatus, query={"mounts": mounts.value})

    async def storage_node(self, agent_id: str, kind: str = "minio") -> StorageNodeStatus:
        """One node with its mounts and attachments. Raises `NotFound` if it is not known."""
        return await self.get(f"/storages/{segment(kind)}/status/{segment(agent_id)}", StorageNodeStatus)

    async def storage_events(self, kind: str = "minio", *, after: str | None = None) -> AsyncGenerator[FeedItem, None]:
        """What happens to mounts, on all nodes, as it happens; ends when the proxy stops. `after` is the id of the last
        event that is known: go on with it after the end or an error. Close the generator (`contextlib.aclosing`)."""
        headers = {"Last-Event-ID": after} if after else {}
        name = ""
        path = f"/storages/{segment(kind)}/events"
        async with aclosing(self.lines(path, idle=EVENTS_IDLE_SECONDS, headers=headers)) as lines:
            async for line in lines:
                field, _, value = line.partition(": ")
                if field == "event":
                    name = value
                elif field == "data":
                    content = value.encode()
                    if name == "lost":
                        yield self.parse(EventsLost, content)
                    elif name == "source":
                        yield self.parse(SourceChanged, content)
                    else:
                        yield self.parse(MountEvent, content)

    # --- folders ------------------------------------------------------------------------------------------------------

    async def create_folder(self, volume: str, vfid: str, *, binding: BindingOptions | None = None) -> None:
        """Raises `AlreadyExists`; with a binding also what the object store answered (wrong key, missing bucket)."""
        options = {"binding": binding.to_body()} if binding else {}
        await self.call("POST", "/folder/create", body={"volume": volume, "vfid": vfid, "options": options})

    async def delete_folder(self, volume: str, vfid: str) -> TaskAnswer:
        """A folder that is not there counts as deleted. The objects of a bound folder stay."""
        body = {"volume": volume, "vfid": vfid}
        return await self.post("/folder/delete", TaskAnswer, body=body, timeout=LONG_SECONDS, idempotent=True)

    async def mount(self, volume: str, vfid: str, subpath: str = ".") -> MountAnswer:
        return await self.get("/folder/mount", MountAnswer, body={"volume": volume, "vfid": vfid, "subpath": subpath})

    async def usage(self, volume: str, vfid: str) -> UsageAnswer:
        return await self.get("/folder/usage", UsageAnswer, body={"volume": volume, "vfid": vfid}, timeout=LONG_SECONDS)

    async def issue_mount_credential(self, request: MountCredentialRequest) -> MountCredentialAnswer:
        """Keys for one folder and one session, sealed. Not repeated on failure, since each call may make an identity;
        a renewal makes no further one and is."""
        body = request.model_dump(mode="json", exclude_none=True)
        renewal = request.credential_id is not None
        return await self.post("/folder/mount-credential", MountCredentialAnswer, body=body, idempotent=renewal)

    async def revoke_mount_credential(self, volume: str, revoke_ref: str) -> None:
        """Idempotent: an unknown reference counts as revoked."""
        await self.call(
            "POST",
            "/folder/mount-credential/revoke",
            body={"volume": volume, "revoke_ref": revoke_ref},
            idempotent=True,
        )

    # --- files --------------------------------------------------------------------------------------------------------

    async def list_files(
        self, volume: str, vfid: str, relpath: str = ".", *, cursor: str | None = None, limit: int | None = None
    ) -> ListAnswer:
        body: dict[str, object] = {"volume": volume, "vfid": vfid, "relpath": relpath}
        body |= {"cursor": cursor} if cursor else {}
        body |= {"limit": limit} if limit else {}
        return await self.post("/folder/file/list", ListAnswer, body=body, idempotent=True)

    async def iter_files(self, volume: str, vfid: str, relpath: str = ".") -> AsyncIterator[Entry]:
        """Every entry of one directory, page after page."""
        cursor: str | None = None
        while True:
            page = await self.list_files(volume, vfid, relpath, cursor=cursor)
            for entry in page.items:
                yield entry
            if not page.next_cursor:
                return
            cursor = page.next_cursor

    async def mkdir(
        self, volume: str, vfid: str, relpaths: Sequence[str], *, parents: bool = True, exist_ok: bool = False
    ) -> MkdirAnswer:
        """At most 50 paths; some may fail (look at `results.failed`)."""
        body = {"volume": volume, "vfid": vfid, "relpath": list(relpaths), "parents": parents, "exist_ok": exist_ok}
        return self.parse(MkdirAnswer, await self.call("POST", "/folder/file/mkdir", body=body, accept=_RESULTS))

    async def rename(self, volume: str, vfid: str, relpath: str, new_name: str) -> None:
        body = {"volume": volume, "vfid": vfid, "relpath": relpath, "new_name": new_name, "is_dir": False}
        await self.call("POST", "/folder/file/rename", body=body, timeout=LONG_SECONDS)

    async def move(self, volume: str, vfid: str, src_relpath: str, dst_relpath: str) -> None:
        body = {"volume": volume, "vfid": vfid, "src_relpath": src_relpath, "dst_relpath": dst_relpath}
        await self.call("POST", "/folder/file/move", body=body, timeout=LONG_SECONDS)

    async def delete_files(self, volume: str, vfid: str, relpaths: Sequence[str], *, recursive: bool = False) -> None:
        """Names that are not there, and directories without `recursive`, are skipped."""
        body = {"volume": volume, "vfid": vfid, "relpaths": list(relpaths), "recursive": recursive}
        await self.call("POST", "/folder/file/delete", body=body, timeout=LONG_SECONDS, idempotent=True)

    async def fetch(self, volume: str, vfid: str, relpath: str) -> bytes:
        """A small file as a whole (at most 16 MiB, else `LimitExceeded`); larger ones go through a download token."""
        body = {"volume": volume, "vfid": vfid, "relpath": relpath}
        return await self.call("POST", "/folder/file/fetch", body=body, idempotent=True)

    async def request_download(self, volume: str, vfid: str, relpath: str) -> TokenAnswer:
        body = {"volume": volume, "vfid": vfid, "relpath": relpath}
        return await self.post("/folder/file/download", TokenAnswer, body=body, idempotent=True)

    async def request_upload(self, volume: str, vfid: str, relpath: str, size: int) -> TokenAnswer:
        """A session for one file of exactly `size` bytes."""
        body = {"volume": volume, "vfid": vfid, "relpath": relpath, "size": size}
        return await self.post("/folder/file/upload", TokenAnswer, body=body)


# 422 is "all failed" in the contract: still the list of results, not an error document.
_RESULTS = frozenset({422})
