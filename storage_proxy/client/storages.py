"""The shapes of what the storage proxy tells of nodes and their mounts: `GET /storages/{type}/...`.

Ages are in seconds and were measured by the clock of Redis; `stale` means that the node has not kept its promise to
report again. States are texts, so that what a newer agent says stays readable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from datetime import datetime
from enum import StrEnum

from pydantic import Field

from ..core.wire import MountState, Wire
from .mounts import MountUsage

# What needs no look: everything else is troubled.
_WELL: Collection[str] = frozenset({MountState.STAGING, MountState.LIVE, MountState.DRAINING})


class NodeState(StrEnum):
    RUNNING = "running"
    STOPPED = "stopped"  # in order; its mounts may live on and wait for the next agent
    AWAY = "away"  # no report when one was due: killed, hung, cut off, or powered off


class MountsWanted(StrEnum):
    """Which mounts an answer lists."""

    ALL = "all"
    TROUBLED = "troubled"
    NONE = "none"


class VolumeCount(Wire):
    """Mounts of one volume on one node. `troubled`: keys of those that need a look."""

    by_state: dict[str, int] = {}
    attachments: int = 0
    worst_state: str | None = None  # what the worst mount is in, and since when
    worst_since: datetime | None = None
    last_error: str | None = None  # the latest of any mount
    troubled: list[str] = []

    @property
    def mounts(self) -> int:
        return sum(self.by_state.values())


def sum_states(counts: Iterable[VolumeCount]) -> dict[str, int]:
    """Mounts by state."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count.by_state)
    return dict(sorted(total.items()))


class VolumeStatus(Wire):
    """One volume over all nodes. `mounts`, `by_state`, `attachments` and `nodes` count what nodes report now;
    `stale_mounts` what nodes had that do not report any more."""

    name: str
    endpoint: str
    mounts: int = 0
    by_state: dict[str, int] = {}
    attachments: int = 0
    nodes: int = 0
    stale_mounts: int = 0


class NodeStatus(Wire):
    """One agent, counting the volumes that were asked for. After `stale` these are its last words."""

    agent_id: str
    state: NodeState
    stale: bool
    heartbeat: datetime
    heartbeat_age_seconds: float
    heartbeat_interval_seconds: float
    version: str = ""
    pid: int | None = None
    started: datetime | None = None
    draining: bool = False
    warnings: list[str] = []
    mounts: int = 0
    by_state: dict[str, int] = {}
    attachments: int = 0
    volumes: dict[str, VolumeCount] = {}

    def only(self, volumes: Collection[str]) -> NodeStatus:
        """The node as if it had these volumes only."""
        counts = {name: count for name, count in self.volumes.items() if name in volumes}
        states = sum_states(counts.values())
        return self.model_copy(
            update={
                "volumes": counts,
                "mounts": sum(states.values()),
                "by_state": states,
                "attachments": sum(count.attachments for count in counts.values()),
            }
        )


class MountStatus(Wire):
    """One mount of one node. `pid` is the driver's process; `trouble`: it lives, but S3 does not do what it asks;
    `unresponsive`: its process does not answer. `usage` is None if it was not measured yet."""

    agent_id: str
    key: str
    volume: str
    endpoint: str = ""
    bucket: str
    prefix: str = ""
    mode: str
    driver: str
    state: str
    since: datetime
    last_error: str | None = None
    pid: int | None = None
    sessions: list[str] = []
    repairs: int = 0
    trouble: str | None = None
    unresponsive: str | None = None
    usage: MountUsage | None = None
    heartbeat: datetime
    heartbeat_age_seconds: float
    stale: bool

    @property
    def troubled(self) -> bool:
        said = (self.last_error, self.trouble, self.unresponsive)
        return self.stale or self.state not in _WELL or any(text is not None for text in said)


class AttachmentStatus(Wire):
    """One folder of one session on one node."""

    agent_id: str
    session_id: str
    vfid: str
    volume: str
    mount_key: str
    mode: str
    target: str
    state: str
    since: datetime


class Reading(Wire):
    """When the answer was true. `stale`: Redis does not answer (`error`), and this is what was read before."""

    type: str = Field(description="Backend of the volumes, as in `minio`.")
    as_of: datetime
    age_seconds: float = 0.0
    stale: bool = False
    error: str | None = None
    unreadable: int = Field(default=0, description="Reports that this version does not understand.")


class StorageStatus(Reading):
    """Every volume of a type, every node, and the mounts that were asked for."""

    volumes: list[VolumeStatus]
    nodes: list[NodeStatus]
    mounts: list[MountStatus] = []


class StorageNodeStatus(Reading):
    """One node with all its mounts and attachments of a type."""

    node: NodeStatus
    mounts: list[MountStatus] = []
    attachments: list[AttachmentStatus] = []


class MountEvent(Wire):
    """One event of one node. `boot` and `number` name it: `number` counts the events since the agent started, so a
    missing one was lost and a repeated one was told twice. `volume` is None for what concerns the whole node.
    """

    id: str
    at: datetime
    agent_id: str
    boot: str = ""
    number: int = 0
    kind: str
    key: str | None = None
    volume: str | None = None
    bucket: str | None = None
    prefix: str | None = None
    old: str | None = None
    new: str | None = None
    error: str | None = None
    detail: dict[str, object] = {}


class EventsLost(Wire):
    """Here events are missing: they were gone before they could be sent. `count` is None if nobody knows how many."""

    count: int | None = None


class SourceChanged(Wire):
    """Redis went away (events may be late) or is back."""

    available: bool


FeedItem = MountEvent | EventsLost | SourceChanged
