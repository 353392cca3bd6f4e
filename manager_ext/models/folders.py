"""Folders and what they are bound to."""

from __future__ import annotations

import uuid
from datetime import datetime
from enum import StrEnum

from sqlalchemy import BigInteger, ForeignKey, Integer, String, UniqueConstraint, Uuid
from sqlalchemy.orm import Mapped, mapped_column

from storage_proxy.client.manager import FolderKind
from storage_proxy.core.ids import QuotaScopeID, VFolderID
from storage_proxy.db import UTCDateTime

from .base import Base, Timestamps, words


class FolderState(StrEnum):
    """`creating` and `deleting` stand while the storage proxy is asked; users see only `ready` folders."""

    CREATING = "creating"
    READY = "ready"
    DELETING = "deleting"


class FolderRow(Timestamps, Base):
    """A vfolder: managed (a prefix that follows from its id) or bound (an existing bucket or a directory of it)."""

    __tablename__ = "manager_folders"
    __table_args__ = (UniqueConstraint("quota_scope", "name"),)

    id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True, comment="folder part of the vfid")
    quota_scope: Mapped[str] = mapped_column(String(64), comment="owner: user:<uuid> or project:<uuid>")
    name: Mapped[str] = mapped_column(String(64), comment="unique in its scope, also while creating and deleting")
    proxy: Mapped[str] = mapped_column(String(64), comment="name of the storage proxy in the configuration")
    volume: Mapped[str] = mapped_column(String(64), comment="name of the volume on that proxy")
    kind: Mapped[FolderKind] = mapped_column(words(FolderKind, 16), comment="managed or bound")
    state: Mapped[FolderState] = mapped_column(
        words(FolderState, 16), index=True, comment="creating, ready or deleting"
    )
    attempt: Mapped[uuid.UUID | None] = mapped_column(
        Uuid, comment="which request is creating or deleting it; null when none is, so another may take over"
    )
    attempt_until: Mapped[datetime | None] = mapped_column(
        UTCDateTime, comment="a request that still holds `attempt` after this time has died"
    )
    read_only: Mapped[bool] = mapped_column(default=False, comment="true: sessions get it read-only, whatever they ask")
    endpoint: Mapped[str | None] = mapped_column(String(512), comment="bound: object store; null: that of the volume")
    region: Mapped[str | None] = mapped_column(String(64), comment="bound: region of the endpoint; null: the volume's")
    bucket: Mapped[str | None] = mapped_column(String(63), comment="bound: the bucket")
    prefix: Mapped[str | None] = mapped_column(String(1025), comment="bound: directory in it; empty or ends in a slash")
    credential_id: Mapped[uuid.UUID | None] = mapped_column(
        ForeignKey("manager_credentials.id"), index=True, comment="bound: the keys that open the bucket"
    )
    uid: Mapped[int | None] = mapped_column(BigInteger, comment="bound: owner shown in sessions; null: the session's")
    gid: Mapped[int | None] = mapped_column(BigInteger, comment="bound: group shown in sessions; null: the session's")
    umask: Mapped[int | None] = mapped_column(Integer, comment="bound: mask in sessions; null: the session's")
    created_by: Mapped[str] = mapped_column(String(64), comment="subject of the token that made it")

    @property
    def vfid(self) -> str:
        return str(VFolderID(QuotaScopeID.parse(self.quota_scope), self.id))
