"""Folders: made, bound, found, deleted; and their files, which the storage proxy keeps.

Making and deleting touch two systems. The row goes first, in a state that users do not see (`creating`, `deleting`)
with the id of the request that works on it; then the proxy is asked; then the row becomes `ready` or goes. What a crash
or a proxy that does not answer leaves behind is finished by the next request for that name, or by `sweep`.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Collection
from datetime import timedelta
from typing import Literal

from sqlalchemy import and_, delete, or_, select, update
from sqlalchemy.exc import IntegrityError as RowRefused
from sqlalchemy.ext.asyncio import AsyncSession

from storage_proxy.client.http import error_of_code
from storage_proxy.client.manager import (
    BindFolderRequest,
    CreateFolderRequest,
    DeleteFilesRequest,
    DownloadRequest,
    FilesQuery,
    Folder,
    FolderKind,
    FoldersPage,
    MkdirRequest,
    PageQuery,
    TransferTicket,
    UploadRequest,
    parse_endpoint,
)
from storage_proxy.client.proxy import LONG_SECONDS, BindingOptions, ListAnswer, UsageAnswer
from storage_proxy.core.errors import (
    AlreadyExists,
    Conflict,
    Forbidden,
    InternalError,
    InUse,
    InvalidRequest,
    MooringError,
    ReadOnly,
    S3Unavailable,
    ServiceUnavailable,
    VFolderNotFound,
)
from storage_proxy.core.logs import get_logger
from storage_proxy.core.wire import S3Credential
from storage_proxy.db import Database

from ..models import CredentialRow, FolderRow, FolderState, SessionMountRow
from ..models.base import now
from .caller import Caller
from .credentials import Credentials, parse_ref
from .paging import decode_cursor, encode_cursor
from .proxies import Proxies, StorageProxy

log = get_logger(__name__)

# Longer than any one call to a proxy: an attempt that is older has died.
ATTEMPT_LIFETIME = timedelta(seconds=2 * LONG_SECONDS)
UNDO_SECONDS = 15.0


class Folders:
    """Use cases about folders."""

    def __init__(
        self, db: Database, credentials: Credentials, proxies: Proxies, *, allowed_endpoints: Collection[str] = ()
    ) -> None:
        self._db = db
        self._credentials = credentials
        self._proxies = proxies
        self._allowed_endpoints = frozenset(allowed_endpoints)

    # --- making -------------------------------------------------------------------------------------------------------

    async def create(self, caller: Caller, request: CreateFolderRequest) -> Folder:
        """A managed folder. Raises `AlreadyExists`, and what the proxy raises."""
        proxy, volume = self._proxies.resolve(request.volume)
        row = FolderRow(
            quota_scope=caller.scope_for(request.quota_scope),
            name=request.name,
            kind=FolderKind.MANAGED,
            read_only=False,
        )
        return await self._make(caller, row, proxy, volume)

    async def bind(self, caller: Caller, request: BindFolderRequest) -> Folder:
        """A folder that is an existing bucket or a directory of one.

        The proxy looks whether the keys reach it; a wrong secret or a missing bucket is raised as the object store
        said it. Raises `Forbidden` for an endpoint that an operator has not allowed.
        """
        proxy, volume = self._proxies.resolve(request.volume)
        scope = caller.scope_for(request.quota_scope)
        own_keys: tuple[CredentialRow, S3Credential] | None = None
        if request.credential_id is not None:
            async with self._db.session() as session:
                stored = await self._credentials.find(session, caller, request.credential_id)
            credential = self._credentials.open(stored)
            if request.endpoint and request.endpoint != stored.endpoint:
                raise Forbidden(
                    f"Credential {stored.name!r} is for {stored.endpoint or 'the endpoint of the volume'}.",
                    hint="Leave the endpoint out, or store a credential for this one.",
                )
            endpoint, credential_id = stored.endpoint, stored.id
        else:
            keys = request.credential
            if keys is None:
                raise InvalidRequest("Give either credential_id or credential.")
            credential = S3Credential(access_key=keys.access_key, secret_key=keys.secret_key)
            stored = self._credentials.row(caller, scope, keys.access_key, name=None, endpoint=request.endpoint)
            own_keys = (stored, credential)
            endpoint, credential_id = request.endpoint, stored.id
        await self._check_endpoint(caller, proxy, volume, endpoint)
        row = FolderRow(
            quota_scope=scope,
            name=request.name,
            kind=FolderKind.BOUND,
            read_only=request.read_only,
            endpoint=endpoint,
            region=request.region,
            bucket=request.bucket,
            prefix=request.prefix,
            credential_id=credential_id,
            uid=request.uid,
            gid=request.gid,
            umask=request.umask,
        )
        binding = BindingOptions(
            bucket=request.bucket,
            prefix=request.prefix,
            read_only=request.read_only,
            credential=credential,
            endpoint=endpoint,
            region=request.region,
        )
        return await self._make(caller, row, proxy, volume, binding=binding, own_keys=own_keys)

    async def _check_endpoint(self, caller: Caller, proxy: StorageProxy, volume: str, endpoint: str | None) -> None:
        """Users do not choose which addresses the proxy and the agents connect to: only the volume's own, and those
        that an operator listed. An admin is an operator."""
        if endpoint is None or caller.is_admin or endpoint in self._allowed_endpoints:
            return
        infos = [info for info in await proxy.port.volumes() if info.name == volume]
        if not any(info.endpoint and parse_endpoint(info.endpoint) == endpoint for info in infos):
            raise Forbidden(
                f"The endpoint {endpoint} is not allowed here.",
                hint="Leave it out for the volume's own, or ask an operator to add it to [binding] allowed-endpoints.",
            )

    async def _make(
        self,
        caller: Caller,
        row: FolderRow,
        proxy: StorageProxy,
        volume: str,
        *,
        binding: BindingOptions | None = None,
        own_keys: tuple[CredentialRow, S3Credential] | None = None,
    ) -> Folder:
        await self._clear_leftover(row.quota_scope, row.name)
        attempt = uuid.uuid4()
        row.id, row.proxy, row.volume = uuid.uuid4(), proxy.name, volume
        row.state, row.attempt, row.attempt_until = FolderState.CREATING, attempt, now() + ATTEMPT_LIFETIME
        row.created_by = caller.subject
        try:
            async with self._db.session() as session:
                if own_keys is not None:
                    stored, keys = own_keys
                    await self._credentials.store(session, stored, keys.access_key, keys.secret_key)
                session.add(row)
        except RowRefused:
            raise _name_taken(row.name) from None
        try:
            await proxy.port.create_folder(volume, row.vfid, binding=binding)
            async with self._db.session() as session:
                made = await session.scalar(
                    update(FolderRow)
                    .where(FolderRow.id == row.id, FolderRow.attempt == attempt)
                    .values(state=FolderState.READY, attempt=None, attempt_until=None)
                    .returning(FolderRow.id)
                )
                if made is None:
                    raise Conflict(f"Folder {row.name!r} was taken over while it was being made.", hint="Try again.")
                folder = await session.get_one(FolderRow, row.id, populate_existing=True)
        except BaseException as err:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(UNDO_SECONDS):
                    await self._undo(row, attempt, proxy, known=_settled(err))
            raise
        log.info("folder made", folder_id=str(row.id), kind=row.kind.value, scope=row.quota_scope, volume=volume)
        return shown(folder)

    async def _undo(self, row: FolderRow, attempt: uuid.UUID, proxy: StorageProxy, *, known: bool) -> None:
        """After a failed attempt. If the proxy refused (`known`), nothing is there; else it may have made the folder,
        so it is asked to delete it; if it does not answer, the row stays for whoever comes next."""
        try:
            if not known:
                await proxy.port.delete_folder(row.volume, row.vfid)
            await self._forget(row.id, attempt)
        except MooringError as err:
            log.info("half-made folder left for later", folder_id=str(row.id), cause=err.message)
            with contextlib.suppress(MooringError):
                await self._release(row.id, attempt)

    async def _clear_leftover(self, scope: str, name: str) -> None:
        """Removes what an earlier attempt for the same name left. Raises `AlreadyExists` if there is a folder, and
        `Conflict` while another request works on it."""
        async with self._db.session() as session:
            row = await session.scalar(
                select(FolderRow).where(FolderRow.quota_scope == scope, FolderRow.name == name).with_for_update()
            )
            if row is None:
                return
            if row.state is FolderState.READY:
                raise _name_taken(name)
            attempt = _take_over(row)
        await self._finish_removal(row, attempt)

    # --- finding ------------------------------------------------------------------------------------------------------

    async def find(
        self,
        session: AsyncSession,
        caller: Caller,
        ref: str,
        *,
        states: Collection[FolderState] = (FolderState.READY,),
        lock: Literal["hold", "change"] | None = None,
    ) -> FolderRow:
        """By id or name among what the caller may see. Another's folder is not found, so that names do not leak.

        With `lock` the row stays as it is until the transaction ends: "hold" for many at a time, "change" for one.

        Raises `VFolderNotFound`; `Conflict` if the name stands in several scopes; `InvalidIdentifier`.
        """
        wanted = parse_ref(ref)
        statement = select(FolderRow).where(
            caller.sees(FolderRow.quota_scope),
            FolderRow.state.in_(states),
            FolderRow.id == wanted if isinstance(wanted, uuid.UUID) else FolderRow.name == wanted,
        )
        if lock is not None:
            statement = statement.with_for_update(read=lock == "hold")
        rows = (await session.scalars(statement.order_by(FolderRow.id).limit(2))).all()
        if not rows:
            raise VFolderNotFound(f"There is no folder {ref!r}.", hint="Ask for the list of your folders.")
        if len(rows) > 1:
            raise Conflict(
                f"Several folders are named {ref!r}.",
                hint="Give the id of the one that you mean.",
                detail={"ids": [str(row.id) for row in rows]},
            )
        return rows[0]

    async def _found(self, caller: Caller, ref: str, *, write: bool = False) -> tuple[FolderRow, StorageProxy]:
        async with self._db.session() as session:
            row = await self.find(session, caller, ref)
        if write and row.read_only:
            raise ReadOnly(f"Folder {row.name!r} was bound read-only.", hint="Bind the bucket again to write to it.")
        return row, self._proxies.get(row.proxy)

    async def get(self, caller: Caller, ref: str) -> Folder:
        async with self._db.session() as session:
            return shown(await self.find(session, caller, ref))

    async def page(self, caller: Caller, query: PageQuery) -> FoldersPage:
        """Sorted by name, then id."""
        statement = (
            select(FolderRow)
            .where(caller.sees(FolderRow.quota_scope), FolderRow.state == FolderState.READY)
            .order_by(FolderRow.name, FolderRow.id)
            .limit(query.limit + 1)
        )
        if query.cursor:
            name, last = decode_cursor(query.cursor, 2)
            after = parse_ref(last)
            if not isinstance(after, uuid.UUID):
                raise InvalidRequest("The cursor is not one that this service gave.", detail={"cursor": "not valid"})
            statement = statement.where(or_(FolderRow.name > name, and_(FolderRow.name == name, FolderRow.id > after)))
        async with self._db.session() as session:
            rows = (await session.scalars(statement)).all()
        items = [shown(row) for row in rows[: query.limit]]
        more = len(rows) > query.limit
        return FoldersPage(items=items, next_cursor=encode_cursor([items[-1].name, items[-1].id]) if more else None)

    # --- deleting -----------------------------------------------------------------------------------------------------

    async def delete(self, caller: Caller, ref: str) -> None:
        """Deletes a managed folder with its files; forgets a bound one and leaves its bucket alone.

        Raises `InUse` naming the sessions that hold it. After any other error the folder is no longer shown and the
        deletion goes on later (`sweep`), or at once when the call is repeated.
        """
        async with self._db.session() as session:
            row = await self.find(session, caller, ref, states=(FolderState.READY, FolderState.DELETING), lock="change")
            held = (
                await session.scalars(
                    select(SessionMountRow.session_id)
                    .where(SessionMountRow.folder_id == row.id)
                    .order_by(SessionMountRow.session_id)
                    .limit(20)
                )
            ).all()
            if held:
                raise InUse(
                    f"Folder {row.name!r} is mounted by {len(held)} session(s): {', '.join(held)}.",
                    hint="End them first.",
                    detail={"sessions": list(held)},
                )
            if row.state is FolderState.DELETING:
                attempt = _take_over(row)
            else:
                attempt = row.attempt = uuid.uuid4()
                row.state, row.attempt_until = FolderState.DELETING, now() + ATTEMPT_LIFETIME
        await self._finish_removal(row, attempt)
        log.info("folder deleted", folder_id=str(row.id), kind=row.kind.value, scope=row.quota_scope)

    async def _finish_removal(self, row: FolderRow, attempt: uuid.UUID) -> None:
        """Deletes the folder at the proxy, then the row; on failure lets go of the row, so that another may go on."""
        try:
            with contextlib.suppress(VFolderNotFound):
                await self._proxies.get(row.proxy).port.delete_folder(row.volume, row.vfid)
            await self._forget(row.id, attempt)
        except BaseException:
            with contextlib.suppress(TimeoutError, MooringError):  # an attempt that is not released ends by its time
                async with asyncio.timeout(UNDO_SECONDS):
                    await self._release(row.id, attempt)
            raise

    async def _forget(self, folder_id: uuid.UUID, attempt: uuid.UUID) -> None:
        """Removes the row, and the keys that only it used."""
        async with self._db.session() as session:
            row = await session.get(FolderRow, folder_id, with_for_update=True)
            if row is None or row.attempt != attempt:
                return
            await session.execute(delete(FolderRow).where(FolderRow.id == folder_id))
            if row.credential_id is not None:
                await session.execute(
                    delete(CredentialRow).where(CredentialRow.id == row.credential_id, CredentialRow.name.is_(None))
                )

    async def _release(self, folder_id: uuid.UUID, attempt: uuid.UUID) -> None:
        async with self._db.session() as session:
            await session.execute(
                update(FolderRow)
                .where(FolderRow.id == folder_id, FolderRow.attempt == attempt)
                .values(attempt=None, attempt_until=None)
            )

    async def sweep(self) -> int:
        """Finishes removals that nobody works on; returns how many. Raises nothing that a later sweep could settle."""
        async with self._db.session() as session:
            rows = (
                await session.scalars(
                    select(FolderRow)
                    .where(
                        FolderRow.state != FolderState.READY,
                        or_(FolderRow.attempt.is_(None), FolderRow.attempt_until < now()),
                    )
                    .limit(100)
                    .with_for_update(skip_locked=True)
                )
            ).all()
            work = [(row, _take_over(row)) for row in rows]
        done = 0
        for row, attempt in work:
            try:
                await self._finish_removal(row, attempt)
                done += 1
            except MooringError as err:
                log.info("folder removal waits", folder_id=str(row.id), cause=err.message)
        return done

    # --- files --------------------------------------------------------------------------------------------------------

    async def files(self, caller: Caller, ref: str, query: FilesQuery) -> ListAnswer:
        row, proxy = await self._found(caller, ref)
        return await proxy.port.list_files(row.volume, row.vfid, query.path, cursor=query.cursor, limit=query.limit)

    async def mkdir(self, caller: Caller, ref: str, request: MkdirRequest) -> None:
        row, proxy = await self._found(caller, ref, write=True)
        answer = await proxy.port.mkdir(
            row.volume, row.vfid, [request.path], parents=request.parents, exist_ok=request.exist_ok
        )
        for failed in answer.results.failed:
            raise error_of_code(failed.error_code, failed.msg or f"Directory {failed.item!r} was not made.")

    async def delete_files(self, caller: Caller, ref: str, request: DeleteFilesRequest) -> None:
        row, proxy = await self._found(caller, ref, write=True)
        await proxy.port.delete_files(row.volume, row.vfid, request.paths, recursive=request.recursive)

    async def usage(self, caller: Caller, ref: str) -> UsageAnswer:
        row, proxy = await self._found(caller, ref)
        return await proxy.port.usage(row.volume, row.vfid)

    async def request_upload(self, caller: Caller, ref: str, request: UploadRequest) -> TransferTicket:
        row, proxy = await self._found(caller, ref, write=True)
        answer = await proxy.port.request_upload(row.volume, row.vfid, request.path, request.size)
        return TransferTicket(token=answer.token, url=f"{proxy.client_url}/upload")

    async def request_download(self, caller: Caller, ref: str, request: DownloadRequest) -> TransferTicket:
        row, proxy = await self._found(caller, ref)
        answer = await proxy.port.request_download(row.volume, row.vfid, request.path)
        return TransferTicket(token=answer.token, url=f"{proxy.client_url}/download")


def _take_over(row: FolderRow) -> uuid.UUID:
    """Marks a locked row as ours. Raises `Conflict` while another request still works on it."""
    if row.attempt is not None and (row.attempt_until is None or row.attempt_until > now()):
        raise Conflict(
            f"Folder {row.name!r} is being {'made' if row.state is FolderState.CREATING else 'deleted'} right now.",
            hint="Try again in a moment.",
        )
    row.attempt, row.attempt_until = uuid.uuid4(), now() + ATTEMPT_LIFETIME
    return row.attempt


def _settled(error: BaseException) -> bool:
    """True if the proxy said no: then it made nothing. False if it may have made the folder without our knowing."""
    unknown = (ServiceUnavailable, S3Unavailable, InternalError, Conflict)
    return isinstance(error, MooringError) and not isinstance(error, unknown)


def _name_taken(name: str) -> AlreadyExists:
    return AlreadyExists(
        f"A folder named {name!r} exists already in this scope.", hint="Choose another name, or delete it first."
    )


def shown(row: FolderRow) -> Folder:
    """What its users may see of a folder."""
    bound = row.kind is FolderKind.BOUND
    return Folder(
        id=str(row.id),
        name=row.name,
        volume=row.volume,
        proxy=row.proxy,
        vfid=row.vfid,
        kind=row.kind,
        quota_scope=row.quota_scope,
        read_only=row.read_only,
        bucket=row.bucket if bound else None,
        prefix=row.prefix if bound else None,
        endpoint=row.endpoint if bound else None,
        credential_id=str(row.credential_id) if row.credential_id else None,
        created_at=row.created_at,
    )
