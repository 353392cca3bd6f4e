"""The tables that the proxy owns. Nothing here is a cache: each row is the only record of its fact."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from pathlib import Path

from sqlalchemy import BigInteger, Boolean, ForeignKey, Index, Integer, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from ..db import Database, EncryptedText, UTCDateTime, upgrade

VERSION_TABLE = "storage_proxy_version"
MIGRATIONS = Path(__file__).with_name("migrations")


class Base(DeclarativeBase):
    pass


class BoundFolder(Base):
    """A vfolder that is an existing bucket, or a directory of one, with its own credential."""

    __tablename__ = "bound_folders"
    __table_args__ = (UniqueConstraint("volume", "vfid", name="uq_bound_folders_volume_vfid"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True, comment="32 hex; part of the encryption context")
    volume: Mapped[str] = mapped_column(String(64), comment="name of the volume section it was created on")
    vfid: Mapped[str] = mapped_column(String(96), comment="<quota scope>/<32 hex>")
    endpoint: Mapped[str] = mapped_column(String(1024), comment="URL of the S3 server that holds the bucket")
    region: Mapped[str] = mapped_column(String(64))
    bucket: Mapped[str] = mapped_column(String(63))
    prefix: Mapped[str] = mapped_column(String(1025), comment="empty for the whole bucket, else ends with a slash")
    read_only: Mapped[bool] = mapped_column(Boolean)
    access_key: Mapped[str] = mapped_column(String(256))
    secret_key: Mapped[str] = mapped_column(EncryptedText(1024), comment="Keyring.encrypt, place = this row's id")
    created_at: Mapped[datetime] = mapped_column(UTCDateTime)


class UploadMode(StrEnum):
    """Who sends the bytes to S3. Fixed by the first request of the upload."""

    PROXIED = "proxied"
    PRESIGNED = "presigned"


class Upload(Base):
    """One upload of one file. S3 holds the parts, this row how far the upload is and who works on it."""

    __tablename__ = "uploads"
    __table_args__ = (Index("ix_uploads_expires_at", "expires_at"), Index("ix_uploads_folder", "volume", "vfid"))

    session: Mapped[str] = mapped_column(String(32), primary_key=True, comment="32 hex; also in the client's token")
    volume: Mapped[str] = mapped_column(String(64))
    vfid: Mapped[str] = mapped_column(String(96))
    relpath: Mapped[str] = mapped_column(String(1024), comment="guarded path inside the folder")
    size: Mapped[int] = mapped_column(BigInteger, comment="declared size in bytes; enforced")
    mode: Mapped[str | None] = mapped_column(String(16), comment="proxied or presigned; null before the first request")
    part_size: Mapped[int | None] = mapped_column(BigInteger, comment="bytes of every part but the last")
    upload_id: Mapped[str | None] = mapped_column(String(2048), comment="S3 multipart upload; null for small files")
    offset: Mapped[int] = mapped_column(
        "committed", BigInteger, default=0, comment="bytes that are safe in S3: whole parts plus the tail object"
    )
    done: Mapped[bool] = mapped_column(Boolean, default=False, comment="the file is published; kept to answer retries")
    lease: Mapped[str | None] = mapped_column(String(32), comment="random id of the request that writes now")
    lease_until: Mapped[datetime | None] = mapped_column(UTCDateTime, comment="an older lease belongs to a dead writer")
    created_at: Mapped[datetime] = mapped_column(UTCDateTime)
    expires_at: Mapped[datetime] = mapped_column(UTCDateTime, comment="moved on by every request that adds bytes")


class CredentialState(StrEnum):
    """A row exists before the key does, so that a crash between the two leaves a trace. `retired`: a key that was
    renewed; mounts that began with it may still have files open, so it lives until its own time is over."""

    ISSUING = "issuing"
    LIVE = "live"
    RETIRED = "retired"
    REVOKING = "revoking"


class MountCredential(Base):
    """An S3 credential limited to one managed folder, made for the mounts of one agent."""

    __tablename__ = "mount_credentials"
    __table_args__ = (
        Index("ix_mount_credentials_lookup", "volume", "vfid", "mode", "recipient_key"),
        Index("ix_mount_credentials_expires_at", "expires_at"),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True, comment="32 hex; the credential_id on the wire")
    volume: Mapped[str] = mapped_column(String(64))
    vfid: Mapped[str] = mapped_column(String(96))
    mode: Mapped[str] = mapped_column(String(2), comment="ro or rw")
    recipient_key: Mapped[str] = mapped_column(String(64), comment="public key of the agent it is sealed to")
    state: Mapped[str] = mapped_column(String(16), comment="issuing, live, retired or revoking")
    method: Mapped[str | None] = mapped_column(String(16), comment="sts, iam or parent")
    revoke_ref: Mapped[str | None] = mapped_column(String(512), comment="what the issuer needs to revoke it")
    access_key: Mapped[str | None] = mapped_column(String(256))
    secret_key: Mapped[str | None] = mapped_column(EncryptedText(1024), comment="place = this row's id")
    session_token: Mapped[str | None] = mapped_column(EncryptedText(8192), comment="place = this row's id; only sts")
    attempts: Mapped[int] = mapped_column(Integer, default=0, comment="failed attempts to revoke it")
    former_of: Mapped[str | None] = mapped_column(
        String(32), index=True, comment="id of the credential that this retired key belonged to before its renewal"
    )
    created_at: Mapped[datetime] = mapped_column(UTCDateTime, comment="when the key of this row was made")
    expires_at: Mapped[datetime] = mapped_column(UTCDateTime)


class CredentialUse(Base):
    """A session that mounts with a credential. Sessions of one agent share it; the last one to leave revokes it."""

    __tablename__ = "mount_credential_uses"

    credential_id: Mapped[str] = mapped_column(ForeignKey("mount_credentials.id", ondelete="CASCADE"), primary_key=True)
    session_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(UTCDateTime)


async def upgrade_state(database: Database) -> None:
    """Brings the proxy's tables to the newest revision. Idempotent."""
    await upgrade(database, MIGRATIONS, VERSION_TABLE)
