"""The journal against a plain set, for any sequence of steps and restarts."""

from __future__ import annotations

import asyncio
import tempfile
import time
import uuid
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent_plugin.drivers import MountPlan
from agent_plugin.journal import AttachmentRecord, AttachmentState, Journal, MountRecord, Step
from agent_plugin.supervisor import ProcessID
from storage_proxy.core.errors import AlreadyExists, ConfigError
from storage_proxy.core.ids import AccessMode, MountKey, SessionID, VFolderID
from storage_proxy.core.wire import Location, MountState

from .node import SCOPE

T = TypeVar("T")

KEYS = st.sampled_from([MountKey(letter * 32) for letter in "abc"])
SESSIONS = st.sampled_from([SessionID(f"s{number}") for number in range(3)])
FOLDERS = st.sampled_from([VFolderID(SCOPE, uuid.UUID(int=number)) for number in range(3)])


def plan(key: MountKey) -> MountPlan:
    return MountPlan(
        key=key,
        driver="s3fs",
        volume="minio",
        location=Location(endpoint="http://127.0.0.1:1", bucket="bucket", prefix="a, b/"),
        mode=AccessMode.READ_WRITE,
        credential_id="c",
    )


def mount(key: MountKey, state: MountState = MountState.STAGING) -> MountRecord:
    return MountRecord(plan(key), state, time.time(), "0123456789abcdef")


def attachment(session: SessionID, folder: VFolderID, key: MountKey, grant: str = "g") -> AttachmentRecord:
    return AttachmentRecord(session, folder, key, "/data", AttachmentState.BINDING, time.time(), grant)


class JournalMachine(RuleBasedStateMachine):
    """Attach, detach, drop and reopen in any order; the rows are always those of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.journal = self.do(Journal.open(Path(self.folder.name) / "journal"))
        self.attached: dict[tuple[SessionID, VFolderID], tuple[MountKey, AttachmentState]] = {}
        self.mounts: dict[MountKey, MountState] = {}

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        self.do(self.journal.close())
        self.runner.close()
        self.folder.cleanup()

    @rule(session=SESSIONS, folder=FOLDERS, key=KEYS)
    def attach(self, session: SessionID, folder: VFolderID, key: MountKey) -> None:
        record = mount(key, self.mounts.get(key, MountState.STAGING))
        item = attachment(session, folder, key, uuid.uuid4().hex)
        if (session, folder) in self.attached:
            with pytest.raises(AlreadyExists):
                self.do(self.journal.begin_attach(item, record, time.time() + 60))
            assert not self.do(self.journal.grant_used(item.grant_id)), "a refused attach uses no grant"
            return
        self.do(self.journal.begin_attach(item, record, time.time() + 60))
        assert self.do(self.journal.grant_used(item.grant_id))
        self.attached[session, folder] = (key, AttachmentState.BINDING)
        self.mounts[key] = record.state

    @rule(session=SESSIONS, folder=FOLDERS, state=st.sampled_from(AttachmentState))
    def change(self, session: SessionID, folder: VFolderID, state: AttachmentState) -> None:
        key = self.attached.get((session, folder), (MountKey("none"),))[0]
        self.do(self.journal.set_attachment(attachment(session, folder, key), state))
        if (session, folder) in self.attached:
            self.attached[session, folder] = (key, state)

    @rule(session=SESSIONS, folder=FOLDERS)
    def detach(self, session: SessionID, folder: VFolderID) -> None:
        self.do(self.journal.drop_attachment(attachment(session, folder, MountKey("none"))))
        self.attached.pop((session, folder), None)

    @rule(key=KEYS, state=st.sampled_from(MountState))
    @precondition(lambda self: bool(self.mounts))
    def move(self, key: MountKey, state: MountState) -> None:
        if key in self.mounts:
            self.do(self.journal.save_mount(Step.MOUNT_LIVE, mount(key, state)))
            self.mounts[key] = state

    @rule(key=KEYS)
    def drop(self, key: MountKey) -> None:
        if not any(held == key for held, _ in self.attached.values()):
            self.do(self.journal.drop_mount(key))
            self.mounts.pop(key, None)

    @rule()
    def reopen(self) -> None:
        self.do(self.journal.close())
        self.journal = self.do(Journal.open(self.journal.path))

    @rule()
    def clear(self) -> None:
        self.do(self.journal.clear())
        self.attached.clear()
        self.mounts.clear()

    @invariant()
    def rows_are_the_model(self) -> None:
        rows = self.do(self.journal.attachments())
        assert {(row.session, row.vfid): (row.key, row.state) for row in rows} == self.attached
        assert {row.key: row.state for row in self.do(self.journal.mounts())} == self.mounts


JournalMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestJournal = JournalMachine.TestCase


@pytest.mark.asyncio
async def test_a_mount_comes_back_as_it_was(tmp_path: Path) -> None:
    journal = await Journal.open(tmp_path / "journal")
    record = mount(MountKey("a" * 32), MountState.LIVE)
    record.process, record.device, record.last_error = ProcessID(42, 4711), "0:77", "it said: no"
    await journal.save_mount(Step.MOUNT_LIVE, record)
    await journal.close()
    assert (tmp_path / "journal").stat().st_mode & 0o777 == 0o600
    again = await Journal.open(tmp_path / "journal")
    assert await again.mounts() == [record]
    await again.close()


@pytest.mark.asyncio
async def test_used_grants_are_forgotten_when_they_have_expired(tmp_path: Path) -> None:
    journal = await Journal.open(tmp_path / "journal")
    key = MountKey("a" * 32)
    folder = VFolderID(SCOPE, uuid.UUID(int=1))
    await journal.begin_attach(attachment(SessionID("s1"), folder, key, "old"), mount(key), time.time() - 120)
    await journal.begin_attach(attachment(SessionID("s2"), folder, key, "new"), mount(key), time.time() + 120)
    assert not await journal.grant_used("old")
    assert await journal.grant_used("new")
    await journal.clear()
    assert await journal.grant_used("new"), "forgetting the attachments does not make a grant usable again"
    await journal.close()


@pytest.mark.asyncio
async def test_a_journal_of_another_version_is_left_alone(tmp_path: Path) -> None:
    import sqlite3

    db = sqlite3.connect(tmp_path / "journal")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(ConfigError, match="version 99"):
        await Journal.open(tmp_path / "journal")
