"""The shapes of what an agent tells of one mount, and of its drain. Sizes in bytes; figures that are not known are
None."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from ..core.ids import AccessMode
from ..core.wire import MountState, Ownership, Wire

MAX_WAIT_SECONDS = 3600.0


class MountUsage(Wire):
    """What the mount process costs. `read` and `written` are bytes that it moved: see docs/metrics.md."""

    measured_at: datetime
    rss: int
    pss: int | None = None
    fds: int | None = None
    threads: int
    cpu_seconds: float
    read: int | None = None
    written: int | None = None


class AttachmentView(Wire):
    """`held_at`: when a container was last seen holding it. `layers`: mounts stacked on its bind; more than one after
    repairs and renewals."""

    session_id: str
    vfid: str
    target: str
    state: str
    since: datetime
    source: str
    layers: int
    held_at: datetime | None = None


class HolderView(Wire):
    """Another mount namespace, as a container is, that has the mount. `current`: it sees what lives now, not a dead
    predecessor. `pid` is its oldest process, `paths` are as that sees them."""

    namespace: int
    pid: int
    command: str = ""
    paths: list[str]
    current: bool


class FormerStart(Wire):
    """A former mount process of the key whose traces remain. `pid` while it runs: it serves files opened before."""

    token: str
    pid: int | None = None


class MountView(Wire):
    """Everything the agent knows of one mount. No credential is in it, only the name of one."""

    key: str
    state: MountState
    since: datetime
    volume: str
    endpoint: str
    region: str
    path_style: bool
    bucket: str
    prefix: str
    mode: AccessMode
    driver: str
    ownership: Ownership
    credential_id: str
    credential_expires_at: datetime | None = None
    pid: int | None = None
    token: str = Field(description="Names this start of the process: its stage entry, scratch folder and log.")
    device: str | None = None
    path: str = Field(description="Where it is mounted on this node.")
    layers: int = Field(description="Mounts stacked there; the top one counts.")
    last_error: str | None = None
    trouble: str | None = None
    unresponsive: str | None = None
    repairs: int = 0
    failures: int = Field(default=0, description="Starts in a row that failed.")
    repairing: bool = False
    refuses: bool = Field(default=False, description="Takes no new attachments: it or its node is drained.")
    attachments: list[AttachmentView] = []
    holders: list[HolderView] | None = Field(default=None, description="None: it could not be found out in time.")
    usage: MountUsage | None = None
    former: list[FormerStart] = []
    last_words: str = Field(default="", description="The end of what the process said.")
    log: str = Field(default="", description="File with what it said.")

    @property
    def place(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"


class RepairRequest(Wire):
    """`force`: also if it lives; its process is killed, and what is open on it fails."""

    force: bool = False


class RepairAnswer(Wire):
    """`repaired` is False when there was nothing to repair."""

    key: str
    repaired: bool
    state: MountState
    seconds: float


class DrainRequest(Wire):
    """`keys`: mounts by key or by the first 6 or more of its digits; None: the whole node. `wait` in seconds for the
    attachments to end."""

    keys: list[str] | None = Field(default=None, min_length=1)
    wait: float = Field(default=0.0, ge=0, le=MAX_WAIT_SECONDS)


class ResumeRequest(Wire):
    """`keys` as in `DrainRequest`; None ends every drain."""

    keys: list[str] | None = Field(default=None, min_length=1)


class DrainingMount(Wire):
    """A mount that refuses attachments, with the sessions that still hold it."""

    key: str
    bucket: str
    prefix: str
    state: MountState
    attachments: int
    sessions: list[str]


class DrainStatus(Wire):
    """`draining`: the whole node refuses new attachments; else only `keys` do. `mounts` are those that refuse and are
    there; `attachments` sums what they wait for. `done`: something drains, and nothing is attached to it any more."""

    draining: bool
    keys: list[str] = []
    attachments: int = 0
    mounts: list[DrainingMount] = []
    done: bool = False
