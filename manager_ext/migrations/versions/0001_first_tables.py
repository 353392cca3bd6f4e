"""Folders, credentials, agents, sessions and their mounts."""

import sqlalchemy as sa
from alembic import op

from storage_proxy.db import EncryptedText, UTCDateTime

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "manager_agents",
        sa.Column("id", sa.String(length=64), nullable=False, comment="agent id from its configuration"),
        sa.Column(
            "public_key", sa.String(length=64), nullable=False, comment="X25519 public key, base64url of 32 bytes"
        ),
        sa.Column(
            "registered_by",
            sa.String(length=64),
            nullable=False,
            comment="subject of the token that registered it; only that one or an admin may change the key",
        ),
        sa.Column("created_at", UTCDateTime(), nullable=False, comment="when the row was made"),
        sa.Column("updated_at", UTCDateTime(), nullable=False, comment="when the row was last changed"),
        sa.PrimaryKeyConstraint("id", name="pk_manager_agents"),
    )
    op.create_table(
        "manager_credentials",
        sa.Column("id", sa.Uuid(), nullable=False, comment="shown to users"),
        sa.Column("quota_scope", sa.String(length=64), nullable=False, comment="owner: user:<uuid> or project:<uuid>"),
        sa.Column(
            "name", sa.String(length=64), nullable=True, comment="unique in its scope; null for a folder's own keys"
        ),
        sa.Column(
            "endpoint",
            sa.String(length=512),
            nullable=True,
            comment="the only endpoint that these keys are sent to; null: that of the volume",
        ),
        sa.Column(
            "access_key_hint",
            sa.String(length=16),
            nullable=False,
            comment="last characters of the access key, for people",
        ),
        sa.Column(
            "keys",
            EncryptedText(),
            nullable=False,
            comment="JSON of access and secret key, encrypted for manager_credentials.keys:<id>",
        ),
        sa.Column("created_by", sa.String(length=64), nullable=False, comment="subject of the token that made it"),
        sa.Column("created_at", UTCDateTime(), nullable=False, comment="when the row was made"),
        sa.Column("updated_at", UTCDateTime(), nullable=False, comment="when the row was last changed"),
        sa.PrimaryKeyConstraint("id", name="pk_manager_credentials"),
        sa.UniqueConstraint("quota_scope", "name", name="uq_manager_credentials_quota_scope_name"),
    )
    op.create_table(
        "manager_sessions",
        sa.Column("id", sa.String(length=64), nullable=False, comment="session id, given by the caller or made here"),
        sa.Column("owner", sa.String(length=64), nullable=False, comment="user:<uuid> who planned it"),
        sa.Column("agent_id", sa.String(length=64), nullable=False, comment="the agent that its grants are for"),
        sa.Column("state", sa.String(length=16), nullable=False, comment="planning, active or ending"),
        sa.Column("created_at", UTCDateTime(), nullable=False, comment="when the row was made"),
        sa.Column("updated_at", UTCDateTime(), nullable=False, comment="when the row was last changed"),
        sa.PrimaryKeyConstraint("id", name="pk_manager_sessions"),
    )
    op.create_index("ix_manager_sessions_owner", "manager_sessions", ["owner"], unique=False)
    op.create_index("ix_manager_sessions_state", "manager_sessions", ["state"], unique=False)
    op.create_table(
        "manager_folders",
        sa.Column("id", sa.Uuid(), nullable=False, comment="folder part of the vfid"),
        sa.Column("quota_scope", sa.String(length=64), nullable=False, comment="owner: user:<uuid> or project:<uuid>"),
        sa.Column(
            "name",
            sa.String(length=64),
            nullable=False,
            comment="unique in its scope, also while creating and deleting",
        ),
        sa.Column(
            "proxy", sa.String(length=64), nullable=False, comment="name of the storage proxy in the configuration"
        ),
        sa.Column("volume", sa.String(length=64), nullable=False, comment="name of the volume on that proxy"),
        sa.Column("kind", sa.String(length=16), nullable=False, comment="managed or bound"),
        sa.Column("state", sa.String(length=16), nullable=False, comment="creating, ready or deleting"),
        sa.Column(
            "attempt",
            sa.Uuid(),
            nullable=True,
            comment="which request is creating or deleting it; null when none is, so another may take over",
        ),
        sa.Column(
            "attempt_until",
            UTCDateTime(),
            nullable=True,
            comment="a request that still holds `attempt` after this time has died",
        ),
        sa.Column(
            "read_only", sa.Boolean(), nullable=False, comment="true: sessions get it read-only, whatever they ask"
        ),
        sa.Column(
            "endpoint", sa.String(length=512), nullable=True, comment="bound: object store; null: that of the volume"
        ),
        sa.Column(
            "region", sa.String(length=64), nullable=True, comment="bound: region of the endpoint; null: the volume's"
        ),
        sa.Column("bucket", sa.String(length=63), nullable=True, comment="bound: the bucket"),
        sa.Column(
            "prefix", sa.String(length=1025), nullable=True, comment="bound: directory in it; empty or ends in a slash"
        ),
        sa.Column("credential_id", sa.Uuid(), nullable=True, comment="bound: the keys that open the bucket"),
        sa.Column("uid", sa.BigInteger(), nullable=True, comment="bound: owner shown in sessions; null: the session's"),
        sa.Column("gid", sa.BigInteger(), nullable=True, comment="bound: group shown in sessions; null: the session's"),
        sa.Column("umask", sa.Integer(), nullable=True, comment="bound: mask in sessions; null: the session's"),
        sa.Column("created_by", sa.String(length=64), nullable=False, comment="subject of the token that made it"),
        sa.Column("created_at", UTCDateTime(), nullable=False, comment="when the row was made"),
        sa.Column("updated_at", UTCDateTime(), nullable=False, comment="when the row was last changed"),
        sa.ForeignKeyConstraint(["credential_id"], ["manager_credentials.id"], name="fk_manager_folders_credential_id"),
        sa.PrimaryKeyConstraint("id", name="pk_manager_folders"),
        sa.UniqueConstraint("quota_scope", "name", name="uq_manager_folders_quota_scope_name"),
    )
    op.create_index("ix_manager_folders_credential_id", "manager_folders", ["credential_id"], unique=False)
    op.create_index("ix_manager_folders_state", "manager_folders", ["state"], unique=False)
    op.create_table(
        "manager_session_mounts",
        sa.Column("id", sa.Uuid(), nullable=False, comment="internal"),
        sa.Column("session_id", sa.String(length=64), nullable=False, comment="the session"),
        sa.Column("folder_id", sa.Uuid(), nullable=False, comment="the folder that it holds"),
        sa.Column("folder_name", sa.String(length=64), nullable=False, comment="its name when the session was planned"),
        sa.Column("vfid", sa.String(length=110), nullable=False, comment="its vfid, as in the grant"),
        sa.Column("target", sa.String(length=1025), nullable=False, comment="absolute path inside the container"),
        sa.Column("mode", sa.String(length=2), nullable=False, comment="ro or rw, as granted"),
        sa.Column("proxy", sa.String(length=64), nullable=False, comment="storage proxy that issued the credential"),
        sa.Column("volume", sa.String(length=64), nullable=False, comment="volume on that proxy"),
        sa.Column(
            "credential_id",
            sa.String(length=128),
            nullable=True,
            comment="identity of the credential in the grant; null until it was issued",
        ),
        sa.Column(
            "revoke_ref",
            sa.String(length=2048),
            nullable=True,
            comment="what the proxy revokes when the session ends; null: nothing to revoke",
        ),
        sa.Column("expires_at", UTCDateTime(), nullable=True, comment="when the last grant ended to be good"),
        sa.Column("created_at", UTCDateTime(), nullable=False, comment="when the row was made"),
        sa.Column("updated_at", UTCDateTime(), nullable=False, comment="when the row was last changed"),
        sa.ForeignKeyConstraint(["folder_id"], ["manager_folders.id"], name="fk_manager_session_mounts_folder_id"),
        sa.ForeignKeyConstraint(
            ["session_id"], ["manager_sessions.id"], name="fk_manager_session_mounts_session_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_manager_session_mounts"),
        sa.UniqueConstraint("session_id", "target", name="uq_manager_session_mounts_session_id_target"),
    )
    op.create_index("ix_manager_session_mounts_folder_id", "manager_session_mounts", ["folder_id"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_manager_session_mounts_folder_id", table_name="manager_session_mounts")
    op.drop_table("manager_session_mounts")
    op.drop_index("ix_manager_folders_state", table_name="manager_folders")
    op.drop_index("ix_manager_folders_credential_id", table_name="manager_folders")
    op.drop_table("manager_folders")
    op.drop_index("ix_manager_sessions_state", table_name="manager_sessions")
    op.drop_index("ix_manager_sessions_owner", table_name="manager_sessions")
    op.drop_table("manager_sessions")
    op.drop_table("manager_credentials")
    op.drop_table("manager_agents")
