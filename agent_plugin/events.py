"""What happens to the mounts of this node, for whoever listens: status in Redis, the event stream, metrics, hooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from storage_proxy.core.ids import MountKey
from storage_proxy.core.wire import MountState

from .drivers import MountPlan


class EventKind(StrEnum):
    STATE = "state"  # a transition: `old` and `new` say which
    UNRESPONSIVE = "unresponsive"  # the mount process does not answer; `error` says since when
    ANSWERS = "answers"  # and answers again
    TROUBLE = "trouble"  # the mount lives, but S3 refuses it or is away; without `error` it works again
    REPAIRED = "repaired"  # detail: seconds, attempt, binds, containers
    RENEWED = "renewed"  # a fresh credential is in use; detail: seconds, binds, expires
    RECONCILED = "reconciled"  # journal, mount table, processes and containers differed; detail: what was done
    DRAIN = "drain"  # refuses attachments from now on, or (detail: draining=False) no longer


@dataclass(frozen=True, slots=True)
class Event:
    """`at` in seconds since the epoch. `key` and `plan` are None for what concerns the whole node."""

    at: float
    kind: EventKind
    key: MountKey | None = None
    plan: MountPlan | None = None
    old: MountState | None = None
    new: MountState | None = None
    error: str | None = None
    detail: Mapping[str, object] = field(default_factory=dict)
