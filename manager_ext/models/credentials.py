"""Keys for object stores, encrypted."""

from __future__ import annotations

import uuid

from sqlalchemy import String, UniqueConstraint, Uuid
from sqlalchemy.orm import Mapped, mapped_column

from storage_proxy.db import EncryptedText

from .base import Base, Timestamps


class CredentialRow(Timestamps, Base):
    """One key pair of one owner. A row without a name belongs to the one folder that was bound with keys of its own."""

    __tablename__ = "manager_credentials"
    __table_args__ = (UniqueConstraint("quota_scope", "name"),)

    id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True, default=uuid.uuid4, comment="shown to users")
    quota_scope: Mapped[str] = mapped_column(String(64), comment="owner: user:<uuid> or project:<uuid>")
    name: Mapped[str | None] = mapped_column(String(64), comment="unique in its scope; null for a folder's own keys")
    endpoint: Mapped[str | None] = mapped_column(
        String(512), comment="the only endpoint that these keys are sent to; null: that of the volume"
    )
    access_key_hint: Mapped[str] = mapped_column(String(16), comment="last characters of the access key, for people")
    keys: Mapped[str] = mapped_column(
        EncryptedText, comment="JSON of access and secret key, encrypted for manager_credentials.keys:<id>"
    )
    created_by: Mapped[str] = mapped_column(String(64), comment="subject of the token that made it")
