"""The encryption keys at work: a key file that may change while the server runs, and its rotation."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import ColumnElement, func, select, text, update

from storage_proxy.core.crypto import Keyring
from storage_proxy.core.secrets import Secret
from storage_proxy.db import Database
from storage_proxy.db.types import open_column, seal_column

from ..models import CredentialRow

BATCH = 100


class KeyFile:
    """The key ring of a file, read again whenever the file was replaced (`keys rotate` does that beside a server)."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        self._ring = Keyring.load_or_create(path) if create else Keyring.load(path)
        self._seen = self._stamp()

    def _stamp(self) -> tuple[int, int]:
        info = self.path.stat()
        return info.st_ino, info.st_mtime_ns

    @property
    def ring(self) -> Keyring:
        stamp = self._stamp()
        if stamp != self._seen:
            self._ring, self._seen = Keyring.load(self.path), stamp
        return self._ring

    def seal_keys(self, row_id: object, secret: Secret) -> str:
        return seal_column(self.ring, secret, CredentialRow.__tablename__, "keys", row_id)

    def open_keys(self, row_id: object, value: str) -> Secret:
        return open_column(self.ring, value, CredentialRow.__tablename__, "keys", row_id)


async def rotate(db: Database, path: Path, *, prune: bool = False) -> int:
    """Gives the key file a new primary key and encrypts every stored value again; returns how many.

    May be run beside a server, and again after it was interrupted: a rotation that left values behind is finished
    first, with no further key. The file gets the new key before any value uses it, each batch is one transaction, and
    old keys go (`prune`) only when no value needs them, so no moment exists at which a crash loses one.
    """
    keys = KeyFile(path)
    if not await _left(db, keys.ring):
        keys.ring.rotated().save(path)
    count = await _encrypt_again(db, keys)
    if prune:
        while not await _prune(db, keys):
            count += await _encrypt_again(db, keys)
    return count


def _stale(ring: Keyring) -> ColumnElement[bool]:
    # A key id is hexadecimal, so it holds no wildcard.
    return CredentialRow.keys.not_like(f"mk1.{ring.primary}.%")


async def _left(db: Database, ring: Keyring) -> int:
    async with db.session() as session:
        return await session.scalar(select(func.count()).select_from(CredentialRow).where(_stale(ring))) or 0


async def _encrypt_again(db: Database, keys: KeyFile) -> int:
    count = 0
    while True:
        async with db.session() as session:
            query = select(CredentialRow.id, CredentialRow.keys).where(_stale(keys.ring)).order_by(CredentialRow.id)
            rows = (await session.execute(query.limit(BATCH).with_for_update())).all()
            for row_id, old in rows:
                new = keys.seal_keys(row_id, keys.open_keys(row_id, old))
                await session.execute(
                    update(CredentialRow)
                    .where(CredentialRow.id == row_id)
                    .values(keys=new, updated_at=CredentialRow.updated_at)
                )
            count += len(rows)
        if len(rows) < BATCH:
            return count


async def _prune(db: Database, keys: KeyFile) -> bool:
    """Drops the old keys unless a value still needs one. While the lock is held nobody can add such a value; whoever
    waits for it looks at the key file again before it commits (`Credentials.store`)."""
    async with db.session() as session:
        if session.get_bind().dialect.name == "postgresql":  # on SQLite every transaction holds the one write lock
            await session.execute(text(f"LOCK TABLE {CredentialRow.__tablename__} IN SHARE MODE"))
        left = await session.scalar(select(func.count()).select_from(CredentialRow).where(_stale(keys.ring)))
        if left:
            return False
        keys.ring.pruned().save(keys.path)
        return True
