"""One engine per process: aiosqlite with WAL for the one-machine stack, asyncpg for production."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy import Connection, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from ..core.errors import ConfigError, NoSpace, ServiceUnavailable

_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}


def database_url(text_: str) -> str:
    """`sqlite:///path` or `postgresql://user:password@host/name`, with the async driver put in."""
    try:
        url = make_url(text_)
    except ArgumentError:
        raise ConfigError(
            "The database URL does not parse.", hint="Write sqlite:///PATH or postgresql://HOST/NAME."
        ) from None
    driver = _DRIVERS.get(url.drivername.partition("+")[0])
    if driver is None:
        raise ConfigError(f"Database {url.drivername!r} is not supported.", hint="Use sqlite or postgresql.")
    return url.set(drivername=driver).render_as_string(hide_password=False)


class Database:
    """Engine and sessions. `session()` is one transaction: committed at the end, rolled back on any exception."""

    def __init__(self, url: str) -> None:
        self.url = database_url(url)
        self.engine: AsyncEngine = create_async_engine(self.url, pool_pre_ping=True, hide_parameters=True)
        if self.engine.dialect.name == "sqlite":
            path = self.engine.url.database
            if path and path != ":memory:":
                Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            event.listen(self.engine.sync_engine, "connect", _sqlite_connect)
            event.listen(self.engine.sync_engine, "begin", _sqlite_begin)
        self._sessions = async_sessionmaker(self.engine, expire_on_commit=False)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[AsyncSession]:
        """Raises `ServiceUnavailable` when the database does not answer, `NoSpace` when its disk is full."""
        try:
            async with self._sessions() as session, session.begin():
                yield session
        except (OperationalError, InterfaceError) as err:
            raise _translate(err) from err
        except OSError as err:  # asyncpg: connection refused
            raise ServiceUnavailable("The database does not answer.", hint="Check that it runs.") from err

    async def check(self) -> None:
        async with self.session() as session:
            await session.execute(text("SELECT 1"))

    async def close(self) -> None:
        await self.engine.dispose()


def _translate(err: DBAPIError) -> ServiceUnavailable | NoSpace:
    cause = str(err.orig)
    if "disk is full" in cause or "No space left" in cause:
        return NoSpace("The disk of the database is full.", hint="Free space, then try again.")
    return ServiceUnavailable(f"The database refused ({type(err.orig).__name__}).", hint="Check that it runs.")


def _sqlite_connect(connection, _record) -> None:  # type: ignore[no-untyped-def]  # DBAPI objects have no common type
    # The driver's own BEGIN comes too late (not before reads or DDL), so transactions are begun by `_sqlite_begin`:
    # https://docs.sqlalchemy.org/en/20/dialects/sqlite.html#transactions-with-sqlite-and-the-sqlite3-driver
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout=10000")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _sqlite_begin(connection: Connection) -> None:
    # IMMEDIATE, because a transaction that reads first and writes later fails at once when another writer came between,
    # without waiting for busy_timeout. Transactions here are short; on one machine they may queue.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
