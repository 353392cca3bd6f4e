"""SQL: transactions, migrations that wait for each other, encrypted columns."""

import asyncio
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import StatementError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import storage_proxy.state
from storage_proxy.core.crypto import Keyring
from storage_proxy.core.errors import ConfigError, IntegrityError, ServiceUnavailable
from storage_proxy.core.secrets import Secret
from storage_proxy.db import Database, EncryptedText, UTCDateTime, database_url, upgrade
from storage_proxy.db.migrate import current_revision
from storage_proxy.db.types import open_column, seal_column
from storage_proxy.state.tables import VERSION_TABLE

MIGRATIONS = Path(storage_proxy.state.__file__).parent / "migrations"

pytestmark = pytest.mark.asyncio


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "rows"

    id: Mapped[int] = mapped_column(primary_key=True)
    secret: Mapped[str | None] = mapped_column(EncryptedText)
    at: Mapped[datetime | None] = mapped_column(UTCDateTime)


async def open_database(tmp_path: Path) -> Database:
    database = Database(f"sqlite:///{tmp_path}/d/x.db")
    async with database.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    return database


async def test_a_transaction_is_whole_or_nothing(tmp_path: Path) -> None:
    database = await open_database(tmp_path)

    async def fail_after_the_insert() -> None:
        async with database.session() as session:
            session.add(Row(id=1))
            await session.flush()
            raise RuntimeError("after the insert")

    with pytest.raises(RuntimeError):
        await fail_after_the_insert()
    async with database.session() as session:
        assert await session.get(Row, 1) is None
    await database.close()


async def test_writers_that_read_first_wait_for_each_other(tmp_path: Path) -> None:
    database = await open_database(tmp_path)
    async with database.session() as session:
        session.add(Row(id=1))
        await session.execute(text("CREATE TABLE counter (n INTEGER)"))
        await session.execute(text("INSERT INTO counter VALUES (0)"))

    async def add() -> None:
        async with database.session() as session:
            n = (await session.execute(text("SELECT n FROM counter"))).scalar_one()
            await session.execute(text("UPDATE counter SET n = :n"), {"n": n + 1})

    await asyncio.gather(*(add() for _ in range(20)))
    async with database.session() as session:
        assert (await session.execute(text("SELECT n FROM counter"))).scalar_one() == 20
    await database.close()


async def test_migrations_that_start_at_once_run_once(tmp_path: Path) -> None:
    databases = [Database(f"sqlite:///{tmp_path}/x.db") for _ in range(3)]
    await asyncio.gather(*(upgrade(database, MIGRATIONS, VERSION_TABLE) for database in databases))
    revisions = {await current_revision(database.engine, VERSION_TABLE) for database in databases}
    assert len(revisions) == 1
    assert None not in revisions
    for database in databases:
        await database.close()


async def test_an_encrypted_column_takes_no_plain_text(tmp_path: Path) -> None:
    database = await open_database(tmp_path)
    ring = Keyring.generate()
    with pytest.raises(StatementError, match="Keyring"):
        async with database.session() as session:
            session.add(Row(id=1, secret="hunter2hunter2"))
    async with database.session() as session:
        session.add(Row(id=2, secret=seal_column(ring, Secret("hunter2"), "rows", "secret", 2)))
    async with database.session() as session:
        row = await session.get_one(Row, 2)
        assert row.secret is not None
        assert open_column(ring, row.secret, "rows", "secret", 2).reveal() == "hunter2"
        with pytest.raises(IntegrityError):
            open_column(ring, row.secret, "rows", "secret", 3)
    assert b"hunter2" not in (tmp_path / "d" / "x.db").read_bytes()
    await database.close()


async def test_times_come_back_aware_and_in_utc(tmp_path: Path) -> None:
    database = await open_database(tmp_path)
    moment = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=timezone(timedelta(hours=9)))
    async with database.session() as session:
        session.add(Row(id=1, at=moment))
    async with database.session() as session:
        at = (await session.get_one(Row, 1)).at
    assert at == moment
    assert at is not None
    assert at.tzinfo == UTC
    with pytest.raises(StatementError, match="naive"):
        async with database.session() as session:
            session.add(Row(id=2, at=datetime(2026, 1, 1)))
    await database.close()


async def test_a_server_that_is_down_is_an_error_of_the_tree() -> None:
    database = Database("postgresql://u:hunter2@127.0.0.1:1/x")
    with pytest.raises(ServiceUnavailable) as caught:
        await database.check()
    assert "hunter2" not in str(caught.value)
    await database.close()


@pytest.mark.parametrize("url", ["mysql://x", "nonsense", ""])
async def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        database_url(url)
