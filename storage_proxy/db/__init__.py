"""SQL for the proxy and the manager extension: engines for SQLite and PostgreSQL, encrypted columns, migrations."""

from .engine import Database, database_url
from .migrate import upgrade
from .types import EncryptedText, UTCDateTime

__all__ = ["Database", "EncryptedText", "UTCDateTime", "database_url", "upgrade"]
