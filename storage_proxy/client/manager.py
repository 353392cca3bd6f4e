"""Client of the manager extension, and the shapes of its requests and answers (its handlers use the same models)."""

from __future__ import annotations

import unicodedata
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ..core.errors import InvalidIdentifier, InvalidRequest
from ..core.ids import AccessMode, QuotaScopeID, parse_agent_id, parse_volume_name
from ..core.paths import RelPath
from ..core.secrets import Secret
from ..core.wire import BucketText, PrefixText, SessionText, TargetText, Wire
from .http import TOTAL_SECONDS, HttpService, segment
from .proxy import LONG_SECONDS, ListAnswer, UsageAnswer

MAX_PAGE = 1000
DEFAULT_PAGE = 100


def parse_folder_name(text: str) -> str:
    """A folder's name: 1 to 64 visible characters in NFC, no slash; nothing that reads as a path or as an id."""
    hint = "Use 1 to 64 visible characters without slashes."
    if not 1 <= len(text) <= 64 or text != text.strip():
        raise InvalidIdentifier(f"Folder name {text[:70]!a} is empty, too long or padded.", hint=hint)
    if "/" in text or "\\" in text or text in (".", "..") or not unicodedata.is_normalized("NFC", text):
        raise InvalidIdentifier(f"Folder name {text!a} has a slash or is not in normal form (NFC).", hint=hint)
    # Cc, Cf, Cs, Co, Cn: control, invisible, surrogate, private and unassigned; Zl, Zp: line breaks.
    if any(unicodedata.category(char)[0] == "C" or unicodedata.category(char) in ("Zl", "Zp") for char in text):
        raise InvalidIdentifier(f"Folder name {text!a} has a character that does not show.", hint=hint)
    if is_uuid(text):
        raise InvalidIdentifier(f"Folder name {text} reads as an id.", hint="Choose a name that is no UUID.")
    return text


def is_uuid(text: str) -> bool:
    """True if a reference is an id (a UUID, with or without dashes) and no name."""
    digits = text.replace("-", "")
    return len(digits) == 32 and all(char in "0123456789abcdefABCDEF" for char in digits)


def parse_endpoint(text: str) -> str:
    """`scheme://host[:port]` in one spelling, so that two texts are equal if they mean the same place."""
    parts = urlsplit(text)
    try:
        port_ok = parts.port is None or 0 < parts.port < 65536
    except ValueError:
        port_ok = False
    plain = not (parts.path.strip("/") or parts.query or parts.fragment or parts.username or parts.password)
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain or not port_ok:
        raise InvalidRequest("The endpoint is not valid.", hint="Write it as https://HOST or https://HOST:PORT.")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    default = {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port and parts.port != default else "")


def _volume(text: str) -> str:
    """`volume`, or `proxy:volume` where several storage proxies are configured."""
    for part in text.split(":", 1):
        parse_volume_name(part)
    return text


FolderName = Annotated[str, AfterValidator(parse_folder_name)]
EndpointText = Annotated[str, AfterValidator(parse_endpoint)]
HostText = Annotated[str, AfterValidator(_volume)]
ScopeText = Annotated[str, AfterValidator(lambda text: str(QuotaScopeID.parse(text)))]
AgentText = Annotated[str, AfterValidator(lambda text: str(parse_agent_id(text)))]
FilePathText = Annotated[str, AfterValidator(lambda text: RelPath.parse_file(text).text)]
DirPathText = Annotated[str, AfterValidator(lambda text: str(RelPath.parse(text)))]


class Request(BaseModel):
    """Base of request bodies: unknown keys are refused, so that a misspelt `read_only` cannot pass unnoticed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PageQuery(Request):
    cursor: str | None = Field(default=None, max_length=512)
    limit: int = Field(default=DEFAULT_PAGE, ge=1, le=MAX_PAGE)


# --- folders ----------------------------------------------------------------------------------------------------------


class FolderKind(StrEnum):
    MANAGED = "managed"
    BOUND = "bound"


class CreateFolderRequest(Request):
    """`quota_scope` defaults to the caller's own."""

    name: FolderName
    volume: HostText
    quota_scope: ScopeText | None = None


class Keys(Request):
    """An S3 key pair as a person types it in."""

    access_key: str = Field(min_length=1, max_length=256)
    secret_key: Secret


class BindFolderRequest(Request):
    """Makes an existing bucket, or a directory of it, a folder. Keys are either stored before (`credential_id`) or
    given here (`credential`). `uid`, `gid` and `umask` fix how its files appear in sessions."""

    name: FolderName
    volume: HostText
    bucket: BucketText
    prefix: PrefixText = ""
    read_only: bool = False
    credential_id: str | None = Field(default=None, max_length=64)
    credential: Keys | None = None
    endpoint: EndpointText | None = None
    region: str | None = Field(default=None, pattern=r"^[a-z0-9-]{1,64}$")
    quota_scope: ScopeText | None = None
    uid: int | None = Field(default=None, ge=0, le=2**32 - 2)
    gid: int | None = Field(default=None, ge=0, le=2**32 - 2)
    umask: int | None = Field(default=None, ge=0, le=0o777)

    @model_validator(mode="after")
    def _one_credential(self) -> Self:
        if (self.credential is None) == (self.credential_id is None):
            raise ValueError("give either credential_id or credential")
        return self


class Folder(Wire):
    """`volume` with the storage proxy that serves it (`proxy`); `bucket` and `prefix` only for bound folders."""

    id: str
    name: str
    volume: str
    proxy: str
    vfid: str
    kind: FolderKind
    quota_scope: str
    read_only: bool
    bucket: str | None = None
    prefix: str | None = None
    endpoint: str | None = None
    credential_id: str | None = None
    created_at: datetime


class FoldersPage(Wire):
    items: list[Folder]
    next_cursor: str | None = None


class FilesQuery(Request):
    path: DirPathText = "."
    cursor: str | None = Field(default=None, max_length=4096)
    limit: int = Field(default=MAX_PAGE, ge=1, le=MAX_PAGE)


class MkdirRequest(Request):
    path: FilePathText
    parents: bool = True
    exist_ok: bool = False


class DeleteFilesRequest(Request):
    paths: list[Annotated[str, AfterValidator(lambda text: RelPath.parse_file(text.rstrip("/")).text)]] = Field(
        min_length=1, max_length=1000
    )
    recursive: bool = False


class UploadRequest(Request):
    """`size` of the whole file in bytes (S3's limit is 5 TiB)."""

    path: FilePathText
    size: int = Field(ge=0, le=5 * 1024**4)


class DownloadRequest(Request):
    path: FilePathText


class TransferTicket(Wire):
    """Call `url` with `?token=`."""

    token: str
    url: str


# --- credentials ------------------------------------------------------------------------------------------------------


class CreateCredentialRequest(Request):
    """`endpoint` defaults to that of the volume which the credential is used on; keys are sent to no other."""

    name: FolderName
    access_key: str = Field(min_length=1, max_length=256)
    secret_key: Secret
    endpoint: EndpointText | None = None
    quota_scope: ScopeText | None = None


class Credential(Wire):
    """Never the keys: `access_key_hint` shows the last characters of the access key."""

    id: str
    name: str
    quota_scope: str
    endpoint: str | None = None
    access_key_hint: str
    created_at: datetime


class CredentialsPage(Wire):
    items: list[Credential]
    next_cursor: str | None = None


# --- agents -----------------------------------------------------------------------------------------------------------


class RegisterAgentRequest(Request):
    """`public_key`: base64url of 32 bytes (X25519), as GET /v1/identity of the agent gives it."""

    public_key: str = Field(pattern=r"^[A-Za-z0-9_-]{43}$")


class Agent(Wire):
    agent_id: str
    public_key: str
    created_at: datetime
    updated_at: datetime


class AgentsPage(Wire):
    items: list[Agent]
    next_cursor: str | None = None


HexDigits = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class NodeFolderRequest(Request):
    """A folder as its path on a node names it: `{scope}/{aa}/{bb}/{rest}` below the volume, where aa, bb and rest are
    the digits of `folder`. `volume`: its name, or `proxy:volume`."""

    volume: str = Field(min_length=1, max_length=129)
    scope: HexDigits
    folder: HexDigits


class NodeFolder(Wire):
    """`grant` is for the asking agent only, until `expires_at`; the session ends with DELETE of it."""

    session_id: str
    vfid: str
    mode: AccessMode
    grant: str
    expires_at: datetime


class HeldNodeFolder(Wire):
    """A folder that was granted to a node and not taken back."""

    session_id: str
    vfid: str
    volume: str
    mode: AccessMode
    created_at: datetime


class NodeFoldersPage(Wire):
    items: list[HeldNodeFolder]
    next_cursor: str | None = None


# --- sessions ---------------------------------------------------------------------------------------------------------


class MountAsked(Request):
    """`folder`: id or name. `mode` defaults to what the folder allows. `target`: absolute path inside the container."""

    folder: str = Field(min_length=1, max_length=128)
    mode: AccessMode | None = None
    target: TargetText


class CreateSessionRequest(Request):
    """`uid`, `gid`, `umask`: how files appear on the mounts, unless a binding fixed it."""

    session_id: SessionText | None = None
    agent_id: AgentText
    mounts: list[MountAsked] = Field(min_length=1, max_length=64)
    uid: int = Field(default=0, ge=0, le=2**32 - 2)
    gid: int = Field(default=0, ge=0, le=2**32 - 2)
    umask: int = Field(default=0o022, ge=0, le=0o777)


class SessionMount(Wire):
    """`credential_expires_at`: when the credential of the last grant ends; None if it does not."""

    folder_id: str
    name: str
    vfid: str
    target: str
    mode: AccessMode
    credential_expires_at: datetime | None = None


class PlannedMount(SessionMount):
    """`grant` is for the agent of the session only, until `expires_at`."""

    grant: str
    expires_at: datetime


class SessionPlan(Wire):
    session_id: str
    agent_id: str
    mounts: list[PlannedMount]


class SessionState(StrEnum):
    PLANNING = "planning"
    ACTIVE = "active"
    ENDING = "ending"


class Session(Wire):
    session_id: str
    agent_id: str
    state: SessionState
    created_at: datetime
    mounts: list[SessionMount]


class ManagerClient(HttpService):
    """Calls the manager extension with an API token. Folders are named by id or name."""

    def __init__(self, base_url: str, token: Secret | str, *, timeout: float = TOTAL_SECONDS) -> None:
        text = token.reveal() if isinstance(token, Secret) else token
        super().__init__(
            base_url,
            service="manager extension",
            remedy="Check that the manager extension runs: mooring doctor.",
            headers={"Authorization": f"Bearer {text}"},
            timeout=timeout,
        )

    # --- folders ------------------------------------------------------------------------------------------------------

    async def create_folder(self, name: str, volume: str, *, quota_scope: str | None = None) -> Folder:
        body = _body(name=name, volume=volume, quota_scope=quota_scope)
        return await self.post("/v1/folders", Folder, body=body)

    async def bind_folder(
        self,
        name: str,
        volume: str,
        bucket: str,
        *,
        prefix: str = "",
        read_only: bool = False,
        credential_id: str | None = None,
        access_key: str | None = None,
        secret_key: Secret | None = None,
        endpoint: str | None = None,
        region: str | None = None,
        quota_scope: str | None = None,
        uid: int | None = None,
        gid: int | None = None,
        umask: int | None = None,
    ) -> Folder:
        """Give either `credential_id`, or both keys."""
        keys = {"access_key": access_key, "secret_key": secret_key.reveal()} if access_key and secret_key else None
        body = _body(
            name=name,
            volume=volume,
            bucket=bucket,
            prefix=prefix,
            read_only=read_only,
            credential_id=credential_id,
            credential=keys,
            endpoint=endpoint,
            region=region,
            quota_scope=quota_scope,
            uid=uid,
            gid=gid,
            umask=umask,
        )
        return await self.post("/v1/folders/bind", Folder, body=body)

    async def folders_page(self, *, cursor: str | None = None, limit: int = DEFAULT_PAGE) -> FoldersPage:
        return await self.get("/v1/folders", FoldersPage, query={"cursor": cursor, "limit": limit})

    async def folders(self) -> AsyncIterator[Folder]:
        """Every folder that the caller may see, sorted by name."""
        cursor: str | None = None
        while True:
            page = await self.folders_page(cursor=cursor)
            for folder in page.items:
                yield folder
            if not page.next_cursor:
                return
            cursor = page.next_cursor

    async def folder(self, folder: str) -> Folder:
        return await self.get(f"/v1/folders/{segment(folder)}", Folder)

    async def delete_folder(self, folder: str) -> None:
        """Deletes a managed folder with its files; unbinds a bound one and leaves the bucket as it is.

        Raises `InUse` naming the sessions that hold it.
        """
        await self.call("DELETE", f"/v1/folders/{segment(folder)}", timeout=LONG_SECONDS)

    async def files(
        self, folder: str, path: str = ".", *, cursor: str | None = None, limit: int | None = None
    ) -> ListAnswer:
        return await self.get(
            f"/v1/folders/{segment(folder)}/files", ListAnswer, query={"path": path, "cursor": cursor, "limit": limit}
        )

    async def mkdir(self, folder: str, path: str, *, parents: bool = True, exist_ok: bool = False) -> None:
        body = _body(path=path, parents=parents, exist_ok=exist_ok)
        await self.call("POST", f"/v1/folders/{segment(folder)}/files/mkdir", body=body)

    async def delete_files(self, folder: str, paths: Sequence[str], *, recursive: bool = False) -> None:
        """Names that are not there, and directories without `recursive`, are skipped."""
        body = _body(paths=list(paths), recursive=recursive)
        path = f"/v1/folders/{segment(folder)}/files/delete"
        await self.call("POST", path, body=body, timeout=LONG_SECONDS, idempotent=True)

    async def usage(self, folder: str) -> UsageAnswer:
        return await self.get(f"/v1/folders/{segment(folder)}/usage", UsageAnswer, timeout=LONG_SECONDS)

    async def request_upload(self, folder: str, path: str, size: int) -> TransferTicket:
        """A ticket to send one file of exactly `size` bytes to the client port of the storage proxy."""
        body = _body(path=path, size=size)
        return await self.post(f"/v1/folders/{segment(folder)}/request-upload", TransferTicket, body=body)

    async def request_download(self, folder: str, path: str) -> TransferTicket:
        body = _body(path=path)
        url = f"/v1/folders/{segment(folder)}/request-download"
        return await self.post(url, TransferTicket, body=body, idempotent=True)

    # --- credentials --------------------------------------------------------------------------------------------------

    async def create_credential(
        self,
        name: str,
        access_key: str,
        secret_key: Secret,
        *,
        endpoint: str | None = None,
        quota_scope: str | None = None,
    ) -> Credential:
        body = _body(
            name=name,
            access_key=access_key,
            secret_key=secret_key.reveal(),
            endpoint=endpoint,
            quota_scope=quota_scope,
        )
        return await self.post("/v1/credentials", Credential, body=body)

    async def credentials_page(self, *, cursor: str | None = None, limit: int = DEFAULT_PAGE) -> CredentialsPage:
        return await self.get("/v1/credentials", CredentialsPage, query={"cursor": cursor, "limit": limit})

    async def delete_credential(self, credential_id: str) -> None:
        """Raises `InUse` naming the folders that are bound with it."""
        await self.call("DELETE", f"/v1/credentials/{segment(credential_id)}")

    # --- agents -------------------------------------------------------------------------------------------------------

    async def register_agent(self, agent_id: str, public_key: str) -> Agent:
        """Idempotent; needs a token of role agent or admin."""
        body = _body(public_key=public_key)
        return self.parse(Agent, await self.call("PUT", f"/v1/agents/{segment(agent_id)}", body=body))

    async def agents_page(self, *, cursor: str | None = None, limit: int = DEFAULT_PAGE) -> AgentsPage:
        return await self.get("/v1/agents", AgentsPage, query={"cursor": cursor, "limit": limit})

    async def grant_node_folder(
        self, agent_id: str, volume: str, scope: str, folder: str, *, timeout: float | None = None
    ) -> NodeFolder:
        """A folder for the whole node, if the operator opened its volume to this agent. `scope`, `folder`: 32 hex
        digits each. Raises `Forbidden`, `VFolderNotFound`.
        """
        body = _body(volume=volume, scope=scope, folder=folder)
        path = f"/v1/agents/{segment(agent_id)}/folders"
        # A repeated call replaces what the first one gave.
        return await self.post(path, NodeFolder, body=body, timeout=timeout, idempotent=True)

    async def node_folders(self, agent_id: str) -> AsyncIterator[HeldNodeFolder]:
        """Every folder that was granted to the node and not taken back."""
        cursor: str | None = None
        while True:
            query = {"cursor": cursor, "limit": MAX_PAGE}
            page = await self.get(f"/v1/agents/{segment(agent_id)}/folders", NodeFoldersPage, query=query)
            for folder in page.items:
                yield folder
            if not page.next_cursor:
                return
            cursor = page.next_cursor

    async def end_node_folder(self, agent_id: str, session_id: str) -> None:
        """Revokes it. Idempotent."""
        await self.call("DELETE", f"/v1/agents/{segment(agent_id)}/folders/{segment(session_id)}")

    # --- sessions -----------------------------------------------------------------------------------------------------

    async def create_session(
        self,
        agent_id: str,
        mounts: Sequence[MountAsked],
        *,
        session_id: str | None = None,
        uid: int = 0,
        gid: int = 0,
        umask: int = 0o022,
    ) -> SessionPlan:
        """Plans all mounts or none."""
        body = _body(
            session_id=session_id,
            agent_id=agent_id,
            mounts=[mount.model_dump(mode="json", exclude_none=True) for mount in mounts],
            uid=uid,
            gid=gid,
            umask=umask,
        )
        return await self.post("/v1/sessions", SessionPlan, body=body)

    async def session(self, session_id: str) -> Session:
        return await self.get(f"/v1/sessions/{segment(session_id)}", Session)

    async def renew_grant(self, session_id: str, folder: str) -> PlannedMount:
        """A fresh grant for one mount of a session that runs, for its agent: after the first one expired, or when the
        credential ends soon. `folder`: its id, or its name when the session was planned. Idempotent.

        For the owner of the session and the agent that it runs on. Raises `RecordNotFound` for anybody else's session
        and a folder that it does not have, `Conflict` when it has ended, and what planning a session raises.
        """
        url = f"/v1/sessions/{segment(session_id)}/mounts/{segment(folder)}/grant"
        return await self.post(url, PlannedMount, idempotent=True)

    async def delete_session(self, session_id: str) -> None:
        """Ends a session and revokes its credentials. Idempotent."""
        await self.call("DELETE", f"/v1/sessions/{segment(session_id)}")


def _body(**fields: Any) -> dict[str, Any]:  # Any: JSON
    return {name: value for name, value in fields.items() if value is not None}
