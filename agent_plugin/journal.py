"""The journal: what this agent promised, on disk before it is done.

One SQLite file in WAL mode. A row is written before the step it announces and deleted after the last trace is gone, so
whatever a killed agent leaves behind has a row. A committed row survives the death of the agent; a power cut may take
the last ones back, but it ends every mount and container that they tell of as well (measured: 1.7 ms less for each
step). The use of a grant, and a drain, are forced to the disk. Every transaction is a named step (`Step`), in this
order:

    attach   attach.begin -> mount.started -> mount.live -> attach.bound       (an existing mount: begin, bound)
    detach   detach.begin -> detach.done; after the last: mount.draining -> mount.gone
    death    mount.dead -> repair.begin -> mount.started -> repair.place -> repair.live -> retired.gone
    renewal  renew.begin -> renew.started -> renew.place -> renew.live -> retired.gone
    drain    drain.begin -> drain.end

Credentials are not in it. All work happens in one thread, in the order of the calls; a call that is cancelled still
takes effect.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
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
Statement = tuple[str, tuple[object, ...]]

_SCHEMA_VERSION = 2
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
    last_error TEXT,
    repairs INTEGER NOT NULL DEFAULT 0,
    credential_expires REAL         -- seconds since the epoch
) STRICT;
CREATE TABLE attachments (
    session TEXT NOT NULL,
    vfid TEXT NOT NULL,
    key TEXT NOT NULL REFERENCES mounts (key),
    target TEXT NOT NULL,
    state TEXT NOT NULL,            -- AttachmentState
    since REAL NOT NULL,
    grant_id TEXT NOT NULL,
    held REAL,                      -- when a container was last seen holding it
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
_SECOND = """
CREATE TABLE retired (
    token TEXT PRIMARY KEY,         -- a start of a mount process that is not the key's own (any more, or yet)
    key TEXT NOT NULL,
    pid INTEGER,
    started INTEGER
) STRICT;
CREATE TABLE drains (
    key TEXT PRIMARY KEY            -- refuses new attachments; the empty key stands for the whole node
) STRICT;
"""
_FROM_FIRST = """
ALTER TABLE mounts ADD COLUMN repairs INTEGER NOT NULL DEFAULT 0;
ALTER TABLE mounts ADD COLUMN credential_expires REAL;
ALTER TABLE attachments ADD COLUMN held REAL;
"""


class Step(StrEnum):
    """The name of a transaction; a test kills the agent before and after each."""

    ATTACH_BEGIN = "attach.begin"
    MOUNT_STARTED = "mount.started"
    MOUNT_LIVE = "mount.live"
    ATTACH_BOUND = "attach.bound"
    DETACH_BEGIN = "detach.begin"
    DETACH_DONE = "detach.done"
    MOUNT_DRAINING = "mount.draining"
    MOUNT_GONE = "mount.gone"
    MOUNT_DEAD = "mount.dead"
    MOUNT_FAILED = "mount.failed"
    REPAIR_BEGIN = "repair.begin"
    REPAIR_PLACE = "repair.place"
    REPAIR_LIVE = "repair.live"
    RENEW_BEGIN = "renew.begin"
    RENEW_STARTED = "renew.started"
    RENEW_PLACE = "renew.place"
    RENEW_LIVE = "renew.live"
    RETIRED_GONE = "retired.gone"
    DRAIN_BEGIN = "drain.begin"
    DRAIN_END = "drain.end"
    HELD = "held"
    ADOPT = "adopt"
    CLEAR = "clear"


# The first remembers that a grant was used, also for the time after a power cut.
_FORCED = frozenset({Step.ATTACH_BEGIN, Step.DRAIN_BEGIN, Step.DRAIN_END})


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
    repairs: int = 0
    credential_expires: float | None = None  # seconds since the epoch

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
    held: float | None = None  # when a container was last seen holding it


@dataclass(frozen=True, slots=True)
class RetiredRecord:
    """A start of a mount process that is not its key's own: replaced by a repair or renewal, or about to replace."""

    token: str
    key: MountKey
    process: ProcessID | None = None


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
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA foreign_keys = ON")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._db.executescript(f"BEGIN; {_SCHEMA} {_SECOND} PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;")
        elif version == 1:
            self._db.executescript(f"BEGIN; {_FROM_FIRST} {_SECOND} PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;")
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

    async def _execute(self, step: Step, *statements: Statement) -> None:
        """All statements in one transaction, the step of that name."""
        await self._run(lambda: self._commit(step, statements))

    def _commit(self, step: Step, statements: Sequence[Statement]) -> None:  # the crash matrix takes it
        if step in _FORCED:
            self._db.execute("PRAGMA synchronous = FULL")
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for text, values in statements:
                self._db.execute(text, values)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        finally:
            self._db.execute("PRAGMA synchronous = NORMAL")

    # --- mounts -------------------------------------------------------------------------------------------------------

    async def mounts(self) -> list[MountRecord]:
        """Every mount, oldest first."""

        def work() -> list[MountRecord]:
            rows = self._db.execute(
                "SELECT plan, state, since, token, pid, started, device, last_error, repairs, credential_expires"
                " FROM mounts ORDER BY since, key"
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
                    repairs=repairs,
                    credential_expires=expires,
                )
                for plan, state, since, token, pid, started, device, last_error, repairs, expires in rows
            ]

        return await self._run(work)

    async def save_mount(self, step: Step, record: MountRecord) -> None:
        await self._execute(step, _saved(record))

    async def drop_mount(self, key: MountKey) -> None:
        await self._execute(
            Step.MOUNT_GONE,
            ("DELETE FROM retired WHERE key = ?", (key,)),
            ("DELETE FROM mounts WHERE key = ?", (key,)),
        )

    async def retired(self) -> list[RetiredRecord]:
        def work() -> list[RetiredRecord]:
            rows = self._db.execute("SELECT token, key, pid, started FROM retired ORDER BY rowid").fetchall()
            return [
                RetiredRecord(token, MountKey(key), None if pid is None else ProcessID(pid, started))
                for token, key, pid, started in rows
            ]

        return await self._run(work)

    async def retire(self, step: Step, retired: RetiredRecord, current: MountRecord | None = None) -> None:
        """Writes down a start that is not its key's own and, in the same transaction, the one that is now."""
        statements = [_saved_retired(retired)]
        if current is not None:
            statements += [_saved(current), ("DELETE FROM retired WHERE token = ?", (current.token,))]
        await self._execute(step, *statements)

    async def drop_retired(self, token: str) -> None:
        await self._execute(Step.RETIRED_GONE, ("DELETE FROM retired WHERE token = ?", (token,)))

    # --- drains -------------------------------------------------------------------------------------------------------

    async def drains(self) -> set[str]:
        """Keys that refuse new attachments; the empty one stands for the whole node."""

        def work() -> set[str]:
            return {key for (key,) in self._db.execute("SELECT key FROM drains").fetchall()}

        return await self._run(work)

    async def begin_drain(self, keys: Iterable[str]) -> None:
        statements = [("INSERT OR IGNORE INTO drains (key) VALUES (?)", (key,)) for key in keys]
        await self._execute(Step.DRAIN_BEGIN, *statements)

    async def end_drain(self, keys: Iterable[str] | None) -> None:
        """None: all of them."""
        if keys is None:
            await self._execute(Step.DRAIN_END, ("DELETE FROM drains", ()))
        else:
            await self._execute(Step.DRAIN_END, *(("DELETE FROM drains WHERE key = ?", (key,)) for key in keys))

    # --- attachments --------------------------------------------------------------------------------------------------

    async def attachments(self) -> list[AttachmentRecord]:
        """Every attachment, oldest first."""

        def work() -> list[AttachmentRecord]:
            rows = self._db.execute(
                "SELECT session, vfid, key, target, state, since, grant_id, held FROM attachments"
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
                    held=held,
                )
                for session, vfid, key, target, state, since, grant_id, held in rows
            ]

        return await self._run(work)

    async def begin_attach(self, record: AttachmentRecord, mount: MountRecord, expires: float) -> None:
        """One transaction: the mount as it is now, the attachment, and the use of its grant.

        Raises `AlreadyExists` if the session has this folder already.
        """
        try:
            await self._execute(
                Step.ATTACH_BEGIN,
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
        """`bound` or `releasing`."""
        await self._execute(
            Step.ATTACH_BOUND if state is AttachmentState.BOUND else Step.DETACH_BEGIN,
            (
                "UPDATE attachments SET state = ? WHERE session = ? AND vfid = ?",
                (state.value, record.session, str(record.vfid)),
            ),
        )
        record.state = state

    async def save_held(self, seen: Sequence[tuple[AttachmentRecord, float | None]]) -> None:
        """When each was last seen held by a container."""
        statements: list[Statement] = [
            ("UPDATE attachments SET held = ? WHERE session = ? AND vfid = ?", (at, item.session, str(item.vfid)))
            for item, at in seen
        ]
        await self._execute(Step.HELD, *statements)
        for item, at in seen:
            item.held = at

    async def drop_attachment(self, record: AttachmentRecord, *, forget_grant: bool = False) -> None:
        """`forget_grant`: the attach did not happen, so the grant may be used again until it expires."""
        statements: list[Statement] = [
            ("DELETE FROM attachments WHERE session = ? AND vfid = ?", (record.session, str(record.vfid)))
        ]
        if forget_grant:
            statements.append(("DELETE FROM grants WHERE id = ?", (record.grant_id,)))
        await self._execute(Step.DETACH_DONE, *statements)

    async def grant_used(self, grant_id: str) -> bool:
        def work() -> bool:
            return self._db.execute("SELECT 1 FROM grants WHERE id = ?", (grant_id,)).fetchone() is not None

        return await self._run(work)

    async def clear(self) -> None:
        """Forgets all mounts and attachments; used grants stay used."""
        await self._execute(
            Step.CLEAR,
            ("DELETE FROM attachments", ()),
            ("DELETE FROM retired", ()),
            ("DELETE FROM mounts", ()),
            ("DELETE FROM drains WHERE key != ''", ()),
        )


def _saved_retired(record: RetiredRecord) -> Statement:
    process = record.process
    return (
        "INSERT INTO retired (token, key, pid, started) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (token) DO UPDATE SET pid = excluded.pid, started = excluded.started",
        (record.token, record.key, process.pid if process else None, process.started if process else None),
    )


def _saved(record: MountRecord) -> Statement:
    return (
        "INSERT INTO mounts"
        " (key, plan, state, since, token, pid, started, device, last_error, repairs, credential_expires)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (key) DO UPDATE SET state = excluded.state, since = excluded.since, token = excluded.token,"
        " pid = excluded.pid, started = excluded.started, device = excluded.device, last_error = excluded.last_error,"
        " repairs = excluded.repairs, credential_expires = excluded.credential_expires",
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
            record.repairs,
            record.credential_expires,
        ),
    )


def _translated(err: sqlite3.Error, path: Path) -> Exception:
    code = getattr(err, "sqlite_errorname", "")
    if code == "SQLITE_FULL":
        return NoSpace(f"The disk of the agent's journal {path} is full.", hint="Free space below the state-dir.")
    if code in ("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM"):
        return ConfigError(f"The agent's journal {path} cannot be written ({err}).", hint="Check the state-dir.")
    return ServiceUnavailable(f"The agent's journal {path} does not work ({err}).", hint="Look at the disk it is on.")
