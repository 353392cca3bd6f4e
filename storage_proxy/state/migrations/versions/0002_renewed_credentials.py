"""Mount credentials that are renewed: the former key stays, under the credential that it belonged to."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    with op.batch_alter_table("mount_credentials") as table:
        table.add_column(
            sa.Column(
                "former_of",
                sa.String(length=32),
                nullable=True,
                comment="id of the credential that this retired key belonged to before its renewal",
            )
        )
        table.alter_column(
            "state",
            existing_type=sa.String(length=16),
            existing_nullable=False,
            comment="issuing, live, retired or revoking",
        )
        table.alter_column(
            "created_at",
            existing_type=sa.DateTime(timezone=True),
            existing_nullable=False,
            comment="when the key of this row was made",
        )
        table.create_index("ix_mount_credentials_former_of", ["former_of"])


def downgrade() -> None:
    with op.batch_alter_table("mount_credentials") as table:
        table.drop_index("ix_mount_credentials_former_of")
        table.alter_column("created_at", existing_type=sa.DateTime(timezone=True), comment=None)
        table.alter_column("state", existing_type=sa.String(length=16), comment="issuing, live or revoking")
        table.drop_column("former_of")
