"""Folders for a whole node: closed unless the operator opened a volume to an agent, granted to that agent alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from storage_proxy.client.manager import FolderKind, MountAsked
from storage_proxy.core.crypto import SealingKey
from storage_proxy.core.errors import (
    Forbidden,
    IntegrityError,
    InUse,
    InvalidRequest,
    RecordNotFound,
    ServiceUnavailable,
    VFolderNotFound,
)
from storage_proxy.core.ids import AccessMode, VFolderID
from storage_proxy.core.secrets import Secret
from tests.fakes.fake_proxy import FakeProxy

from .manager_stack import ADMIN, AGENT_ID, ALICE, BOB, Stack, running

KEY, SECRET = "AKIDEXAMPLE12345", "the-secret-of-the-bucket-owner-0123456789"
OPEN = {"node-wide": {"minio": {"agents": [AGENT_ID], "uid": 1000, "gid": 100, "umask": 0o027}}}

pytestmark = pytest.mark.asyncio


@pytest.fixture
def proxy() -> FakeProxy:
    fake = FakeProxy()
    fake.known_keys[KEY] = SECRET
    fake.buckets.add("datasets")
    return fake


@pytest_asyncio.fixture
async def stack(tmp_path: Path, proxy: FakeProxy, any_database_url: str) -> AsyncIterator[Stack]:
    """Alice has a managed folder `data` and a read-only bound one `set`; volume `minio` is open to the agent."""
    async with running(tmp_path, proxy, any_database_url, settings=OPEN) as running_stack:
        await running_stack.register_agent()
        async with running_stack.client() as alice:
            await alice.create_folder("data", "minio")
            await alice.bind_folder(
                "set", "minio", "datasets", read_only=True, access_key=KEY, secret_key=Secret(SECRET), uid=2000
            )
        yield running_stack


async def vfid_of(stack: Stack, name: str) -> VFolderID:
    async with stack.client() as alice:
        return VFolderID.parse((await alice.folder(name)).vfid)


async def test_an_agent_gets_what_its_path_names(stack: Stack, proxy: FakeProxy) -> None:
    data, bound = await vfid_of(stack, "data"), await vfid_of(stack, "set")
    async with stack.client(AGENT_ID, "agent") as agent:
        given = await agent.grant_node_folder(AGENT_ID, "minio", data.scope.hex, data.hex)
        session, permitted, keys = stack.open_grant(given.grant)
        assert (session, permitted.vfid, given.mode) == (given.session_id, str(data), AccessMode.READ_WRITE)
        owner = permitted.ownership
        assert (owner.uid, owner.gid, owner.umask) == (1000, 100, 0o027), "what the operator configured"
        assert keys.secret_key
        given = await agent.grant_node_folder(AGENT_ID, "local:minio", bound.scope.hex, bound.hex)
        _, permitted, keys = stack.open_grant(given.grant)
        assert (given.mode, permitted.mode) == (AccessMode.READ_ONLY, AccessMode.READ_ONLY)
        assert permitted.ownership.uid == 2000, "the binding fixed it"
        assert (permitted.location.bucket, keys.access_key) == ("datasets", KEY)
    with pytest.raises(IntegrityError):  # sealed to that agent
        SealingKey.generate().open(permitted.sealed_credential, permitted.credential_id)
    assert SECRET not in "".join(stack.answers)


@pytest.mark.semantics(9)
async def test_nothing_is_open_that_is_not_named(stack: Stack, tmp_path: Path, proxy: FakeProxy) -> None:
    data = await vfid_of(stack, "data")
    place = (data.scope.hex, data.hex)
    async with stack.client("node-2", "agent") as other:
        await other.register_agent("node-2", stack.agent_key.public)
        with pytest.raises(Forbidden, match="not open"):
            await other.grant_node_folder("node-2", "minio", *place)
        with pytest.raises(Forbidden, match="not for agent"):  # in the name of the agent that may
            await other.grant_node_folder(AGENT_ID, "minio", *place)
    async with stack.client(AGENT_ID, "agent") as agent:
        for volume in ("other", "local:other", "nowhere:minio"):
            with pytest.raises(Forbidden, match="not open"):
                await agent.grant_node_folder(AGENT_ID, volume, *place)
    async with stack.client() as alice:  # a user may not either, though the folder is hers
        with pytest.raises(Forbidden):
            await alice.grant_node_folder(AGENT_ID, "minio", *place)
    (tmp_path / "closed").mkdir()
    async with running(tmp_path / "closed", proxy, f"sqlite:///{tmp_path}/closed.db") as closed:
        await closed.register_agent()
        async with closed.client(AGENT_ID, "agent") as agent:
            with pytest.raises(Forbidden, match="not open"):
                await agent.grant_node_folder(AGENT_ID, "minio", *place)


async def test_an_agent_that_somebody_else_registered_is_not_its(stack: Stack) -> None:
    """A token for many agents (its subject is a UUID) speaks for those that it registered."""
    data = await vfid_of(stack, "data")
    async with stack.client(BOB, "agent") as fleet:
        with pytest.raises(Forbidden, match="not for agent"):
            await fleet.grant_node_folder(AGENT_ID, "minio", data.scope.hex, data.hex)
    async with stack.client(ADMIN, "admin") as admin:
        assert await admin.grant_node_folder(AGENT_ID, "minio", data.scope.hex, data.hex)


async def test_what_does_not_exist_is_not_found(stack: Stack) -> None:
    data = await vfid_of(stack, "data")
    nobody = VFolderID.new(data.scope)
    async with stack.client(AGENT_ID, "agent") as agent:
        with pytest.raises(VFolderNotFound):
            await agent.grant_node_folder(AGENT_ID, "minio", data.scope.hex, nobody.hex)
        with pytest.raises(VFolderNotFound):  # the folder is there, but not at this path
            await agent.grant_node_folder(AGENT_ID, "minio", nobody.hex, data.hex)
    token = stack.token(AGENT_ID, "agent")
    for scope, folder in ((data.scope.hex, ".."), (data.scope.hex, data.hex.upper() + "g"), ("", data.hex)):
        body = {"volume": "minio", "scope": scope, "folder": folder}
        status, _ = await stack.call("POST", f"/v1/agents/{AGENT_ID}/folders", body, token=token)
        assert status == 400


async def test_a_new_grant_ends_the_former_one(stack: Stack, proxy: FakeProxy) -> None:
    data = await vfid_of(stack, "data")
    async with stack.client(AGENT_ID, "agent") as agent, stack.client(ADMIN, "admin") as admin:
        first = await agent.grant_node_folder(AGENT_ID, "minio", data.scope.hex, data.hex)
        second = await agent.grant_node_folder(AGENT_ID, "minio", data.scope.hex, data.hex)
        assert first.session_id != second.session_id
        with pytest.raises(RecordNotFound):
            await admin.session(first.session_id)
        held = [item async for item in agent.node_folders(AGENT_ID)]
        assert [(item.session_id, item.vfid) for item in held] == [(second.session_id, str(data))]
        async with stack.client("node-2", "agent") as other:
            with pytest.raises(Forbidden):
                [item async for item in other.node_folders(AGENT_ID)]
        assert (await admin.session(second.session_id)).agent_id == AGENT_ID
        assert len(proxy.revoked) == 1, "the keys of the first one"


async def test_the_end_revokes_and_frees_the_folder(stack: Stack, proxy: FakeProxy) -> None:
    data = await vfid_of(stack, "data")
    async with stack.client(AGENT_ID, "agent") as agent, stack.client() as alice:
        given = await agent.grant_node_folder(AGENT_ID, "minio", data.scope.hex, data.hex)
        with pytest.raises(InUse):
            await alice.delete_folder("data")
        async with stack.client("node-2", "agent") as other:
            await other.register_agent("node-2", stack.agent_key.public)
            await other.end_node_folder("node-2", given.session_id)  # not its own: nothing happens
            with pytest.raises(Forbidden):
                await other.end_node_folder(AGENT_ID, given.session_id)
        assert proxy.revoked == []
        for _ in range(2):
            await agent.end_node_folder(AGENT_ID, given.session_id)
        assert len(proxy.revoked) == 1
        assert (await alice.folder("data")).kind is FolderKind.MANAGED
        await alice.delete_folder("data")


async def test_sessions_of_users_are_out_of_reach(stack: Stack) -> None:
    """An agent ends what was given to the node, not the sessions that users planned on it."""
    async with stack.client() as alice:
        plan = await alice.create_session(AGENT_ID, [MountAsked(folder="data", target="/data")])
        async with stack.client(AGENT_ID, "agent") as agent:
            await agent.end_node_folder(AGENT_ID, plan.session_id)
        assert (await alice.session(plan.session_id)).session_id == plan.session_id
        with pytest.raises(InvalidRequest, match="reserved"):
            await alice.create_session(
                AGENT_ID, [MountAsked(folder="data", target="/data")], session_id="node-wide-mine"
            )


@pytest.mark.expects_log("The storage proxy does not answer")
async def test_a_proxy_that_is_down_gives_nothing_and_leaves_nothing(stack: Stack, proxy: FakeProxy) -> None:
    data = await vfid_of(stack, "data")

    def down() -> None:
        raise ServiceUnavailable("The storage proxy does not answer.")

    proxy.before["issue_mount_credential"] = down
    async with stack.client(AGENT_ID, "agent") as agent, stack.client() as alice:
        with pytest.raises(ServiceUnavailable):
            await agent.grant_node_folder(AGENT_ID, "minio", data.scope.hex, data.hex)
        await alice.delete_folder("data")  # nothing holds it
    assert ALICE in str(data)
