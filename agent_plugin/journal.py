"""The journal: what this agent promised, on disk before it is done.

One SQLite file (WAL, synchronous=FULL: a committed row survives a power cut). Two tables tell what exists or is being
made or unmade, one which grants were used. A row is written before the step it announces and deleted after the last
trace is gone, so whatever a killed agent leaves behind has a row:

    attach   attachment `binding` (and mount `staging` with its token) -> process, its pid -> `live` -> bind -> `bound`
    detach   `releasing` -> unbind -> no row; after the last: mount `draining` -> grace -> unmount, wipe -> no row

Credentials are not in it. All work happens in one thread, in the order of the calls; a call that is cancelled still
takes effect.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self, TypeVar

from storage_proxy.core.errors import AlreadyExists, ConfigError, NoSpace, ServiceUnavailable
from storage_proxy.core.ids import MountKey, SessionID, VFolderID
from storage_proxy.core.wire import MountState

from .drivers import MountPlan
from .supervisor import ProcessID

T = TypeVar("T")

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE mounts (
    key TEXT PRIMARY KEY,
    plan TEXT NOT NULL,             -- MountPlan as JSON, no secrets
    state TEXT NOT NULL,            -- MountState
    since REAL NOT NULL,            -- seconds since the epoch
    token TEXT NOT NULL,            -- names the stage entry, credential file, scratch folder and log of the process
    pid INTEGER,
    started INTEGER,                -- start time of the process, clock ticks after boot
    device TEXT,                    -- major:minor of the mount
    last_error TEXT
) STRICT;
CREATE TABLE attachments (
    session TEXT NOT NULL,
    vfid TEXT NOT NULL,
    key TEXT NOT NULL REFERENCES mounts (key),
    target TEXT NOT NULL,
    state TEXT NOT NULL,            -- AttachmentState
    since REAL NOT NULL,
    grant_id TEXT NOT NULL,
    PRIMARY KEY (session, vfid)
) STRICT;
CREATE INDEX attachments_key ON attachments (key);
CREATE TABLE grants (
    id TEXT PRIMARY KEY,            -- `jti` of the token
    session TEXT NOT NULL,
    vfid TEXT NOT NULL,
    expires REAL NOT NULL
) STRICT;
"""


class AttachmentState(StrEnum):
    BINDING = "binding"
    BOUND = "bound"
    RELEASING = "releasing"


@dataclass(slots=True)
class MountRecord:
    """One mount key. `token` changes with every start of a process."""

    plan: MountPlan
    state: MountState
    since: float
    token: str
    process: ProcessID | None = None
    device: str | None = None
    last_error: str | None = None

    @property
    def key(self) -> MountKey:
        return self.plan.key


@dataclass(slots=True)
class AttachmentRecord:
    """One folder of one session."""

    session: SessionID
    vfid: VFolderID
    key: MountKey
    target: str
    state: AttachmentState
    since: float
    grant_id: str


class Journal:
    """Use `await Journal.open(path)`, and `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._db: sqlite3.Connection

    @classmethod
    async def open(cls, path: Path) -> Self:
        """Opens or creates the file (mode 0600). Raises `ConfigError` if it cannot be used."""
        journal = cls(path)
        try:
            await journal._run(journal._open)
        except BaseException:
            journal._thread.shutdown(wait=False)
            raise
        return journal

    async def close(self) -> None:
        await self._run(lambda: self._db.close())
        self._thread.shutdown(wait=True)

    def _open(self) -> None:
        try:
            self.path.touch(mode=0o600, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=5.0, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise
        except OSError as err:
            raise ConfigError(f"The agent's journal {self.path} cannot be made: {err.strerror}.") from None
        except sqlite3.OperationalError as err:
            raise _translated(err, self.path) from None
        except sqlite3.DatabaseError:
            raise ConfigError(
                f"The agent's journal {self.path} is damaged.",
                hint="End all sessions of this node, then delete the file; the agent cleans up what it finds.",
            ) from None

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;")
        elif version != _SCHEMA_VERSION:
            raise ConfigError(
                f"The agent's journal {self.path} has version {version}, this agent knows {_SCHEMA_VERSION}.",
                hint="Run the version that wrote it, end all sessions of this node, then delete the file.",
            )

    async def _run(self, call: Callable[[], T]) -> T:
        def work() -> T:
            try:
                return call()
            except sqlite3.IntegrityError:
                raise
            except sqlite3.Error as err:
                raise _translated(err, self.path) from None

        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _execute(self, *statements: tuple[str, tuple[object, ...]]) -> None:
        """All statements in one transaction."""

        def work() -> None:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for text, values in statements:
                    self._db.execute(text, values)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

        await self._run(work)

    # --- mounts -------------------------------------------------------------------------------------------------------

    async def mounts(self) -> list[MountRecord]:
        """Every mount, oldest first."""

        def work() -> list[MountRecord]:
            rows = self._db.execute(
                "SELECT plan, state, since, token, pid, started, device, last_error FROM mounts ORDER BY since, key"
            ).fetchall()
            return [
                MountRecord(
                    plan=MountPlan.model_validate_json(plan),
                    state=MountState(state),
                    since=since,
                    token=token,
                    process=None if pid is None else ProcessID(pid, started),
                    device=device,
                    last_error=last_error,
                )
                for plan, state, since, token, pid, started, device, last_error in rows
            ]

        return await self._run(work)

    async def save_mount(self, record: MountRecord) -> None:
        await self._execute(_saved(record))

    async def drop_mount(self, key: MountKey) -> None:
        await self._execute(("DELETE FROM mounts WHERE key = ?", (key,)))

    # --- attachments --------------------------------------------------------------------------------------------------

    async def attachments(self) -> list[AttachmentRecord]:
        """Every attachment, oldest first."""

        def work() -> list[AttachmentRecord]:
            rows = self._db.execute(
                "SELECT session, vfid, key, target, state, since, grant_id FROM attachments"
                " ORDER BY since, session, vfid"
            ).fetchall()
            return [
                AttachmentRecord(
                    session=SessionID(session),
                    vfid=VFolderID.parse(vfid),
                    key=MountKey(key),
                    target=target,
                    state=AttachmentState(state),
                    since=since,
                    grant_id=grant_id,
                )
                for session, vfid, key, target, state, since, grant_id in rows
            ]

        return await self._run(work)

    async def begin_attach(self, record: AttachmentRecord, mount: MountRecord, expires: float) -> None:
        """One transaction: the mount as it is now, the attachment, and the use of its grant.

        Raises `AlreadyExists` if the session has this folder already.
        """
        try:
            await self._execute(
                _saved(mount),
                (
                    "INSERT INTO attachments (session, vfid, key, target, state, since, grant_id)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        record.session,
                        str(record.vfid),
                        record.key,
                        record.target,
                        record.state.value,
                        record.since,
                        record.grant_id,
                    ),
                ),
                (
                    "INSERT OR IGNORE INTO grants (id, session, vfid, expires) VALUES (?, ?, ?, ?)",
                    (record.grant_id, record.session, str(record.vfid), expires),
                ),
                ("DELETE FROM grants WHERE expires < ?", (time.time() - 60.0,)),
            )
        except sqlite3.IntegrityError:
            raise AlreadyExists(
                f"Session {record.session} has folder {record.vfid} attached already.", hint="Detach it first."
            ) from None

    async def set_attachment(self, record: AttachmentRecord, state: AttachmentState) -> None:
        await self._execute(
            (
                "UPDATE attachments SET state = ? WHERE session = ? AND vfid = ?",
                (state.value, record.session, str(record.vfid)),
            )
        )
        record.state = state

    async def drop_attachment(self, record: AttachmentRecord, *, forget_grant: bool = False) -> None:
        """`forget_grant`: the attach did not happen, so the grant may be used again until it expires."""
        statements: list[tuple[str, tuple[object, ...]]] = [
            ("DELETE FROM attachments WHERE session = ? AND vfid = ?", (record.session, str(record.vfid)))
        ]
        if forget_grant:
            statements.append(("DELETE FROM grants WHERE id = ?", (record.grant_id,)))
        await self._execute(*statements)

    async def grant_used(self, grant_id: str) -> bool:
        def work() -> bool:
            return self._db.execute("SELECT 1 FROM grants WHERE id = ?", (grant_id,)).fetchone() is not None

        return await self._run(work)

    async def clear(self) -> None:
        """Forgets all mounts and attachments; used grants stay used."""
        await self._execute(("DELETE FROM attachments", ()), ("DELETE FROM mounts", ()))


def _saved(record: MountRecord) -> tuple[str, tuple[object, ...]]:
    return (
        "INSERT INTO mounts (key, plan, state, since, token, pid, started, device, last_error)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (key) DO UPDATE SET state = excluded.state, since = excluded.since, token = excluded.token,"
        " pid = excluded.pid, started = excluded.started, device = excluded.device, last_error = excluded.last_error",
        (
            record.key,
            record.plan.model_dump_json(),
            record.state.value,
            record.since,
            record.token,
            record.process.pid if record.process else None,
            record.process.started if record.process else None,
            record.device,
            record.last_error,
        ),
    )


def _translated(err: sqlite3.Error, path: Path) -> Exception:
    code = getattr(err, "sqlite_errorname", "")
    if code == "SQLITE_FULL":
        return NoSpace(f"The disk of the agent's journal {path} is full.", hint="Free space below the state-dir.")
    if code in ("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM"):
        return ConfigError(f"The agent's journal {path} cannot be written ({err}).", hint="Check the state-dir.")
    return ServiceUnavailable(f"The agent's journal {path} does not work ({err}).", hint="Look at the disk it is on.")
