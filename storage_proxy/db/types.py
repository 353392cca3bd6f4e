"""Column types: encrypted text and UTC times that are the same on SQLite and PostgreSQL."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import DateTime, String
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

from ..core.crypto import Keyring
from ..core.secrets import Secret


class EncryptedText(TypeDecorator[str]):
    """Holds the text form made by `Keyring.encrypt`; refuses anything that looks like a plain secret.

    Encryption needs the row's place as associated data, which a column type does not know, so repositories encrypt
    with `seal_column` and open with `open_column`; this type only guards that nothing else is stored.
    """

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        if value is not None and not value.startswith("mk1."):
            raise ValueError("an encrypted column takes only values made by Keyring.encrypt")
        return value


def seal_column(keyring: Keyring, secret: Secret, table: str, column: str, row_id: object) -> str:
    return keyring.encrypt(secret, f"{table}.{column}:{row_id}")


def open_column(keyring: Keyring, value: str, table: str, column: str, row_id: object) -> Secret:
    return keyring.decrypt(value, f"{table}.{column}:{row_id}")


class UTCDateTime(TypeDecorator[datetime]):
    """Aware datetimes in, aware UTC datetimes out (SQLite keeps no zone)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a naive datetime is not stored")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
