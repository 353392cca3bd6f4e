"""Session plans: all mounts or none, grants for one agent, read-only stays read-only, everything is revoked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select, update

from manager_ext.models import SessionMountRow, SessionRow
from manager_ext.models.base import now
from manager_ext.services.targets import check_targets
from storage_proxy.client.manager import MountAsked, SessionState
from storage_proxy.core.crypto import SealingKey
from storage_proxy.core.errors import (
    AlreadyExists,
    Conflict,
    IntegrityError,
    InvalidRequest,
    ReadOnly,
    RecordNotFound,
    ServiceUnavailable,
    TokenInvalid,
    VFolderNotFound,
)
from storage_proxy.core.ids import AccessMode
from storage_proxy.core.secrets import Secret
from storage_proxy.core.tokens import Purpose, TokenSigner
from tests.fakes.fake_proxy import ENDPOINT, FakeProxy

from .manager_stack import ADMIN, AGENT_ID, BOB, Stack, running

KEY, SECRET = "AKIDEXAMPLE12345", "the-secret-of-the-bucket-owner-0123456789"


@pytest.fixture
def proxy() -> FakeProxy:
    fake = FakeProxy()
    fake.known_keys[KEY] = SECRET
    fake.buckets.add("datasets")
    return fake


@pytest_asyncio.fixture
async def stack(tmp_path: Path, proxy: FakeProxy, any_database_url: str) -> AsyncIterator[Stack]:
    """Alice has a managed folder `data` and a read-only bound one `set`; the agent is registered."""
    async with running(tmp_path, proxy, any_database_url) as running_stack:
        await running_stack.register_agent()
        async with running_stack.client() as alice:
            await alice.create_folder("data", "minio")
            await alice.bind_folder(
                "set",
                "minio",
                "datasets",
                prefix="models/",
                read_only=True,
                access_key=KEY,
                secret_key=Secret(SECRET),
                uid=2000,
            )
        proxy.calls.clear()
        yield running_stack


proxy_is_down = pytest.mark.expects_log("The storage proxy does not answer")


def down() -> None:
    raise ServiceUnavailable("The storage proxy does not answer.")


def asked(folder: str, target: str, mode: AccessMode | None = None) -> MountAsked:
    return MountAsked(folder=folder, target=target, mode=mode)


async def count(stack: Stack) -> tuple[int, int]:
    async with stack.db.session() as session:
        sessions = await session.scalar(select(func.count()).select_from(SessionRow))
        mounts = await session.scalar(select(func.count()).select_from(SessionMountRow))
    return sessions or 0, mounts or 0


@pytest.mark.asyncio
async def test_a_plan_gives_the_agent_all_it_needs(stack: Stack, proxy: FakeProxy) -> None:
    async with stack.client() as alice:
        before = datetime.now(UTC)
        plan = await alice.create_session(
            AGENT_ID, [asked("data", "/home/work/data"), asked("set", "/set")], session_id="job-1", uid=1000, gid=1000
        )
        assert (plan.session_id, plan.agent_id) == ("job-1", AGENT_ID)
        data, dataset = plan.mounts
        session_id, permitted, keys = stack.open_grant(data.grant)
        folder = await alice.folder("data")
        assert (session_id, permitted.vfid, permitted.target) == ("job-1", folder.vfid, "/home/work/data")
        assert permitted.mode is AccessMode.READ_WRITE is data.mode
        assert (permitted.ownership.uid, permitted.ownership.gid, permitted.ownership.umask) == (1000, 1000, 0o022)
        assert permitted.location.prefix.endswith(f"{folder.vfid[-28:]}/")
        assert keys.access_key == "SCOPED1"

        _, permitted, keys = stack.open_grant(dataset.grant)
        bound = await alice.folder("set")
        assert (permitted.location.endpoint, permitted.location.bucket) == (ENDPOINT, "datasets")
        assert (permitted.location.prefix, permitted.mode) == ("models/", AccessMode.READ_ONLY)
        assert permitted.ownership.uid == 2000, "what the binding fixed"
        assert (keys.access_key, keys.secret_key.reveal()) == (KEY, SECRET)
        assert permitted.credential_id == bound.credential_id

        for mount in plan.mounts:
            assert before + timedelta(seconds=299) < mount.expires_at < datetime.now(UTC) + timedelta(seconds=301)
            assert SECRET not in mount.grant
            assert KEY not in mount.grant

        seen = await alice.session("job-1")
        assert seen.state is SessionState.ACTIVE
        assert [(mount.name, mount.target) for mount in seen.mounts] == [("data", "/home/work/data"), ("set", "/set")]
        await alice.delete_session("job-1")
        assert (proxy.issued, proxy.revoked) == ({}, ["ref-1"])
        assert await count(stack) == (0, 0)
        await alice.delete_session("job-1")
        with pytest.raises(RecordNotFound):
            await alice.session("job-1")


@pytest.mark.asyncio
async def test_a_grant_is_for_one_agent_and_its_key(stack: Stack) -> None:
    async with stack.client() as alice:
        plan = await alice.create_session(AGENT_ID, [asked("data", "/data")])
    grant = plan.mounts[0].grant
    with pytest.raises(TokenInvalid):
        stack.open_grant(grant, agent_id="node-2")
    with pytest.raises(TokenInvalid):
        TokenSigner(f"agent:{AGENT_ID}", [stack.grant_public]).verify(grant, Purpose.API)
    _, permitted, _ = stack.open_grant(grant)
    with pytest.raises(IntegrityError):
        SealingKey.generate().open(permitted.sealed_credential, permitted.credential_id)
    with pytest.raises(IntegrityError):
        stack.agent_key.open(permitted.sealed_credential, "another-id")
    status, _ = await stack.call("GET", "/v1/folders", token=grant)
    assert status == 401


@pytest.mark.asyncio
async def test_read_only_stays_read_only(stack: Stack, proxy: FakeProxy) -> None:
    async with stack.client() as alice:
        with pytest.raises(ReadOnly):
            await alice.create_session(AGENT_ID, [asked("set", "/set", AccessMode.READ_WRITE)])
        assert await count(stack) == (0, 0)
        plan = await alice.create_session(AGENT_ID, [asked("data", "/data", AccessMode.READ_ONLY)])
        assert stack.open_grant(plan.mounts[0].grant)[1].mode is AccessMode.READ_ONLY


@pytest.mark.asyncio
async def test_folders_of_others_are_not_mounted(stack: Stack, proxy: FakeProxy) -> None:
    async with stack.client() as alice, stack.client(BOB) as bob:
        folder = await alice.folder("data")
        for ref in ("data", folder.id):
            with pytest.raises(VFolderNotFound):
                await bob.create_session(AGENT_ID, [asked(ref, "/data")])
        plan = await alice.create_session(AGENT_ID, [asked("data", "/data")], session_id="hers")
        with pytest.raises(RecordNotFound):
            await bob.session("hers")
        await bob.delete_session("hers")  # says nothing, does nothing
        assert (await alice.session("hers")).state is SessionState.ACTIVE
        await bob.create_folder("own", "minio")
        with pytest.raises(AlreadyExists):
            await bob.create_session(AGENT_ID, [asked("own", "/data")], session_id="hers")
        assert plan.session_id == "hers"
    async with stack.client(ADMIN, "admin") as admin:
        await admin.delete_session("hers")
        assert await count(stack) == (0, 0)


@pytest.mark.asyncio
async def test_all_or_nothing(stack: Stack, proxy: FakeProxy) -> None:
    async with stack.client() as alice:
        with pytest.raises(VFolderNotFound, match="missing"):
            await alice.create_session(AGENT_ID, [asked("data", "/data"), asked("missing", "/m")], session_id="s1")
        assert (await count(stack), proxy.calls) == ((0, 0), [])
        await alice.create_session(AGENT_ID, [asked("data", "/data")], session_id="s1")
        with pytest.raises(AlreadyExists):
            await alice.create_session(AGENT_ID, [asked("set", "/data")], session_id="s1")


@pytest.mark.asyncio
@proxy_is_down
async def test_what_was_issued_is_revoked_when_another_mount_fails(stack: Stack, proxy: FakeProxy) -> None:
    async with stack.client() as alice:
        proxy.before["mount"] = down
        with pytest.raises(ServiceUnavailable):
            await alice.create_session(AGENT_ID, [asked("data", "/data"), asked("set", "/set")], session_id="s1")
        assert (await count(stack), proxy.issued) == ((0, 0), {})
        proxy.before.clear()
        await alice.create_session(AGENT_ID, [asked("data", "/data"), asked("set", "/set")], session_id="s1")


@pytest.mark.asyncio
@proxy_is_down
async def test_what_cannot_be_revoked_now_is_revoked_later(stack: Stack, proxy: FakeProxy) -> None:
    async with stack.client() as alice:
        await alice.create_session(AGENT_ID, [asked("data", "/data")], session_id="s1")
        proxy.before["*"] = down
        with pytest.raises(ServiceUnavailable):
            await alice.delete_session("s1")
        assert (await alice.session("s1")).state is SessionState.ENDING
        with pytest.raises(AlreadyExists):
            await alice.create_session(AGENT_ID, [asked("data", "/data")], session_id="s1")
        assert await stack.services.sessions.sweep() == 0
        proxy.before.clear()
        assert await stack.services.sessions.sweep() == 1
        assert (await count(stack), proxy.issued) == ((0, 0), {})


@pytest.mark.asyncio
async def test_a_caller_who_goes_away_leaves_no_credential(stack: Stack, proxy: FakeProxy) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        started.set()
        await go_on.wait()

    proxy.after["issue_mount_credential"] = wait  # made, but its answer is still on the way
    async with stack.client() as alice:
        call = asyncio.create_task(alice.create_session(AGENT_ID, [asked("data", "/data")]))
        await asyncio.wait_for(started.wait(), 5)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        go_on.set()
        async with asyncio.timeout(5):
            while await count(stack) != (0, 0):  # noqa: ASYNC110 - the condition is in the database
                await asyncio.sleep(0.02)
    assert (proxy.issued, proxy.revoked) == ({}, ["ref-1"])


@pytest.mark.asyncio
async def test_a_session_ended_while_it_is_planned_gets_nothing(stack: Stack, proxy: FakeProxy) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        started.set()
        await go_on.wait()

    proxy.before["issue_mount_credential"] = wait
    async with stack.client() as alice:
        planning = asyncio.create_task(alice.create_session(AGENT_ID, [asked("data", "/data")], session_id="s1"))
        await asyncio.wait_for(started.wait(), 5)
        await alice.delete_session("s1")
        go_on.set()
        with pytest.raises(Conflict, match="ended while"):
            await planning
    assert (await count(stack), proxy.issued) == ((0, 0), {})


@pytest.mark.asyncio
async def test_a_plan_whose_process_died_is_swept(stack: Stack, proxy: FakeProxy) -> None:
    async with stack.client() as alice:
        await alice.create_session(AGENT_ID, [asked("data", "/data")], session_id="s1")
    async with stack.db.session() as session:
        await session.execute(update(SessionRow).values(state=SessionState.PLANNING))
    assert await stack.services.sessions.sweep() == 0, "a plan in progress"
    async with stack.db.session() as session:
        await session.execute(update(SessionRow).values(created_at=now() - timedelta(hours=1)))
    assert await stack.services.sessions.sweep() == 1
    assert (await count(stack), proxy.issued) == ((0, 0), {})


@pytest.mark.asyncio
async def test_sessions_and_deletions_at_once_never_cross(stack: Stack, proxy: FakeProxy) -> None:
    """Either the folder is deleted and the session is refused, or the session holds it."""
    async with stack.client() as alice:
        for number in range(8):
            folder = await alice.create_folder(f"race{number}", "minio")
            results = await asyncio.gather(
                alice.delete_folder(folder.id),
                alice.create_session(AGENT_ID, [asked(folder.id, "/data")], session_id=f"race{number}"),
                return_exceptions=True,
            )
            deleted, planned = (not isinstance(result, BaseException) for result in results)
            assert deleted != planned, results
            assert (folder.vfid in proxy.folders) == planned


@pytest.mark.asyncio
async def test_an_unknown_agent_is_named(stack: Stack) -> None:
    async with stack.client() as alice:
        with pytest.raises(RecordNotFound, match="node-9"):
            await alice.create_session("node-9", [asked("data", "/data")])


@pytest.mark.asyncio
async def test_one_folder_once(stack: Stack) -> None:
    async with stack.client() as alice:
        folder = await alice.folder("data")
        with pytest.raises(InvalidRequest, match="twice"):
            await alice.create_session(AGENT_ID, [asked("data", "/a"), asked(folder.id, "/b")])
    assert await count(stack) == (0, 0)


@pytest.mark.parametrize(
    "targets",
    [
        ["/proc"],
        ["/proc/1"],
        ["/sys/fs"],
        ["/dev"],
        ["/dev/shm"],
        ["/etc"],
        ["/etc/passwd"],
        ["/usr"],
        ["/usr/bin/x"],
        ["/var"],
        ["/run/x"],
        ["/lib64"],
        ["/data", "/data"],
        ["/data", "/data/x"],
        ["/a/b/c", "/z", "/a/b"],
        ["/data/x", "/data-1", "/data"],
    ],
)
def test_targets_that_are_refused(targets: list[str]) -> None:
    with pytest.raises(InvalidRequest):
        check_targets(targets)


@pytest.mark.parametrize(
    "targets", [["/data", "/data-1", "/data.x"], ["/home/work/a", "/home/work/b"], ["/usr/local/data"], ["/process"]]
)
def test_targets_that_are_fine(targets: list[str]) -> None:
    check_targets(targets)


_PATHS = st.lists(st.sampled_from(["a", "b", "a-", "a b", "c"]), min_size=1, max_size=3).map(
    lambda p: "/" + "/".join(p)
)


@given(st.lists(_PATHS, min_size=1, max_size=6))
def test_overlap_is_found_whatever_the_order(targets: list[str]) -> None:
    overlap = any(
        one == other or other.startswith(one + "/")
        for number, one in enumerate(targets)
        for place, other in enumerate(targets)
        if number != place
    )
    if overlap:
        with pytest.raises(InvalidRequest):
            check_targets(targets)
    else:
        check_targets(targets)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "change",
    [
        {"mounts": []},
        {"mounts": [{"folder": "data", "target": "data"}]},
        {"mounts": [{"folder": "data", "target": "/"}]},
        {"mounts": [{"folder": "data", "target": "/a/../etc"}]},
        {"mounts": [{"folder": "data", "target": "/a\x00"}]},
        {"mounts": [{"folder": "data", "target": "/etc"}]},
        {"mounts": [{"folder": "../x", "target": "/data"}]},
        {"mounts": [{"folder": "data", "target": "/data", "mode": "rwx"}]},
        {"mounts": [{"folder": "data", "target": f"/t{number}"} for number in range(65)]},
        {"session_id": "../x"},
        {"session_id": "a/b"},
        {"agent_id": "a b"},
        {"uid": -1},
        {"uid": 2**32},
        {"umask": 0o1777},
        {"options": "allow_other"},
    ],
)
async def test_bad_requests_are_refused(tmp_path: Path, proxy: FakeProxy, change: dict[str, object]) -> None:
    async with running(tmp_path, proxy, f"sqlite:///{tmp_path / 'm.db'}") as stack:
        await stack.register_agent()
        body: dict[str, object] = {"agent_id": AGENT_ID, "mounts": [{"folder": "data", "target": "/data"}], **change}
        status, answer = await stack.call("POST", "/v1/sessions", body, token=stack.token())
        assert status == 400, answer
        assert await count(stack) == (0, 0)
