"""Client of one agent's API on its unix socket, and the shapes of its answers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from datetime import datetime
from pathlib import Path

from pydantic import Field

from ..core.ids import AccessMode, VFolderID
from ..core.wire import BindSpec, MountState, Wire
from .http import TOTAL_SECONDS, HttpService, segment
from .mounts import DrainStatus, MountView, RepairAnswer
from .storages import EventsLost, FeedItem, MountEvent

REPAIR_SECONDS = 120.0  # the agent waits for S3 and for a process, each with its deadline
EVENTS_IDLE_SECONDS = 30.0  # the agent says something every 10 s


class AgentIdentity(Wire):
    """`public_key`: base64url of the X25519 key that credentials for this agent are sealed to."""

    agent_id: str
    public_key: str


class AgentStatus(Wire):
    agent_id: str
    version: str = ""
    status: str = "ok"
    mounts: int = 0
    attachments: int = 0
    warnings: list[str] = []


class AttachRequest(Wire):
    """A signed grant, as the manager extension issued it for this agent."""

    grant: str


class AttachmentInfo(Wire):
    session_id: str
    vfid: str
    mount_key: str
    mode: AccessMode | None = None
    target: str | None = None
    source: str | None = None
    since: datetime | None = None


class AttachmentsAnswer(Wire):
    attachments: list[AttachmentInfo]


class RenewAnswer(Wire):
    """The mount that has a fresh credential now; `credential_expires_at` is None if that one does not end."""

    mount_key: str
    credential_expires_at: datetime | None = None


class DetachAnswer(Wire):
    detached: int = 0


class MountInfo(Wire):
    """One mount of the node. `sessions` hold it; `pid` is the driver's process while it runs. `trouble`: it lives, but
    S3 does not do what it asks; `unresponsive`: its process does not answer."""

    key: str
    state: MountState
    since: datetime | None = None
    driver: str
    pid: int | None = None
    bucket: str
    prefix: str = ""
    mode: AccessMode
    sessions: list[str] = []
    attachments: int = 0
    repairs: int = 0
    last_error: str | None = None
    trouble: str | None = None
    unresponsive: str | None = None


class MountsAnswer(Wire):
    mounts: list[MountInfo]


class GcAnswer(Wire):
    """How many mounts were taken down."""

    drained: int = 0


class GcRequest(Wire):
    """`grace` in seconds that replaces the configured one."""

    grace: float = Field(default=0.0, ge=0)


class AgentClient(HttpService):
    """Calls the agent at `socket`. Raises what the agent raised; `ServiceUnavailable` if it does not run."""

    def __init__(self, socket: Path, *, timeout: float = TOTAL_SECONDS) -> None:
        super().__init__(
            "http://agent",
            service="agent",
            remedy="The agent does not run, or runs elsewhere: start it with `mooring agent serve --config FILE`.",
            socket=socket,
            timeout=timeout,
        )

    async def status(self) -> AgentStatus:
        return await self.get("/v1/status", AgentStatus)

    async def identity(self) -> AgentIdentity:
        return await self.get("/v1/identity", AgentIdentity)

    async def attach(self, grant: str, *, timeout: float | None = None) -> BindSpec:
        """Mounts (or shares) what the grant permits; idempotent for the same session, folder and mount key."""
        return await self.post("/v1/attachments", BindSpec, body={"grant": grant}, timeout=timeout, idempotent=True)

    async def renew(self, session_id: str, vfid: str, grant: str, *, timeout: float | None = None) -> RenewAnswer:
        """Gives the mount of an attachment the credential of a fresh grant, without a gap for whoever opens files.

        Where the agent has a manager extension it does that by itself. Raises `NotFound` if there is no such attachment
        and `Conflict` if the grant is for another mount.
        """
        path = f"/v1/attachments/{segment(session_id)}/{VFolderID.parse(vfid).hex}/renew"
        return await self.post(path, RenewAnswer, body={"grant": grant}, timeout=timeout)

    async def attachments(self) -> list[AttachmentInfo]:
        return self.parse(
            AttachmentsAnswer, _wrapped(await self.call("GET", "/v1/attachments"), "attachments")
        ).attachments

    async def detach_session(self, session_id: str) -> int:
        """Ends every attachment of a session; returns how many there were. Idempotent."""
        content = await self.call("DELETE", f"/v1/sessions/{segment(session_id)}")
        return self.parse(DetachAnswer, content).detached

    async def detach(self, session_id: str, vfid: str) -> None:
        """Ends one attachment. Idempotent."""
        folder = VFolderID.parse(vfid).hex
        await self.call("DELETE", f"/v1/attachments/{segment(session_id)}/{folder}")

    async def mounts(self) -> list[MountInfo]:
        return self.parse(MountsAnswer, _wrapped(await self.call("GET", "/v1/mounts"), "mounts")).mounts

    async def gc(self, grace: float = 0.0, *, timeout: float | None = None) -> int:
        """Takes down mounts that no session holds, now; returns how many."""
        content = await self.call("POST", "/v1/mounts/gc", body={"grace": grace}, timeout=timeout, idempotent=True)
        return self.parse(GcAnswer, content).drained

    # --- what operators do --------------------------------------------------------------------------------------------

    async def mount(self, key: str) -> MountView:
        """Everything about one mount; `key` or its first 6 or more digits. Raises `NotFound`, `InvalidIdentifier`."""
        return await self.get(f"/v1/mounts/{segment(key)}", MountView)

    async def repair(self, key: str, *, force: bool = False, timeout: float = REPAIR_SECONDS) -> RepairAnswer:
        """Repairs a dead or failed mount now and waits for the outcome; raises what stopped it. `force`: also one that
        lives, whose open files then fail."""
        body = {"force": force}
        return await self.post(f"/v1/mounts/{segment(key)}/repair", RepairAnswer, body=body, timeout=timeout)

    async def drain(self, keys: Sequence[str] | None = None, *, wait: float = 0.0) -> DrainStatus:
        """Refuses new attachments of these mounts (None: of all) until `resume`; idempotent. Waits at most `wait`
        seconds for the old ones to end."""
        body = {"keys": keys and list(keys), "wait": wait}
        return await self.post("/v1/drain", DrainStatus, body=body, timeout=wait + TOTAL_SECONDS, idempotent=True)

    async def drain_status(self) -> DrainStatus:
        return await self.get("/v1/drain", DrainStatus)

    async def resume(self, keys: Sequence[str] | None = None) -> DrainStatus:
        """Takes new attachments again; None ends every drain. Idempotent."""
        content = await self.call("DELETE", "/v1/drain", body={"keys": keys and list(keys)})
        return self.parse(DrainStatus, content)

    async def events(self, *, since: str | None = None) -> AsyncGenerator[FeedItem, None]:
        """What happens to the mounts of this node, as it happens; ends when the agent stops. `since` is the id of the
        last event that is known, `0` for all that are kept. Close the generator (`contextlib.aclosing`)."""
        query = {"since": since}
        async with aclosing(self.lines("/v1/events", idle=EVENTS_IDLE_SECONDS, query=query)) as lines:
            async for line in lines:
                content = line.encode()
                kind = self.parse(_Line, content).kind
                if kind == "lost":
                    yield self.parse(EventsLost, content)
                elif kind not in ("", "heartbeat"):
                    yield self.parse(MountEvent, content)


class _Line(Wire):
    kind: str = ""


def _wrapped(content: bytes, name: str) -> bytes:
    """A bare JSON array as the field that this version calls it."""
    return b'{"' + name.encode() + b'":' + content + b"}" if content.lstrip().startswith(b"[") else content
