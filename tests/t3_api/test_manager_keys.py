"""Encryption at rest: keys rotate beside a server, an interrupted rotation goes on, migrations match the models."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import pytest
import pytest_asyncio
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, select, update

from manager_ext.main import MIGRATIONS
from manager_ext.models import VERSION_TABLE, Base, CredentialRow
from manager_ext.services import KeyFile
from manager_ext.services import keys as keys_module
from manager_ext.services.keys import rotate
from storage_proxy.core.crypto import Keyring
from storage_proxy.core.errors import ConfigError, InsecureFileMode, IntegrityError
from storage_proxy.core.secrets import Secret
from storage_proxy.db import Database, upgrade
from tests.fakes.fake_proxy import FakeProxy

from .manager_stack import Stack, running

pytestmark = pytest.mark.asyncio

KEY, SECRET = "AKIDEXAMPLE12345", "the-secret-of-the-bucket-owner-0123456789"


@pytest.fixture
def proxy() -> FakeProxy:
    fake = FakeProxy()
    fake.known_keys[KEY] = SECRET
    fake.buckets.add("datasets")
    return fake


@pytest_asyncio.fixture
async def stack(tmp_path: Path, proxy: FakeProxy, any_database_url: str):  # type: ignore[no-untyped-def]
    async with running(tmp_path, proxy, any_database_url) as running_stack:
        yield running_stack


async def store(stack: Stack, number: int) -> None:
    async with stack.client() as alice:
        for index in range(number):
            await alice.create_credential(f"{uuid.uuid4().hex[:8]}-{index}", KEY, Secret(SECRET))


async def values(stack: Stack) -> list[CredentialRow]:
    async with stack.db.session() as session:
        return list((await session.scalars(select(CredentialRow))).all())


async def test_rotation_beside_a_running_server(
    stack: Stack, proxy: FakeProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "BATCH", 2)
    await store(stack, 5)
    old = Keyring.load(stack.key_file)
    assert await rotate(stack.db, stack.key_file) == 5
    new = Keyring.load(stack.key_file)
    assert (new.primary != old.primary, set(new.keys)) == (True, {old.primary, new.primary})
    rows = await values(stack)
    assert all(new.is_current(row.keys) for row in rows)
    for row in rows:
        assert SECRET in KeyFile(stack.key_file).open_keys(row.id, row.keys).reveal()
    # The server goes on with the new file, for values old and new.
    async with stack.client() as alice:
        await alice.bind_folder("set", "minio", "datasets", credential_id=str(rows[0].id))
    await store(stack, 1)
    assert all(new.is_current(row.keys) for row in await values(stack))

    assert await rotate(stack.db, stack.key_file, prune=True) == 6
    last = Keyring.load(stack.key_file)
    assert set(last.keys) == {last.primary}
    async with stack.client() as alice:
        await alice.bind_folder("again", "minio", "datasets", credential_id=str(rows[1].id))


async def test_an_interrupted_rotation_goes_on_without_another_key(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "BATCH", 2)
    await store(stack, 5)
    count = 0

    def crash(self: KeyFile, row_id: object, secret: Secret) -> str:
        nonlocal count
        count += 1
        if count > 3:
            raise KeyboardInterrupt
        return original(self, row_id, secret)

    original = KeyFile.seal_keys
    monkeypatch.setattr(KeyFile, "seal_keys", crash)
    with pytest.raises(KeyboardInterrupt):
        await rotate(stack.db, stack.key_file)
    monkeypatch.setattr(KeyFile, "seal_keys", original)
    ring = Keyring.load(stack.key_file)
    assert len(ring.keys) == 2
    assert sum(ring.is_current(row.keys) for row in await values(stack)) == 2, "the first batch"
    for row in await values(stack):
        KeyFile(stack.key_file).open_keys(row.id, row.keys)
    assert await rotate(stack.db, stack.key_file) == 3
    assert Keyring.load(stack.key_file).primary == ring.primary


async def test_values_stored_during_a_rotation_are_never_lost(stack: Stack) -> None:
    stop = asyncio.Event()

    async def keep_storing() -> None:
        while not stop.is_set():
            await store(stack, 1)

    async with asyncio.TaskGroup() as group:
        group.create_task(keep_storing())
        for _ in range(4):
            await rotate(stack.db, stack.key_file, prune=True)
        stop.set()
    keys = KeyFile(stack.key_file)
    rows = await values(stack)
    assert rows
    for row in rows:
        assert SECRET in keys.open_keys(row.id, row.keys).reveal()


async def test_a_value_moved_to_another_row_does_not_open(stack: Stack) -> None:
    await store(stack, 2)
    one, other = await values(stack)
    async with stack.db.session() as session:
        await session.execute(update(CredentialRow).where(CredentialRow.id == one.id).values(keys=other.keys))
    moved = next(row for row in await values(stack) if row.id == one.id)
    with pytest.raises(IntegrityError):
        KeyFile(stack.key_file).open_keys(moved.id, moved.keys)


async def test_the_key_file_is_private_and_never_made_by_a_rotation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        KeyFile(tmp_path / "keys.json")
    KeyFile(tmp_path / "keys.json", create=True)
    (tmp_path / "keys.json").chmod(0o644)
    with pytest.raises(InsecureFileMode):
        KeyFile(tmp_path / "keys.json")


async def test_the_migrations_make_what_the_models_say(any_database_url: str) -> None:
    db = Database(any_database_url)
    try:
        await upgrade(db, MIGRATIONS, VERSION_TABLE)
        await upgrade(db, MIGRATIONS, VERSION_TABLE)

        def differences(connection: Connection) -> list[object]:
            options = {"version_table": VERSION_TABLE, "compare_type": False}
            return list(compare_metadata(MigrationContext.configure(connection, opts=options), Base.metadata))

        async with db.engine.connect() as connection:
            assert await connection.run_sync(differences) == []
    finally:
        await db.close()


async def test_every_column_says_what_it_is() -> None:
    for table in Base.metadata.sorted_tables:
        assert table.name.startswith("manager_")
        for column in table.columns:
            assert column.comment, f"{table.name}.{column.name}"
