"""The plan of a session's mounts: all of them or none, each as a grant for one agent.

A session row stands from before the first credential is issued until the last one is revoked; its mount rows keep the
folders from being deleted. Order: rows (`planning`), credentials, grants, `active`; at the end `ending`, revocation,
rows gone. Whatever breaks in between ends in `ending` and is finished by a repeated DELETE or by `sweep`.

While it is `active`, a mount may get a fresh grant (`renew`): the same folder, place, mode, ownership and target, and a
credential of the same identity, since that is what the agent finds the mount by. The keys behind the identity are those
of the moment: of a managed folder a key with at least half of its life before it, of a bound one what is stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import and_, delete, or_, select, update
from sqlalchemy.exc import IntegrityError as RowRefused

from storage_proxy.client.manager import (
    CreateSessionRequest,
    FolderKind,
    PlannedMount,
    Session,
    SessionMount,
    SessionPlan,
    SessionState,
)
from storage_proxy.client.proxy import MountCredentialRequest
from storage_proxy.core.crypto import seal
from storage_proxy.core.errors import (
    AlreadyExists,
    Conflict,
    Forbidden,
    InternalError,
    InvalidRequest,
    MooringError,
    ReadOnly,
    RecordNotFound,
    VFolderNotFound,
)
from storage_proxy.core.ids import AccessMode
from storage_proxy.core.logs import get_logger
from storage_proxy.core.tokens import Purpose, TokenSigner
from storage_proxy.core.wire import Location, MountRequest, Ownership, S3Credential
from storage_proxy.db import Database

from ..models import CredentialRow, FolderRow, FolderState, SessionMountRow, SessionRow
from ..models.base import now
from .agents import Agents
from .caller import Caller, Role
from .credentials import Credentials, parse_ref
from .folders import Folders
from .proxies import Proxies
from .targets import check_targets

log = get_logger(__name__)

PARALLEL = 8
# What a whole node was given (see node_folders) has an owner that is no user, and an id that no user can take.
NODE_OWNER = "node"
NODE_SESSION_PREFIX = "node-wide-"
UNDO_SECONDS = 20.0
# A planning session of this age belongs to a process that died; longer than all calls of one plan take.
PLAN_LIFETIME = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class _Issued:
    """A credential for one mount, sealed to the agent."""

    location: Location
    credential_id: str
    sealed: str
    expires_at: datetime | None


class Sessions:
    """Use cases about sessions. `signer` makes the grants (audience `agent:<id>`), each good for `grant_lifetime`."""

    def __init__(
        self,
        db: Database,
        *,
        folders: Folders,
        credentials: Credentials,
        agents: Agents,
        proxies: Proxies,
        signer: TokenSigner,
        grant_lifetime: timedelta,
    ) -> None:
        self._db = db
        self._folders = folders
        self._credentials = credentials
        self._agents = agents
        self._proxies = proxies
        self._signer = signer
        self._grant_lifetime = grant_lifetime

    # --- planning -----------------------------------------------------------------------------------------------------

    async def create(self, caller: Caller, request: CreateSessionRequest) -> SessionPlan:
        """Plans every mount or none.

        Raises `VFolderNotFound`, `ReadOnly` (rw asked of a read-only folder), `InvalidRequest` (targets),
        `RecordNotFound` (agent), `AlreadyExists` (session id), and what the storage proxy raises.
        """
        if request.session_id is not None and request.session_id.startswith(NODE_SESSION_PREFIX):
            raise InvalidRequest(
                f"Session ids that begin with {NODE_SESSION_PREFIX!r} are reserved.",
                hint="Choose another session id.",
                detail={"session_id": "reserved"},
            )
        return await self._create(caller, caller.own_scope, request)

    async def create_for_node(self, request: CreateSessionRequest) -> SessionPlan:
        """As `create`, of any folder and for nobody's account; who may have that is decided by `NodeFolders`."""
        everything = Caller(subject=NODE_OWNER, role=Role.ADMIN)
        return await self._create(everything, NODE_OWNER, request)

    async def _create(self, caller: Caller, owner: str, request: CreateSessionRequest) -> SessionPlan:
        check_targets([asked.target for asked in request.mounts])
        public_key = await self._agents.public_key(request.agent_id)
        session_id = request.session_id or uuid.uuid4().hex
        folders = await self._reserve(caller, owner, request, session_id)
        by_target = {asked.target: folder for asked, folder in zip(request.mounts, folders, strict=True)}
        issuing = asyncio.ensure_future(self._issue_all(session_id, by_target, public_key))
        issuing.add_done_callback(lambda task: task.cancelled() or task.exception())  # looked at, even if nobody waits
        try:
            try:
                issued = await asyncio.shield(issuing)
            except asyncio.CancelledError:
                # The caller went away. Calls on their way may already have made identities: wait for their names.
                await asyncio.wait({issuing}, timeout=UNDO_SECONDS)
                raise
            plan = self._sign(request, session_id, by_target, issued, await self._activate(session_id))
        except BaseException as err:
            issuing.cancel()
            log.info("session not planned", session_id=session_id, cause=type(err).__name__)
            with contextlib.suppress(TimeoutError, MooringError):  # what is not revoked now, `sweep` revokes
                async with asyncio.timeout(UNDO_SECONDS):
                    await self._end(session_id)
            raise
        log.info("session planned", session_id=session_id, agent_id=request.agent_id, mounts=len(plan.mounts))
        return plan

    async def _reserve(
        self, caller: Caller, owner: str, request: CreateSessionRequest, session_id: str
    ) -> list[FolderRow]:
        """One transaction that finds and holds all folders; they are in the order of the request."""
        folders: list[FolderRow] = []
        try:
            async with self._db.session() as session:
                row = SessionRow(id=session_id, owner=owner, agent_id=request.agent_id, state=SessionState.PLANNING)
                session.add(row)
                await session.flush()
                for asked in request.mounts:
                    # Locked, so that no deletion starts between this look and the commit.
                    folder = await self._folders.find(session, caller, asked.folder, lock="hold")
                    mode = asked.mode or (AccessMode.READ_ONLY if folder.read_only else AccessMode.READ_WRITE)
                    if folder.read_only and mode is not AccessMode.READ_ONLY:
                        raise ReadOnly(
                            f"Folder {folder.name!r} was bound read-only and cannot be mounted for writing.",
                            hint="Ask for mode ro.",
                        )
                    if any(folder.id == other.id for other in folders):
                        raise InvalidRequest(
                            f"Folder {folder.name!r} is asked for twice.",
                            hint="Mount it once and use it at that place.",
                            detail={"mounts": f"{folder.name} twice"},
                        )
                    folders.append(folder)
                    session.add(
                        SessionMountRow(
                            session_id=session_id,
                            folder_id=folder.id,
                            folder_name=folder.name,
                            vfid=folder.vfid,
                            target=asked.target,
                            mode=mode,
                            uid=request.uid if folder.uid is None else folder.uid,
                            gid=request.gid if folder.gid is None else folder.gid,
                            umask=request.umask if folder.umask is None else folder.umask,
                            proxy=folder.proxy,
                            volume=folder.volume,
                        )
                    )
        except RowRefused:
            raise AlreadyExists(
                f"There is a session {session_id!r} already.", hint="End it first, or choose another session id."
            ) from None
        return folders

    async def _issue_all(self, session_id: str, by_target: dict[str, FolderRow], public_key: str) -> dict[str, _Issued]:
        """Credentials by target. Every call ends before an error is raised, so that nothing issued stays unknown."""
        limit = asyncio.Semaphore(PARALLEL)
        issued: dict[str, _Issued] = {}
        errors: list[MooringError] = []

        async def one(mount: SessionMountRow) -> None:
            async with limit:
                if errors:
                    return
                try:
                    issued[mount.target] = await self._issue(mount, by_target[mount.target], public_key)
                except MooringError as err:
                    errors.append(err)

        async with self._db.session() as session:
            mounts = (
                await session.scalars(select(SessionMountRow).where(SessionMountRow.session_id == session_id))
            ).all()
        async with asyncio.TaskGroup() as group:
            for mount in mounts:
                group.create_task(one(mount))
        if errors:
            raise errors[0]
        return issued

    async def _issue(self, mount: SessionMountRow, folder: FolderRow, public_key: str) -> _Issued:
        """A credential for a mount: its first, or that of the same identity again."""
        port = self._proxies.get(folder.proxy).port
        if folder.kind is FolderKind.BOUND:
            answer = await port.mount(folder.volume, folder.vfid)
            place = answer.location
            if place is None or (place.bucket, place.prefix) != (folder.bucket, folder.prefix):
                raise InternalError(
                    f"The storage proxy knows folder {folder.name!r} at another place than this service.",
                    hint="Delete the folder and bind it again.",
                )
            keys = await self._keys_of(folder)
            identity = str(folder.credential_id)
            issued = _Issued(place, identity, seal(keys.to_sealable(), public_key, identity), keys.expires_at)
            revoke_ref = None
        else:
            made = await port.issue_mount_credential(
                MountCredentialRequest(
                    volume=folder.volume,
                    vfid=folder.vfid,
                    mode=mount.mode,
                    recipient_key=public_key,
                    session_id=mount.session_id,
                    credential_id=mount.credential_id,
                )
            )
            issued = _Issued(made.location, made.credential_id, made.sealed_credential, made.expires_at)
            revoke_ref = made.revoke_ref
        renewal = mount.credential_id is not None
        async with self._db.session() as session:
            if renewal:
                # Under its lock: whoever ends the session after this looks at the credential as it is now.
                row = await session.get(SessionRow, mount.session_id, with_for_update=True)
                ended = row is None or row.state is not SessionState.ACTIVE
            else:
                ended = False
            stored = None
            if not ended:
                stored = await session.scalar(
                    update(SessionMountRow)
                    .where(SessionMountRow.id == mount.id)
                    .values(
                        credential_id=issued.credential_id,
                        revoke_ref=revoke_ref,
                        credential_expires_at=issued.expires_at,
                    )
                    .returning(SessionMountRow.id)
                )
        if stored is None:  # the session was ended meanwhile
            if revoke_ref is not None:
                await port.revoke_mount_credential(folder.volume, revoke_ref)
            raise _ended(mount.session_id, "its grant was renewed" if renewal else "it was being planned")
        return issued

    async def _keys_of(self, folder: FolderRow) -> S3Credential:
        async with self._db.session() as session:
            row = await session.get(CredentialRow, folder.credential_id)
        if row is None:
            raise VFolderNotFound(f"Folder {folder.name!r} has no credential any more.", hint="Bind it again.")
        return self._credentials.open(row)

    async def _activate(self, session_id: str) -> Sequence[SessionMountRow]:
        async with self._db.session() as session:
            row = await session.get(SessionRow, session_id, with_for_update=True)
            if row is None or row.state is not SessionState.PLANNING:
                raise _ended(session_id, "it was being planned")
            row.state = SessionState.ACTIVE
            for mount in row.mounts:
                mount.expires_at = now() + self._grant_lifetime
            return list(row.mounts)

    def _sign(
        self,
        request: CreateSessionRequest,
        session_id: str,
        by_target: dict[str, FolderRow],
        issued: dict[str, _Issued],
        mounts: Sequence[SessionMountRow],
    ) -> SessionPlan:
        rows = {mount.target: mount for mount in mounts}
        planned = [
            self._grant(request.agent_id, rows[asked.target], by_target[asked.target], issued[asked.target])
            for asked in request.mounts
        ]
        return SessionPlan(session_id=session_id, agent_id=request.agent_id, mounts=planned)

    def _grant(self, agent_id: str, mount: SessionMountRow, folder: FolderRow, credential: _Issued) -> PlannedMount:
        permitted = MountRequest(
            volume=folder.volume,
            vfid=folder.vfid,
            location=credential.location,
            mode=mount.mode,
            ownership=Ownership.model_validate({"uid": mount.uid, "gid": mount.gid, "umask": mount.umask}),
            target=mount.target,
            credential_id=credential.credential_id,
            sealed_credential=credential.sealed,
        )
        expires_at = datetime.now(UTC) + self._grant_lifetime
        grant = self._signer.issue(
            Purpose.GRANT,
            mount.session_id,
            self._grant_lifetime,
            {"mount": permitted.model_dump(mode="json")},
            audience=f"agent:{agent_id}",
        )
        return PlannedMount(**_shown_mount(mount).model_dump(), grant=grant, expires_at=expires_at)

    # --- fresh grants -------------------------------------------------------------------------------------------------

    async def renew(self, caller: Caller, session_id: str, ref: str) -> PlannedMount:
        """A fresh grant for one mount of an active session; see the module. Idempotent but for the grant itself.

        The agent of the session may ask, its owner, and an admin. What the plan permitted is looked at again: a folder
        that is being deleted, that became read-only, or that the owner's projects do not reach any more, is refused.

        Raises `RecordNotFound` for a session of somebody else or on another agent and for a folder that it does not
        have, `Conflict` when the session is not active or the folder was bound with another credential since,
        `ReadOnly`, `VFolderNotFound`, and what the storage proxy raises.
        """
        if caller.role is Role.AGENT:
            await self._check_agent(caller, session_id)
        row, mount, folder = await self._renewable(caller, session_id, ref)
        public_key = await self._agents.public_key(row.agent_id)
        issued = await self._issue(mount, folder, public_key)
        if issued.credential_id != mount.credential_id:
            raise InternalError(f"The storage proxy renewed another credential than that of {folder.name!r}.")
        async with self._db.session() as session:
            values = {"expires_at": now() + self._grant_lifetime}
            await session.execute(update(SessionMountRow).where(SessionMountRow.id == mount.id).values(**values))
        mount.credential_expires_at = issued.expires_at
        log.info(
            "grant renewed",
            session_id=session_id,
            folder_id=str(folder.id),
            agent_id=row.agent_id,
            caller=f"{caller.role} {caller.subject}",
            credential_id=issued.credential_id,
            credential_expires_at=issued.expires_at.isoformat() if issued.expires_at else None,
        )
        return self._grant(row.agent_id, mount, folder, issued)

    async def _renewable(
        self, caller: Caller, session_id: str, ref: str
    ) -> tuple[SessionRow, SessionMountRow, FolderRow]:
        wanted = parse_ref(ref)
        async with self._db.session() as session:
            row = await session.get(SessionRow, session_id)
            if row is None or not (caller.role is Role.AGENT or self._may(caller, row)):
                raise _no_session(session_id)
            found = [mount for mount in row.mounts if wanted in (mount.folder_id, mount.folder_name)]
            if not found:
                raise RecordNotFound(f"Session {session_id!r} has no folder {ref!r}.", hint="Look at the session.")
            if row.state is not SessionState.ACTIVE:
                raise Conflict(f"Session {session_id!r} is {row.state}.", hint="Only a session that runs is renewed.")
            mount = found[0]
            folder = await session.get(FolderRow, mount.folder_id)
            reached = caller.role is Role.AGENT or caller.is_admin or (folder and folder.quota_scope in caller.scopes())
            if folder is None or folder.state is not FolderState.READY or not reached:
                raise VFolderNotFound(f"There is no folder {ref!r} any more.", hint="End the session.")
        if folder.read_only and mount.mode is not AccessMode.READ_ONLY:
            raise ReadOnly(f"Folder {folder.name!r} has become read-only.", hint="End the session and plan it with ro.")
        if mount.uid is None or mount.credential_id is None:
            raise Conflict(
                f"Session {session_id!r} was planned by an earlier version, which kept too little to renew its grants.",
                hint="End it and plan it again.",
            )
        if folder.kind is FolderKind.BOUND and str(folder.credential_id) != mount.credential_id:
            # Another identity is another mount: see promise 8 of docs/SEMANTICS.md.
            raise Conflict(
                f"Folder {folder.name!r} was bound with another credential since the session was planned.",
                hint="End the session and plan it again.",
            )
        return row, mount, folder

    async def _check_agent(self, caller: Caller, session_id: str) -> None:
        """An agent gets grants for what runs on it; of other sessions it does not learn that they are there."""
        async with self._db.session() as session:
            agent_id = await session.scalar(select(SessionRow.agent_id).where(SessionRow.id == session_id))
        if agent_id is None:
            raise _no_session(session_id)
        try:
            await self._agents.check_own(caller, agent_id)
        except Forbidden:
            raise _no_session(session_id) from None

    # --- looking and ending -------------------------------------------------------------------------------------------

    async def get(self, caller: Caller, session_id: str) -> Session:
        """Raises `RecordNotFound`, also for a session of somebody else."""
        async with self._db.session() as session:
            row = await session.get(SessionRow, session_id)
            if row is None or not self._may(caller, row):
                raise _no_session(session_id)
            return Session(
                session_id=row.id,
                agent_id=row.agent_id,
                state=row.state,
                created_at=row.created_at,
                mounts=[_shown_mount(mount) for mount in row.mounts],
            )

    async def delete(self, caller: Caller, session_id: str) -> None:
        """Revokes what was issued for the session and forgets it. Idempotent: a session that is not there, or not the
        caller's, counts as ended and nothing happens. Raises what the proxy raises; repeat the call then."""
        async with self._db.session() as session:
            row = await session.get(SessionRow, session_id)
            if row is None or not self._may(caller, row):
                return
        await self._end(session_id)
        log.info("session ended", session_id=session_id)

    async def end_for_node(self, session_id: str) -> None:
        """As `delete`, for what `create_for_node` made."""
        await self._end(session_id)

    @staticmethod
    def _may(caller: Caller, row: SessionRow) -> bool:
        return caller.is_admin or row.owner == caller.own_scope

    async def _end(self, session_id: str) -> None:
        async with self._db.session() as session:
            row = await session.get(SessionRow, session_id, with_for_update=True)
            if row is None:
                return
            row.state = SessionState.ENDING
            mounts = list(row.mounts)
        problems: list[MooringError] = []
        for mount in mounts:
            if mount.revoke_ref is None:
                continue
            try:
                with contextlib.suppress(RecordNotFound, VFolderNotFound):  # nothing is left to revoke
                    await self._proxies.get(mount.proxy).port.revoke_mount_credential(mount.volume, mount.revoke_ref)
            except MooringError as err:
                problems.append(err)
                continue
            async with self._db.session() as session:
                await session.execute(
                    update(SessionMountRow).where(SessionMountRow.id == mount.id).values(revoke_ref=None)
                )
        if problems:
            raise problems[0]
        async with self._db.session() as session:
            # A credential that was issued while this ran keeps the session; the plan that asked for it ends it.
            waiting = select(SessionMountRow.id).where(
                SessionMountRow.session_id == session_id, SessionMountRow.revoke_ref.is_not(None)
            )
            if (await session.scalars(waiting.limit(1))).first() is None:
                await session.execute(delete(SessionRow).where(SessionRow.id == session_id))

    async def sweep(self) -> int:
        """Ends sessions whose end or whose planning was interrupted; returns how many."""
        async with self._db.session() as session:
            died = and_(SessionRow.state == SessionState.PLANNING, SessionRow.created_at < now() - PLAN_LIFETIME)
            unfinished = or_(SessionRow.state == SessionState.ENDING, died)
            ids = (await session.scalars(select(SessionRow.id).where(unfinished).limit(100))).all()
        done = 0
        for session_id in ids:
            try:
                await self._end(session_id)
                done += 1
            except MooringError as err:
                log.info("session end waits", session_id=session_id, cause=err.message)
        return done


def _no_session(session_id: str) -> RecordNotFound:
    return RecordNotFound(f"There is no session {session_id!r}.", hint="Check the session id.")


def _ended(session_id: str, doing: str) -> Conflict:
    return Conflict(f"Session {session_id!r} was ended while {doing}.", hint="Plan it again.")


def _shown_mount(mount: SessionMountRow) -> SessionMount:
    return SessionMount(
        folder_id=str(mount.folder_id),
        name=mount.folder_name,
        vfid=mount.vfid,
        target=mount.target,
        mode=mount.mode,
        credential_expires_at=mount.credential_expires_at,
    )
