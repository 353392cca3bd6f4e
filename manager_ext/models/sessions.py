"""Planned sessions and the grants issued for them."""

from __future__ import annotations

import uuid
from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey, Integer, String, UniqueConstraint, Uuid
from sqlalchemy.orm import Mapped, mapped_column, relationship

from storage_proxy.client.manager import SessionState
from storage_proxy.core.ids import AccessMode
from storage_proxy.db import UTCDateTime

from .base import Base, Timestamps, words


class SessionRow(Timestamps, Base):
    """A compute session on one agent. `planning`: credentials are being issued; `ending`: some wait to be revoked."""

    __tablename__ = "manager_sessions"

    id: Mapped[str] = mapped_column(
        String(64), primary_key=True, comment="session id, given by the caller or made here"
    )
    owner: Mapped[str] = mapped_column(String(64), index=True, comment="user:<uuid> who planned it")
    agent_id: Mapped[str] = mapped_column(String(64), comment="the agent that its grants are for")
    state: Mapped[SessionState] = mapped_column(
        words(SessionState, 16), index=True, comment="planning, active or ending"
    )
    mounts: Mapped[list[SessionMountRow]] = relationship(
        back_populates="session",
        cascade="all, delete-orphan",
        order_by="SessionMountRow.target",
        lazy="selectin",
        passive_deletes=True,
    )


class SessionMountRow(Timestamps, Base):
    """One folder in one session. While the row stands, the folder cannot be deleted."""

    __tablename__ = "manager_session_mounts"
    __table_args__ = (UniqueConstraint("session_id", "target"),)

    id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True, default=uuid.uuid4, comment="internal")
    session_id: Mapped[str] = mapped_column(
        ForeignKey("manager_sessions.id", ondelete="CASCADE"), comment="the session"
    )
    folder_id: Mapped[uuid.UUID] = mapped_column(
        ForeignKey("manager_folders.id"), index=True, comment="the folder that it holds"
    )
    folder_name: Mapped[str] = mapped_column(String(64), comment="its name when the session was planned")
    vfid: Mapped[str] = mapped_column(String(110), comment="its vfid, as in the grant")
    target: Mapped[str] = mapped_column(String(1025), comment="absolute path inside the container")
    mode: Mapped[AccessMode] = mapped_column(words(AccessMode, 2), comment="ro or rw, as granted")
    uid: Mapped[int | None] = mapped_column(
        BigInteger, comment="owner shown, as granted; null: planned by a version that did not keep it"
    )
    gid: Mapped[int | None] = mapped_column(BigInteger, comment="group shown, as granted; null as uid")
    umask: Mapped[int | None] = mapped_column(Integer, comment="mask, as granted; null as uid")
    proxy: Mapped[str] = mapped_column(String(64), comment="storage proxy that issued the credential")
    volume: Mapped[str] = mapped_column(String(64), comment="volume on that proxy")
    credential_id: Mapped[str | None] = mapped_column(
        String(128), comment="identity of the credential in the grant; null until it was issued"
    )
    revoke_ref: Mapped[str | None] = mapped_column(
        String(2048), comment="what the proxy revokes when the session ends; null: nothing to revoke"
    )
    credential_expires_at: Mapped[datetime | None] = mapped_column(
        UTCDateTime, comment="when the credential in the last grant ends; null: it does not"
    )
    expires_at: Mapped[datetime | None] = mapped_column(UTCDateTime, comment="when the last grant ended to be good")
    session: Mapped[SessionRow] = relationship(back_populates="mounts")
