"""`MountCredentials`: S3 keys for the mounts of managed folders, limited to the folder and sealed to one agent.

Sessions of one agent that use a folder in the same way share one key, and with it one mount. Each session is a row of
its own; when the last one goes, the key is revoked at the server. Order of writing: the row, then the key, then the row
again, so whatever a crash leaves is found and cleaned by `sweep` (at start and now and then).

A credential keeps its id for as long as sessions use it, because the agent tells mounts apart by it; its key ends with
its lifetime. `renew` puts a new key under the same id. The former key becomes a row of its own (`retired`) that ends at
the time it was made for: until then the mount that began with it serves the files that are open on it.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from weakref import WeakValueDictionary

from sqlalchemy import delete, func, select, update

from ..core.crypto import Keyring, seal
from ..core.errors import (
    Conflict,
    InvalidRequest,
    MooringError,
    RecordNotFound,
    S3AccessDenied,
    S3BadCredential,
    Unsupported,
)
from ..core.ids import AccessMode, VFolderID, parse_session_id
from ..core.logs import get_logger
from ..core.wire import Location, S3Credential
from ..db import Database
from ..db.types import open_column, seal_column
from ..s3 import S3Client
from ..s3.scoped import ScopedIssuer
from ..state import CredentialState, CredentialUse, MountCredential
from .interface import Folder
from .minio import MinioVolume
from .registry import VolumeRegistry

log = get_logger(__name__)

TABLE = MountCredential.__tablename__
# A key is neither handed to another session nor kept by a renewal when it has less than this part of its life left.
REUSE_UNTIL = 0.5
# An `issuing` row this old belongs to a process that died.
ISSUE_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class IssuedCredential:
    """What the manager passes on. `sealed` opens with the agent's key and `credential_id` as context; `revoke_ref`
    stands for this session's share in the key. `expires_at` is None for a key that does not end (`parent`)."""

    location: Location
    read_only: bool
    credential_id: str
    revoke_ref: str
    method: str
    expires_at: datetime | None
    sealed: str


class MountCredentials:
    """One per process; several processes may share the database."""

    def __init__(self, volumes: VolumeRegistry, database: Database, keyring: Keyring, *, lifetime: timedelta) -> None:
        self._volumes = volumes
        self._database = database
        self._keyring = keyring
        self._lifetime = lifetime
        self._issuers: dict[str, ScopedIssuer] = {}
        self._locks: WeakValueDictionary[tuple[str, ...], asyncio.Lock] = WeakValueDictionary()

    async def close(self) -> None:
        while self._issuers:
            await self._issuers.popitem()[1].close()

    def _issuer(self, volume: MinioVolume) -> ScopedIssuer:
        issuer = self._issuers.get(volume.name)
        if issuer is None:
            issuer = self._issuers[volume.name] = ScopedIssuer(volume.endpoint, volume.credential)
        return issuer

    # --- issue --------------------------------------------------------------------------------------------------------

    async def issue(
        self, volume: MinioVolume, vfid: VFolderID, mode: AccessMode, *, recipient_key: str, session_id: str
    ) -> IssuedCredential:
        """A key for this session: one that the agent holds already, or a new one. The same call again gives the same.

        Raises `Unsupported` for a bound folder (whoever bound it has its credential), and when the server cannot limit
        keys and the volume does not allow its own. Raises `UsageError` for a key that nothing can be sealed to.
        """
        folder = await self._managed(volume, vfid)
        place = (str(volume.name), str(vfid), mode.value, recipient_key)
        lock = self._locks.setdefault(place, asyncio.Lock())
        async with lock:  # two sessions that start together must end up with one key
            row = await self._join(place, session_id)
            if row is not None:
                return self._sealed(row, self._open(row), folder, session_id)
            return await self._new(uuid.uuid4().hex, volume, folder, mode, recipient_key, session_id)

    @staticmethod
    async def _managed(volume: MinioVolume, vfid: VFolderID) -> Folder:
        folder = await volume.folder(vfid)
        if not folder.managed:
            raise Unsupported(
                "A bound folder is mounted with the credential that it was bound with.",
                hint="Seal that credential to the agent; the proxy hands out keys for managed folders only.",
            )
        return folder

    async def _join(self, place: tuple[str, ...], session_id: str) -> MountCredential | None:
        """Adds the session to a live key of the same place, if there is one young enough."""
        volume, vfid, mode, recipient = place
        fresh = datetime.now(UTC) + self._lifetime * (1 - REUSE_UNTIL)
        async with self._database.session() as session:
            query = select(MountCredential).where(
                MountCredential.volume == volume,
                MountCredential.vfid == vfid,
                MountCredential.mode == mode,
                MountCredential.recipient_key == recipient,
                MountCredential.state == CredentialState.LIVE,
                MountCredential.expires_at > fresh,
            )
            oldest = query.order_by(MountCredential.created_at).limit(1).with_for_update()
            row = (await session.execute(oldest)).scalar()
            if row is not None and await session.get(CredentialUse, (row.id, session_id)) is None:
                session.add(CredentialUse(credential_id=row.id, session_id=session_id, created_at=datetime.now(UTC)))
            return row

    async def _new(
        self,
        credential_id: str,
        volume: MinioVolume,
        folder: Folder,
        mode: AccessMode,
        recipient_key: str,
        session_id: str,
    ) -> IssuedCredential:
        row, key = await self._make(credential_id, volume, folder, mode, recipient_key)
        row.state = CredentialState.LIVE
        async with self._database.session() as session:
            await session.merge(row)
            await session.flush()
            session.add(CredentialUse(credential_id=row.id, session_id=session_id, created_at=row.created_at))
        log.info("mount credential issued", credential_id=row.id, vfid=row.vfid, mode=row.mode, method=row.method)
        return self._sealed(row, key, folder, session_id)

    async def _make(
        self, credential_id: str, volume: MinioVolume, folder: Folder, mode: AccessMode, recipient_key: str
    ) -> tuple[MountCredential, S3Credential]:
        """A new key at the server and its row, which is stored in state issuing only: the caller stores it again."""
        now = datetime.now(UTC)
        row = MountCredential(
            id=credential_id,
            volume=volume.name,
            vfid=str(folder.vfid),
            mode=mode.value,
            recipient_key=recipient_key,
            state=CredentialState.ISSUING,
            attempts=0,
            created_at=now,
            expires_at=now + self._lifetime,
        )
        seal(volume.credential.secret_key, recipient_key, row.id)  # a bad key is refused before anything is made
        async with self._database.session() as session:
            session.add(row)
        try:
            scoped = await self._issuer(volume).issue(
                folder.ref, mode, self._lifetime, row.id, allow_parent=volume.section.allow_parent_credential
            )
        except BaseException:
            await self._forget(row.id)  # the issuer leaves nothing behind when it fails
            raise
        key = scoped.credential
        row.method, row.revoke_ref = scoped.method, scoped.revoke_ref
        if key.expires_at is not None:
            row.expires_at = min(row.expires_at, key.expires_at)
        self._keep(row, key)
        return row, key

    def _keep(self, row: MountCredential, key: S3Credential) -> None:
        """Encrypts a key into its row."""
        token = key.session_token
        row.access_key = key.access_key
        row.secret_key = seal_column(self._keyring, key.secret_key, TABLE, "secret_key", row.id)
        row.session_token = seal_column(self._keyring, token, TABLE, "session_token", row.id) if token else None

    def _open(self, row: MountCredential) -> S3Credential:
        token = row.session_token
        return S3Credential(
            access_key=row.access_key or "",
            secret_key=open_column(self._keyring, row.secret_key or "", TABLE, "secret_key", row.id),
            session_token=open_column(self._keyring, token, TABLE, "session_token", row.id) if token else None,
        )

    def _sealed(self, row: MountCredential, key: S3Credential, folder: Folder, session_id: str) -> IssuedCredential:
        # `sweep` revokes a key at its time, also one that the server itself would let live; only the volume's own
        # key does not end.
        expires_at = None if row.method == "parent" else row.expires_at
        return IssuedCredential(
            folder.location,
            AccessMode(row.mode) is AccessMode.READ_ONLY,
            row.id,
            f"{row.id}/{session_id}",
            row.method or "",
            expires_at,
            seal(key.model_copy(update={"expires_at": expires_at}).to_sealable(), row.recipient_key, row.id),
        )

    # --- renew --------------------------------------------------------------------------------------------------------

    async def renew(
        self,
        volume: MinioVolume,
        vfid: VFolderID,
        mode: AccessMode,
        *,
        recipient_key: str,
        session_id: str,
        credential_id: str,
    ) -> IssuedCredential:
        """The credential `credential_id` with a key that has at least half of its life before it: the one it has if the
        server takes it, or a new one. Also when the credential has ended; its id was given to this session.

        Repeating the call makes no further key. Raises `RecordNotFound` if the id belongs to another folder, mode or
        agent, `Conflict` while it is being made or revoked, and what the server raises; then the former key stays.
        """
        folder = await self._managed(volume, vfid)
        place = (str(volume.name), str(vfid), mode.value, recipient_key)
        lock = self._locks.setdefault(place, asyncio.Lock())
        async with lock:
            row = await self._held(credential_id, place, session_id)
            if row is None:
                return await self._new(credential_id, volume, folder, mode, recipient_key, session_id)
            if _is_young(row) and await self._works(row, volume, folder):
                return self._sealed(row, self._open(row), folder, session_id)
            row = await self._replace_key(row, volume, folder, mode)
            return self._sealed(row, self._open(row), folder, session_id)

    async def _works(self, row: MountCredential, volume: MinioVolume, folder: Folder) -> bool:
        """False if the server refuses the key, because somebody else removed it. Raises if it does not answer."""
        async with S3Client(volume.endpoint, self._open(row)) as holder:
            try:
                await holder.list_page(folder.ref.bucket, folder.ref.prefix, max_keys=1)
            except (S3BadCredential, S3AccessDenied):
                return False
        return True

    async def _held(self, credential_id: str, place: tuple[str, ...], session_id: str) -> MountCredential | None:
        """The living credential of that id with the session among its users, None if there is none of that id."""
        async with self._database.session() as session:
            row = await session.get(MountCredential, credential_id, with_for_update=True)
            if row is None:
                return None
            if (row.volume, row.vfid, row.mode, row.recipient_key) != place or row.former_of is not None:
                raise RecordNotFound(f"This folder has no credential {credential_id!r}.", hint="Plan the session anew.")
            if row.state != CredentialState.LIVE:
                raise Conflict(f"Credential {credential_id} is {row.state} at this moment.", hint="Try again.")
            if await session.get(CredentialUse, (row.id, session_id)) is None:
                session.add(CredentialUse(credential_id=row.id, session_id=session_id, created_at=datetime.now(UTC)))
            return row

    async def _replace_key(
        self, row: MountCredential, volume: MinioVolume, folder: Folder, mode: AccessMode
    ) -> MountCredential:
        """Makes a key in a row of its own, then lets the two rows change places: that is one transaction, so a crash
        leaves either the old key in use and the new one to be swept, or the new one in use and the old one retired."""
        spare, key = await self._make(uuid.uuid4().hex, volume, folder, mode, row.recipient_key)
        async with self._database.session() as session:
            current = await session.get(MountCredential, row.id, with_for_update=True)
            if current is None or current.state != CredentialState.LIVE or current.access_key != row.access_key:
                spare.state = CredentialState.REVOKING  # the credential was revoked, or renewed by another process
            else:
                spare.state, spare.former_of = CredentialState.RETIRED, current.id
                for name in ("method", "revoke_ref", "access_key", "created_at", "expires_at"):
                    old, new = getattr(current, name), getattr(spare, name)
                    setattr(current, name, new)
                    setattr(spare, name, old)
                self._keep(current, key)
                spare.secret_key = spare.session_token = None  # nobody mounts with it again
            await session.merge(spare)
        if spare.state == CredentialState.REVOKING:
            await self._revoke(spare)
        else:
            log.info("mount credential renewed", credential_id=row.id, vfid=row.vfid, mode=row.mode)
        if current is None or current.state != CredentialState.LIVE or not _is_young(current):
            raise Conflict(f"Credential {row.id} was revoked while it was renewed.", hint="Try again.")
        return current

    # --- revoke -------------------------------------------------------------------------------------------------------

    async def release(self, volume: MinioVolume, revoke_ref: str) -> None:
        """Ends a session's share; the last one revokes the key. Idempotent. A server that does not answer raises, and
        the key is revoked later."""
        credential_id, sep, session_id = revoke_ref.partition("/")
        if not sep or len(credential_id) != 32:
            raise InvalidRequest("The revoke_ref is not one of ours.", detail={"revoke_ref": "invalid"})
        parse_session_id(session_id)
        async with self._database.session() as session:
            # The row is locked first, so nobody joins between the count and the change of state.
            row = await session.get(MountCredential, credential_id, with_for_update=True)
            if row is None or row.volume != volume.name:
                return
            await session.execute(
                delete(CredentialUse).where(
                    CredentialUse.credential_id == credential_id, CredentialUse.session_id == session_id
                )
            )
            count = select(func.count()).select_from(CredentialUse).where(CredentialUse.credential_id == credential_id)
            if (await session.execute(count)).scalar_one():
                return
            row.state = CredentialState.REVOKING
            formers = (
                (await session.execute(select(MountCredential).where(MountCredential.former_of == credential_id)))
                .scalars()
                .all()
            )
            for former in formers:
                former.state = CredentialState.REVOKING
        for ended in (row, *formers):
            await self._revoke(ended)

    async def revoke_folder(self, volume: MinioVolume, vfid: VFolderID) -> None:
        """Revokes every key of a folder that goes away, whoever uses it."""
        async with self._database.session() as session:
            here = (MountCredential.volume == volume.name, MountCredential.vfid == str(vfid))
            live = MountCredential.state.in_((CredentialState.LIVE, CredentialState.RETIRED))
            await session.execute(update(MountCredential).where(*here, live).values(state=CredentialState.REVOKING))
            query = select(MountCredential).where(*here, MountCredential.state == CredentialState.REVOKING)
            rows = (await session.execute(query)).scalars().all()
        for row in rows:
            await self._revoke(row)

    async def sweep(self) -> int:
        """Revokes what has expired, what could not be revoked before, and what a dead process was making; returns how
        many rows went."""
        now = datetime.now(UTC)
        async with self._database.session() as session:
            await session.execute(
                update(MountCredential)
                .where(
                    MountCredential.state.in_((CredentialState.LIVE, CredentialState.RETIRED)),
                    MountCredential.expires_at < now,
                )
                .values(state=CredentialState.REVOKING)
            )
            rows = (
                (
                    await session.execute(
                        select(MountCredential).where(
                            (MountCredential.state == CredentialState.REVOKING)
                            | (
                                (MountCredential.state == CredentialState.ISSUING)
                                & (MountCredential.created_at < now - timedelta(seconds=ISSUE_SECONDS))
                            )
                        )
                    )
                )
                .scalars()
                .all()
            )
        gone = 0
        for row in rows:
            try:
                await self._revoke(row)
                gone += 1
            except MooringError as err:
                log.warning("a mount credential is not revoked yet", credential_id=row.id, error=str(err))
        return gone

    async def _revoke(self, row: MountCredential) -> None:
        try:
            issuer = self._issuer(self._volumes.get(row.volume))
            refs = [row.revoke_ref] if row.revoke_ref else []
            if row.state == CredentialState.ISSUING:  # the user may exist; its name begins with ours
                refs = [ref for ref in await issuer.identities() if ref.startswith(f"iam:mooring-{row.id}-")]
            for ref in refs:
                await issuer.revoke(ref)
        except MooringError:
            async with self._database.session() as session:
                more = MountCredential.attempts + 1
                await session.execute(update(MountCredential).where(MountCredential.id == row.id).values(attempts=more))
            raise
        await self._forget(row.id)
        log.info("mount credential revoked", credential_id=row.id, vfid=row.vfid)

    async def _forget(self, credential_id: str) -> None:
        async with self._database.session() as session:
            await session.execute(delete(CredentialUse).where(CredentialUse.credential_id == credential_id))
            await session.execute(delete(MountCredential).where(MountCredential.id == credential_id))


def _is_young(row: MountCredential) -> bool:
    return row.expires_at - datetime.now(UTC) > (row.expires_at - row.created_at) * REUSE_UNTIL
