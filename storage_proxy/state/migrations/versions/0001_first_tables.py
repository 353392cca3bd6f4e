"""Bound folders, uploads, mount credentials."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "bound_folders",
        sa.Column("id", sa.String(length=32), nullable=False, comment="32 hex; part of the encryption context"),
        sa.Column(
            "volume", sa.String(length=64), nullable=False, comment="name of the volume section it was created on"
        ),
        sa.Column("vfid", sa.String(length=96), nullable=False, comment="<quota scope>/<32 hex>"),
        sa.Column(
            "endpoint", sa.String(length=1024), nullable=False, comment="URL of the S3 server that holds the bucket"
        ),
        sa.Column("region", sa.String(length=64), nullable=False),
        sa.Column("bucket", sa.String(length=63), nullable=False),
        sa.Column(
            "prefix",
            sa.String(length=1025),
            nullable=False,
            comment="empty for the whole bucket, else ends with a slash",
        ),
        sa.Column("read_only", sa.Boolean(), nullable=False),
        sa.Column("access_key", sa.String(length=256), nullable=False),
        sa.Column(
            "secret_key", sa.String(length=1024), nullable=False, comment="Keyring.encrypt, place = this row's id"
        ),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("volume", "vfid", name="uq_bound_folders_volume_vfid"),
    )
    op.create_table(
        "mount_credentials",
        sa.Column("id", sa.String(length=32), nullable=False, comment="32 hex; the credential_id on the wire"),
        sa.Column("volume", sa.String(length=64), nullable=False),
        sa.Column("vfid", sa.String(length=96), nullable=False),
        sa.Column("mode", sa.String(length=2), nullable=False, comment="ro or rw"),
        sa.Column(
            "recipient_key", sa.String(length=64), nullable=False, comment="public key of the agent it is sealed to"
        ),
        sa.Column("state", sa.String(length=16), nullable=False, comment="issuing, live or revoking"),
        sa.Column("method", sa.String(length=16), nullable=True, comment="sts, iam or parent"),
        sa.Column("revoke_ref", sa.String(length=512), nullable=True, comment="what the issuer needs to revoke it"),
        sa.Column("access_key", sa.String(length=256), nullable=True),
        sa.Column("secret_key", sa.String(length=1024), nullable=True, comment="place = this row's id"),
        sa.Column("session_token", sa.String(length=8192), nullable=True, comment="place = this row's id; only sts"),
        sa.Column("attempts", sa.Integer(), nullable=False, comment="failed attempts to revoke it"),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_mount_credentials_expires_at", "mount_credentials", ["expires_at"])
    op.create_index("ix_mount_credentials_lookup", "mount_credentials", ["volume", "vfid", "mode", "recipient_key"])
    op.create_table(
        "uploads",
        sa.Column("session", sa.String(length=32), nullable=False, comment="32 hex; also in the client's token"),
        sa.Column("volume", sa.String(length=64), nullable=False),
        sa.Column("vfid", sa.String(length=96), nullable=False),
        sa.Column("relpath", sa.String(length=1024), nullable=False, comment="guarded path inside the folder"),
        sa.Column("size", sa.BigInteger(), nullable=False, comment="declared size in bytes; enforced"),
        sa.Column(
            "mode", sa.String(length=16), nullable=True, comment="proxied or presigned; null before the first request"
        ),
        sa.Column("part_size", sa.BigInteger(), nullable=True, comment="bytes of every part but the last"),
        sa.Column(
            "upload_id", sa.String(length=2048), nullable=True, comment="S3 multipart upload; null for small files"
        ),
        sa.Column(
            "committed",
            sa.BigInteger(),
            nullable=False,
            comment="bytes that are safe in S3: whole parts plus the tail object",
        ),
        sa.Column("done", sa.Boolean(), nullable=False, comment="the file is published; kept to answer retries"),
        sa.Column("lease", sa.String(length=32), nullable=True, comment="random id of the request that writes now"),
        sa.Column(
            "lease_until", sa.DateTime(timezone=True), nullable=True, comment="an older lease belongs to a dead writer"
        ),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "expires_at",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="moved on by every request that adds bytes",
        ),
        sa.PrimaryKeyConstraint("session"),
    )
    op.create_index("ix_uploads_expires_at", "uploads", ["expires_at"])
    op.create_index("ix_uploads_folder", "uploads", ["volume", "vfid"])
    op.create_table(
        "mount_credential_uses",
        sa.Column("credential_id", sa.String(length=32), nullable=False),
        sa.Column("session_id", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["credential_id"], ["mount_credentials.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("credential_id", "session_id"),
    )


def downgrade() -> None:
    op.drop_table("mount_credential_uses")
    op.drop_index("ix_uploads_folder", "uploads")
    op.drop_index("ix_uploads_expires_at", "uploads")
    op.drop_table("uploads")
    op.drop_index("ix_mount_credentials_lookup", "mount_credentials")
    op.drop_index("ix_mount_credentials_expires_at", "mount_credentials")
    op.drop_table("mount_credentials")
    op.drop_table("bound_folders")
