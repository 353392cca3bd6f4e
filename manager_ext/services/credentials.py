"""Stored keys for object stores: taken in, encrypted, handed to use cases, never shown again."""

from __future__ import annotations

import uuid

from sqlalchemy import and_, or_, select
from sqlalchemy.exc import IntegrityError as RowRefused
from sqlalchemy.ext.asyncio import AsyncSession

from storage_proxy.client.manager import (
    CreateCredentialRequest,
    Credential,
    CredentialsPage,
    PageQuery,
    is_uuid,
    parse_folder_name,
)
from storage_proxy.core.errors import AlreadyExists, Conflict, InUse, InvalidRequest, RecordNotFound
from storage_proxy.core.logs import get_logger
from storage_proxy.core.secrets import Secret
from storage_proxy.core.wire import S3Credential
from storage_proxy.db import Database

from ..models import CredentialRow, FolderRow
from .caller import Caller
from .keys import KeyFile
from .paging import decode_cursor, encode_cursor

log = get_logger(__name__)


def parse_ref(ref: str) -> uuid.UUID | str:
    """An id (UUID, with or without dashes) or a name. Raises `InvalidIdentifier`."""
    return uuid.UUID(ref.replace("-", "")) if is_uuid(ref) else parse_folder_name(ref)


class Credentials:
    """Use cases about credentials."""

    def __init__(self, db: Database, keys: KeyFile) -> None:
        self._db = db
        self._keys = keys

    async def create(self, caller: Caller, request: CreateCredentialRequest) -> Credential:
        """Raises `AlreadyExists` for a name that is taken in the scope."""
        scope = caller.scope_for(request.quota_scope)
        row = self.row(caller, scope, request.access_key, name=request.name, endpoint=request.endpoint)
        try:
            async with self._db.session() as session:
                await self.store(session, row, request.access_key, request.secret_key)
        except RowRefused:
            raise AlreadyExists(
                f"A credential named {request.name!r} exists already.", hint="Choose another name, or delete it first."
            ) from None
        log.info("credential stored", credential_id=str(row.id), scope=scope)
        return _shown(row)

    def row(
        self, caller: Caller, scope: str, access_key: str, *, name: str | None, endpoint: str | None
    ) -> CredentialRow:
        """A new row without its keys; `store` puts them in."""
        return CredentialRow(
            id=uuid.uuid4(),
            quota_scope=scope,
            name=name,
            endpoint=endpoint,
            # Of a short key four characters would be too much of it.
            access_key_hint=f"...{access_key[-4:]}" if len(access_key) >= 12 else "...",
            created_by=caller.subject,
        )

    async def store(self, session: AsyncSession, row: CredentialRow, access_key: str, secret_key: Secret) -> None:
        """Encrypts the keys into `row` and adds it.

        After the row is locked in the database the key file is looked at once more: a rotation that ended in between
        may have dropped the key that was used (see `keys.rotate`).
        """
        secret = S3Credential(access_key=access_key, secret_key=secret_key).to_sealable()
        row.keys = self._keys.seal_keys(row.id, secret)
        session.add(row)
        await session.flush()
        if not self._keys.ring.is_current(row.keys):
            row.keys = self._keys.seal_keys(row.id, secret)
            await session.flush()

    def open(self, row: CredentialRow) -> S3Credential:
        return S3Credential.from_sealed(self._keys.open_keys(row.id, row.keys))

    async def page(self, caller: Caller, query: PageQuery) -> CredentialsPage:
        statement = (
            select(CredentialRow)
            .where(caller.sees(CredentialRow.quota_scope), CredentialRow.name.is_not(None))
            .order_by(CredentialRow.name, CredentialRow.id)
            .limit(query.limit + 1)
        )
        if query.cursor:
            name, last = decode_cursor(query.cursor, 2)
            after = _cursor_id(last)
            statement = statement.where(
                or_(CredentialRow.name > name, and_(CredentialRow.name == name, CredentialRow.id > after))
            )
        async with self._db.session() as session:
            rows = (await session.scalars(statement)).all()
        items = [_shown(row) for row in rows[: query.limit]]
        more = len(rows) > query.limit
        return CredentialsPage(items=items, next_cursor=encode_cursor([items[-1].name, items[-1].id]) if more else None)

    async def find(self, session: AsyncSession, caller: Caller, ref: str) -> CredentialRow:
        """By id or name among what the caller may see; raises `RecordNotFound`, `Conflict` for an ambiguous name."""
        wanted = parse_ref(ref)
        statement = select(CredentialRow).where(
            caller.sees(CredentialRow.quota_scope),
            CredentialRow.name.is_not(None),
            CredentialRow.id == wanted if isinstance(wanted, uuid.UUID) else CredentialRow.name == wanted,
        )
        rows = (await session.scalars(statement.limit(2))).all()
        if not rows:
            raise RecordNotFound(f"There is no credential {ref!r}.", hint="Ask for the list of your credentials.")
        if len(rows) > 1:
            raise Conflict(f"Several credentials are named {ref!r}.", hint="Give the id of the one that you mean.")
        return rows[0]

    async def delete(self, caller: Caller, ref: str) -> None:
        """Raises `InUse` naming the folders that were bound with it."""
        try:
            async with self._db.session() as session:
                row = await self.find(session, caller, ref)
                bound = select(FolderRow.name).where(FolderRow.credential_id == row.id).order_by(FolderRow.name)
                names = (await session.scalars(bound.limit(20))).all()
                if names:
                    raise _in_use(ref, list(names))
                await session.delete(row)
        except RowRefused:  # a folder was bound with it in the same moment
            raise _in_use(ref, []) from None
        log.info("credential deleted", credential_id=str(row.id))


def _in_use(ref: str, names: list[str]) -> InUse:
    which = f": {', '.join(names)}" if names else ""
    return InUse(
        f"Credential {ref!r} opens folders that are bound with it{which}.",
        hint="Delete those folders first; their buckets stay as they are.",
        detail={"folders": names},
    )


def _cursor_id(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError:
        raise InvalidRequest("The cursor is not one that this service gave.", detail={"cursor": "not valid"}) from None


def _shown(row: CredentialRow) -> Credential:
    return Credential(
        id=str(row.id),
        name=row.name or "",
        quota_scope=row.quota_scope,
        endpoint=row.endpoint,
        access_key_hint=row.access_key_hint,
        created_at=row.created_at,
    )
