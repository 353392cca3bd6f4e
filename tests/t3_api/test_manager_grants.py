"""Fresh grants for the mounts of a session that runs: who gets them, what is in them, when there are none."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy import select, update

from manager_ext.models import CredentialRow, FolderRow, SessionMountRow, SessionRow
from storage_proxy.client import ManagerClient, ProxyClient
from storage_proxy.client.manager import MountAsked, PlannedMount, SessionState
from storage_proxy.core.errors import (
    Conflict,
    Forbidden,
    MooringError,
    ReadOnly,
    RecordNotFound,
    ServiceUnavailable,
    VFolderNotFound,
)
from storage_proxy.core.secrets import Secret
from storage_proxy.core.tokens import Purpose, TokenSigner
from storage_proxy.core.wire import S3Credential
from storage_proxy.s3 import Endpoint, S3Client
from tests.fakes.fake_proxy import FakeProxy

from .manager_stack import ADMIN, AGENT_ID, ALICE, BOB, PROJECT, Stack, running
from .proxy_stand import ProxyStand
from .test_proxy_credentials import shift

pytestmark = pytest.mark.asyncio

KEY, SECRET = "AKIDEXAMPLE12345", "the-secret-of-the-bucket-owner-0123456789"
proxy_is_down = pytest.mark.expects_log("The storage proxy does not answer")


@pytest.fixture
def proxy() -> FakeProxy:
    fake = FakeProxy()
    fake.known_keys[KEY] = SECRET
    fake.buckets.add("datasets")
    return fake


@pytest_asyncio.fixture
async def stack(tmp_path: Path, proxy: FakeProxy, any_database_url: str) -> AsyncIterator[Stack]:
    """Session `s1` of Alice on the agent: her managed folder `data` and her bound one `set`, read-only."""
    async with running(tmp_path, proxy, any_database_url) as running_stack:
        await running_stack.register_agent()
        async with running_stack.client() as alice:
            await alice.create_folder("data", "minio")
            await alice.bind_folder(
                "set", "minio", "datasets", read_only=True, access_key=KEY, secret_key=Secret(SECRET), uid=2000
            )
            mounts = [MountAsked(folder="data", target="/data"), MountAsked(folder="set", target="/set")]
            await alice.create_session(AGENT_ID, mounts, session_id="s1", uid=1000, gid=1001, umask=0o027)
        yield running_stack


def agent(stack: Stack, agent_id: str = AGENT_ID) -> ManagerClient:
    return stack.client(agent_id, "agent")


def terms(stack: Stack, mount: PlannedMount) -> tuple[dict[str, object], S3Credential]:
    """What a grant permits, without the seal; and the keys."""
    session_id, permitted, keys = stack.open_grant(mount.grant)
    return {"session": session_id, **permitted.model_dump(exclude={"sealed_credential"})}, keys


@pytest.mark.parametrize("who", ["agent", "owner", "admin"])
async def test_a_fresh_grant_permits_the_same_with_new_keys(stack: Stack, proxy: FakeProxy, who: str) -> None:
    caller = {"agent": (AGENT_ID, "agent"), "owner": (ALICE, "user"), "admin": (ADMIN, "admin")}[who]
    proxy.credential_expires = datetime.now(UTC) + timedelta(hours=7)
    async with stack.client() as alice, stack.client(*caller) as client:
        folder = await alice.folder("data")
        first = await client.renew_grant("s1", folder.id)
        second = await client.renew_grant("s1", uuid.UUID(folder.id).hex)
        (permitted, old), (again, new) = terms(stack, first), terms(stack, second)
        assert permitted == again
        assert (permitted["session"], permitted["vfid"], permitted["target"]) == ("s1", folder.vfid, "/data")
        assert permitted["ownership"] == {"uid": 1000, "gid": 1001, "umask": 0o027}
        assert permitted["credential_id"] == "cred-1", "what the agent finds the mount by"
        assert old.access_key != new.access_key
        assert new.expires_at == proxy.credential_expires == second.credential_expires_at
        assert second.expires_at > datetime.now(UTC) + timedelta(seconds=290)
        claims = [
            TokenSigner(f"agent:{AGENT_ID}", [stack.grant_public]).verify(m.grant, Purpose.GRANT)
            for m in (first, second)
        ]
        assert claims[0].token_id != claims[1].token_id
        seen = {mount.name: mount.credential_expires_at for mount in (await alice.session("s1")).mounts}
        assert seen == {"data": proxy.credential_expires, "set": None}
        await alice.delete_session("s1")
        assert (proxy.issued, proxy.revoked) == ({}, ["ref-1"])


async def test_a_bound_folder_gets_the_keys_that_are_stored_now(stack: Stack) -> None:
    async with agent(stack) as node, stack.client() as alice:
        before, keys = terms(stack, await node.renew_grant("s1", "set"))
        assert (keys.secret_key.reveal(), before["mode"]) == (SECRET, "ro")
        assert before["ownership"] == {"uid": 2000, "gid": 1001, "umask": 0o027}
        bound = await alice.folder("set")
        ends = datetime.now(UTC) + timedelta(hours=1)
        replaced = S3Credential(access_key="AKIDREPLACED", secret_key=Secret("another-secret"), expires_at=ends)
        credentials = stack.services.credentials
        async with stack.db.session() as session:
            row = await session.get_one(CredentialRow, uuid.UUID(bound.credential_id))
            row.keys = credentials._keys.seal_keys(row.id, replaced.to_sealable())
        mount = await node.renew_grant("s1", "set")
        after, keys = terms(stack, mount)
        assert after == before, "the same credential with other keys: the same mount"
        assert (keys, mount.credential_expires_at) == (replaced, ends)


async def test_another_credential_is_another_mount(stack: Stack) -> None:
    """It cannot be stacked on a mount that others may share: the session is planned again."""
    async with agent(stack) as node, stack.client() as alice:
        other = await alice.create_credential("other", "AKIDOTHER", Secret("other-secret"))
        async with stack.db.session() as session:
            await session.execute(
                update(FolderRow).where(FolderRow.name == "set").values(credential_id=uuid.UUID(other.id))
            )
        with pytest.raises(Conflict, match="another credential"):
            await node.renew_grant("s1", "set")


async def test_nobody_else_gets_a_grant(stack: Stack, proxy: FakeProxy) -> None:
    proxy.calls.clear()
    async with stack.client(BOB) as bob, agent(stack, "node-2") as other, agent(stack, str(uuid.uuid4())) as unknown:
        for client in (bob, other, unknown):
            for session_id, folder in (("s1", "data"), ("s1", "nothing"), ("none", "data")):
                with pytest.raises(RecordNotFound, match="no session"):
                    await client.renew_grant(session_id, folder)
    async with agent(stack) as node:
        with pytest.raises(RecordNotFound, match="no folder"):
            await node.renew_grant("s1", str(uuid.uuid4()))
        with pytest.raises(Forbidden):
            await node.session("s1")
    status, _ = await stack.call("POST", "/v1/sessions/s1/mounts/data/grant")
    assert status == 401
    status, _ = await stack.call("POST", "/v1/sessions/s1/mounts/a%2Fb/grant", token=stack.token())
    assert status == 400
    assert proxy.calls == []


async def test_who_registered_an_agent_speaks_for_it(stack: Stack) -> None:
    service = str(uuid.uuid4())
    async with stack.client(service, "agent") as starter, stack.client() as alice:
        await starter.register_agent("node-7", stack.agent_key.public)
        await alice.create_session("node-7", [MountAsked(folder="data", target="/data")], session_id="s7")
        assert (await starter.renew_grant("s7", "data")).target == "/data"
        with pytest.raises(RecordNotFound):
            await starter.renew_grant("s1", "data")


async def test_what_was_withdrawn_is_not_renewed(stack: Stack, proxy: FakeProxy) -> None:
    async with stack.client(ALICE, projects=(PROJECT,)) as member, stack.client() as left, agent(stack) as node:
        shared = await member.create_folder("shared", "minio", quota_scope=f"project:{PROJECT}")
        await member.create_session(AGENT_ID, [MountAsked(folder=shared.id, target="/s")], session_id="s2")
        await member.renew_grant("s2", "shared")
        with pytest.raises(VFolderNotFound):
            await left.renew_grant("s2", "shared")

        async with stack.db.session() as session:
            await session.execute(update(FolderRow).where(FolderRow.name == "data").values(read_only=True))
        with pytest.raises(ReadOnly):
            await node.renew_grant("s1", "data")

        bound = await left.folder("set")
        del proxy.folders[bound.vfid]
        with pytest.raises(VFolderNotFound):
            await node.renew_grant("s1", "set")


async def test_a_session_that_ended_is_not_renewed(stack: Stack, proxy: FakeProxy) -> None:
    async with stack.client() as alice, agent(stack) as node:
        async with stack.db.session() as session:
            await session.execute(update(SessionRow).values(state=SessionState.ENDING))
        with pytest.raises(Conflict, match="is ending"):
            await node.renew_grant("s1", "data")
        await alice.delete_session("s1")
        with pytest.raises(RecordNotFound):
            await node.renew_grant("s1", "data")
    assert proxy.issued == {}


async def test_a_session_that_ends_meanwhile_leaves_no_key(stack: Stack, proxy: FakeProxy) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        started.set()
        await go_on.wait()

    proxy.before["issue_mount_credential"] = wait
    async with stack.client() as alice, agent(stack) as node:
        renewing = asyncio.create_task(node.renew_grant("s1", "data"))
        await asyncio.wait_for(started.wait(), 5)
        await alice.delete_session("s1")
        go_on.set()
        with pytest.raises(Conflict, match="ended while its grant was renewed"):
            await renewing
    assert proxy.issued == {}


@proxy_is_down
async def test_a_renewal_that_fails_leaves_the_session_as_it_was(stack: Stack, proxy: FakeProxy) -> None:
    def down() -> None:
        raise ServiceUnavailable("The storage proxy does not answer.")

    async with stack.client() as alice, agent(stack) as node:
        proxy.before["issue_mount_credential"] = down
        with pytest.raises(ServiceUnavailable):
            await node.renew_grant("s1", "data")
        proxy.before.clear()
        assert (await alice.session("s1")).state is SessionState.ACTIVE
        assert terms(stack, await node.renew_grant("s1", "data"))[0]["credential_id"] == "cred-1"


async def test_a_session_of_an_earlier_version_is_named_as_such(stack: Stack) -> None:
    async with stack.db.session() as session:
        await session.execute(update(SessionMountRow).values(uid=None, gid=None, umask=None))
    async with agent(stack) as node:
        with pytest.raises(Conflict, match="earlier version"):
            await node.renew_grant("s1", "data")


async def test_renewals_are_in_the_log(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with agent(stack) as node:
        await node.renew_grant("s1", "data")
    told = [record.getMessage() for record in caplog.records if "grant renewed" in record.getMessage()]
    assert len(told) == 1
    for text in ("s1", AGENT_ID, "agent node-1", "cred-1"):
        assert text in told[0]
    assert "scoped-secret" not in caplog.text


async def test_a_mount_outlives_its_first_key(tmp_path: Path, stand: ProxyStand) -> None:
    """Manager extension, storage proxy and S3 server as they are: an old key is replaced, and goes with the session."""
    async with (
        ProxyClient(stand.manager_url, Secret(stand.secret)) as proxy,
        running(tmp_path, proxy, f"sqlite:///{tmp_path / 'm.db'}") as stack,
        stack.client() as alice,
        agent(stack) as node,
    ):
        await stack.register_agent()
        await alice.create_folder("data", "minio")
        plan = await alice.create_session(AGENT_ID, [MountAsked(folder="data", target="/data")], session_id="s1")
        permitted, first = terms(stack, plan.mounts[0])
        same, key = terms(stack, await node.renew_grant("s1", "data"))
        assert (same, key) == (permitted, first), "nothing to renew yet"
        async with stack.db.session() as session:
            credential_id = (await session.scalars(select(SessionMountRow.credential_id))).one()
        assert credential_id is not None
        await shift(stand, credential_id, created_at=timedelta(days=6), expires_at=timedelta(days=6))
        renewed = await node.renew_grant("s1", "data")
        again, second = terms(stack, renewed)
        assert again == permitted
        assert renewed.credential_expires_at is not None
        assert renewed.credential_expires_at > datetime.now(UTC) + timedelta(days=6)
        place = stack.open_grant(renewed.grant)[1].location
        for key in (first, second):
            async with S3Client(Endpoint(place.endpoint), key) as holder:
                await holder.list_page(place.bucket, place.prefix)
        await alice.delete_session("s1")
        for key in (first, second):
            async with S3Client(Endpoint(place.endpoint), key) as holder:
                with pytest.raises(MooringError):
                    await holder.list_page(place.bucket, place.prefix)
