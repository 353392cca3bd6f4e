"""What all tables share: names of constraints (so that migrations can find them), ids and times."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum

from sqlalchemy import Enum, MetaData
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from storage_proxy.db import UTCDateTime

VERSION_TABLE = "manager_ext_version"

# All tables start with `manager_`, because the storage proxy may keep its own in the same database.
_NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


def now() -> datetime:
    return datetime.now(UTC)


def words(enum: type[StrEnum], length: int) -> Enum:
    """A column of an enum's values as plain text, so that a new member needs no migration."""
    return Enum(enum, native_enum=False, length=length, values_callable=lambda cls: [item.value for item in cls])


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=_NAMES)


class Timestamps:
    """`created_at` and `updated_at`, set by this process in UTC."""

    created_at: Mapped[datetime] = mapped_column(UTCDateTime, default=now, comment="when the row was made")
    updated_at: Mapped[datetime] = mapped_column(
        UTCDateTime, default=now, onupdate=now, comment="when the row was last changed"
    )
