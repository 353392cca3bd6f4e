"""What a fresh grant for a mount must repeat, and when its credential ends."""

import sqlalchemy as sa
from alembic import op

from storage_proxy.db import UTCDateTime

revision = "0002"
down_revision = "0001"

TABLE = "manager_session_mounts"


def upgrade() -> None:
    for column in (
        sa.Column(
            "uid",
            sa.BigInteger(),
            nullable=True,
            comment="owner shown, as granted; null: planned by a version that did not keep it",
        ),
        sa.Column("gid", sa.BigInteger(), nullable=True, comment="group shown, as granted; null as uid"),
        sa.Column("umask", sa.Integer(), nullable=True, comment="mask, as granted; null as uid"),
        sa.Column(
            "credential_expires_at",
            UTCDateTime(),
            nullable=True,
            comment="when the credential in the last grant ends; null: it does not",
        ),
    ):
        op.add_column(TABLE, column)


def downgrade() -> None:
    with op.batch_alter_table(TABLE) as table:
        for name in ("credential_expires_at", "umask", "gid", "uid"):
            table.drop_column(name)
