"""Credentials that end under a mount: renewed without a gap, told when they cannot be, never shown as empty folders."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy import select

from agent_plugin.attachments import Attachments
from agent_plugin.config import AgentConfig, ManagerSection
from agent_plugin.events import EventKind
from agent_plugin.journal import AttachmentRecord, Step
from agent_plugin.main import Agent, running
from storage_proxy.cli.session import attach_planned
from storage_proxy.client import ProxyClient
from storage_proxy.client.agent import AgentClient
from storage_proxy.client.manager import MountAsked, PlannedMount
from storage_proxy.core.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    S3BadCredential,
    S3Error,
    ServiceUnavailable,
    TokenExpired,
)
from storage_proxy.core.ids import AccessMode, BucketRef, VFolderID
from storage_proxy.core.secrets import Secret
from storage_proxy.core.tokens import Purpose, SigningKey, TokenSigner
from storage_proxy.core.wire import MountRequest, MountState, S3Credential
from storage_proxy.s3 import S3Client
from storage_proxy.s3.scoped import POLICY_NAME, ScopedIssuer, policy_for
from storage_proxy.state import MountCredential
from tests.conftest import S3Server
from tests.t3_api import manager_stack, proxy_stand
from tests.t3_api.test_proxy_credentials import shift

from .crashing_agent import arm
from .node import AGENT_ID, AgentProcess, Node, until, until_async

pytestmark = [pytest.mark.root, pytest.mark.asyncio]

TEXT = "hello from data/"


# --- what the tests use -----------------------------------------------------------------------------------------------


@dataclass
class Keys:
    """Keys limited to `data/` of the bucket, made and revoked at the real server."""

    issuer: ScopedIssuer
    bucket: str
    refs: dict[str, str] = field(default_factory=dict)

    async def new(self, lifetime: float | None = None) -> S3Credential:
        """`lifetime` in seconds from now: what the credential says of itself; the server knows no end."""
        made = await self.issuer.issue(BucketRef(self.bucket, "data/"), AccessMode.READ_WRITE, None, "t4-renewal")
        assert made.revoke_ref is not None
        self.refs[made.credential.access_key] = made.revoke_ref
        ends = None if lifetime is None else datetime.now(UTC) + timedelta(seconds=lifetime)
        return made.credential.model_copy(update={"expires_at": ends})

    async def revoke(self, key: S3Credential) -> None:
        """Returns when the server refuses it."""
        await self.issuer.revoke(self.refs.pop(key.access_key))

        async def refused() -> bool:
            async with S3Client(self.issuer._endpoint, key) as client:
                try:
                    await client.list_page(self.bucket, "data/", max_keys=1)
                except S3BadCredential:
                    return True
                return False

        await until_async(refused, "the server refuses the key")


@pytest_asyncio.fixture
async def keys(s3_server: S3Server, folder: str) -> AsyncIterator[Keys]:
    async with ScopedIssuer(s3_server.endpoint, s3_server.admin) as issuer:
        made = Keys(issuer, folder)
        yield made
        for ref in made.refs.values():
            await issuer.revoke(ref)


class Work:
    """One session with `data/` on a node, and fresh grants for it."""

    def __init__(self, node: Node, bucket: str, session: str = "s1") -> None:
        self.node, self.bucket, self.session = node, bucket, session
        self.vfid = VFolderID.parse(node.request(bucket).vfid)

    def request(self, key: S3Credential, **changes: object) -> MountRequest:
        values = {"vfid": str(self.vfid), "credential_id": "limited", "credential": key, **changes}
        return self.node.request(self.bucket, "data/", **values)

    def grant(self, key: S3Credential, **changes: object) -> str:
        return self.node.grant(self.request(key, **changes), self.session)

    def planned(self, key: S3Credential) -> PlannedMount:
        """As a manager extension answers."""
        return PlannedMount(
            folder_id=self.vfid.hex,
            name="data",
            vfid=str(self.vfid),
            target="/data",
            mode=AccessMode.READ_WRITE,
            grant=self.grant(key),
            expires_at=datetime.now(UTC) + timedelta(minutes=5),
            credential_expires_at=key.expires_at,
        )


# A process in a mount namespace of its own that mounts are propagated to, like a container: opens, reads and closes
# every file of a directory again and again, counts the rounds in a file, and tells what it saw as JSON in the end.
_READER = """
import json, os, select, sys
(folder, progress), rounds, bad, seen = sys.argv[1:], 0, [], set()
while not select.select([sys.stdin], [], [], 0.01)[0]:
    rounds += 1
    open(progress, "w").write(str(rounds))
    try:
        for name in os.listdir(folder):
            with open(os.path.join(folder, name)) as file:
                seen.add(file.read())
            if os.path.exists(os.path.join(folder, f"absent-{rounds}")):
                bad.append([rounds, "an absent file is there"])
    except OSError as err:
        bad.append([rounds, repr(err)])
print(json.dumps({"rounds": rounds, "bad": bad, "seen": sorted(seen)}))
"""


class Reader:
    """What such a process tells."""

    def __init__(self, process: asyncio.subprocess.Process, progress: Path) -> None:
        self._process = process
        self._progress = progress
        self.bad: list[object] = []
        self.seen: list[str] = []
        self.rounds = 0

    async def pass_by(self) -> None:
        """Until it has begun two more rounds: then nothing is open there that is open now."""

        def count() -> int:
            return int(self._progress.read_text() or 0) if self._progress.exists() else 0

        before = count()
        await until(lambda: count() >= before + 2, "the reader goes on", 30.0)

    async def finish(self) -> None:
        output, _ = await asyncio.wait_for(self._process.communicate(b""), 30)
        told = json.loads(output)
        self.bad, self.seen, self.rounds = told["bad"], told["seen"], told["rounds"]


@asynccontextmanager
async def reader(source: str, progress: Path) -> AsyncIterator[Reader]:
    """Reads below `source` while the block runs; afterwards it holds rounds, bad and seen."""
    process = await asyncio.create_subprocess_exec(
        *("unshare", "--mount", "--propagation", "slave", sys.executable, "-c", _READER, source, progress),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    found = Reader(process, progress)
    try:
        yield found
        await found.finish()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def read(source: str, name: str = "hello.txt") -> str:
    return (Path(source) / name).read_text()


def ends(attachments: Attachments) -> datetime | None:
    """When the credential of the only mount ends, as the agent knows it."""
    ((record, _),) = attachments.mounts()
    return None if record.credential_expires is None else datetime.fromtimestamp(record.credential_expires, UTC)


def _a_new_key_lives_longer(attachments: Attachments) -> bool:
    """A key of a minute that is made now ends noticeably later than the one in use."""
    end = ends(attachments)
    return end is not None and datetime.now(UTC) + timedelta(seconds=59) > end


async def off(call: Callable[[], str]) -> str:
    """In a thread: what a mount does must not stop the agent, which runs in this loop."""
    return await asyncio.wait_for(asyncio.to_thread(call), 30)


# --- the whole way ----------------------------------------------------------------------------------------------------


@dataclass
class Cluster:
    """A manager extension before a real storage proxy, and an agent that asks it."""

    manager: manager_stack.Stack
    proxy: proxy_stand.ProxyStand
    config: AgentConfig
    grant_key: Path

    async def registered(self) -> None:
        """Until the agent has told the manager extension its key."""
        async with self.manager.client(manager_stack.ADMIN, "admin") as admin:

            async def known() -> bool:
                return bool((await admin.agents_page()).items)

            await until_async(known, "the agent is registered")


@pytest_asyncio.fixture
async def cluster(s3_server: S3Server, s3: S3Client, bucket: str, tmp_path: Path, node: Node) -> AsyncIterator[Cluster]:
    """Keys of mounts live for a minute here."""
    config, secrets = proxy_stand.proxy_config(
        tmp_path / "proxy",
        endpoint=s3_server.endpoint.url,
        bucket=bucket,
        credential=s3_server.admin,
        section={"mount-credential-lifetime": 60},
    )
    async with (
        proxy_stand.running(config, secrets, s3, bucket) as stand,
        ProxyClient(stand.manager_url, Secret(stand.secret)) as proxy,
        manager_stack.running(tmp_path, proxy, f"sqlite:///{tmp_path / 'm.db'}") as stack,
    ):
        shutil.copy(tmp_path / "state" / "grant.pub", node.place / "grant.pub")
        token = node.place / "agent.token"
        token.touch(mode=0o600)
        token.write_text(stack.token(AGENT_ID, "agent"))
        section = ManagerSection.model_validate({"url": stack.url, "token-file": str(token)})
        config_of_agent = node.config().model_copy(update={"manager": section})
        yield Cluster(stack, stand, config_of_agent, tmp_path / "state" / "grant.pem")


@pytest.mark.semantics(17)
@pytest.mark.expects_log("a mount process does not serve")  # for a moment, where the machine is busy
async def test_three_renewals_without_a_failed_open(cluster: Cluster, node: Node) -> None:
    """Keys are made, replaced and revoked by the storage proxy; the session's container notices nothing."""
    credentials = cluster.proxy.proxy.services.credentials
    async with (
        cluster.manager.client() as alice,
        running(cluster.config) as agent,
        agent.server,
        AgentClient(node.socket) as client,
    ):
        await cluster.registered()
        folder = await alice.create_folder("data", "minio")
        for number in range(3):
            await cluster.proxy.s3.put(
                cluster.proxy.bucket, f"{cluster.proxy.prefix(folder.vfid)}{number}.txt", b"text"
            )
        plan = await alice.create_session(AGENT_ID, [MountAsked(folder="data", target="/data")], session_id="s1")
        bind = await client.attach(plan.mounts[0].grant)
        jump, renewed = 0.0, asyncio.Event()
        agent.attachments.listen(lambda event: renewed.set() if event.kind is EventKind.RENEWED else None)
        agent.renewals._wall, agent.renewals._look = lambda: time.time() + jump, 0.05
        agent.renewals._wake.set()
        async with reader(bind.source, node.place / "rounds") as told:
            for _ in range(3):
                await until(lambda: _a_new_key_lives_longer(agent.attachments), "time passes")
                async with cluster.proxy.proxy.database.session() as session:
                    current = (await session.scalars(select(MountCredential))).one()
                await shift(
                    cluster.proxy, current.id, created_at=timedelta(seconds=50), expires_at=timedelta(seconds=50)
                )
                jump = 56.0  # the agent thinks so too
                await asyncio.wait_for(renewed.wait(), 30)
                renewed.clear()
                await told.pass_by()
                jump = 0.0
                async with cluster.proxy.proxy.database.session() as session:
                    retired = (
                        await session.scalars(select(MountCredential).where(MountCredential.former_of.is_not(None)))
                    ).one()
                await shift(cluster.proxy, retired.id, expires_at=timedelta(seconds=60))
                assert await credentials.sweep() == 1
                assert await off(lambda: read(bind.source, "1.txt")) == "text"
            assert len(await credentials._issuers["minio"].identities()) == 1
        assert told.bad == []
        assert told.seen == ["text"]
        assert told.rounds > 30
        assert (await client.status()).warnings == []
        await client.detach_session("s1")
        await alice.delete_session("s1")
        assert await credentials._issuers["minio"].identities() == []
    assert node.residue() == {}


@pytest.mark.expects_log("token expired")
async def test_a_grant_that_expired_before_its_attach_is_asked_for_again(cluster: Cluster, node: Node) -> None:
    """As `mooring session run` does when the mounts before this one took too long."""
    async with (
        cluster.manager.client() as alice,
        running(cluster.config) as agent,
        agent.server,
        AgentClient(node.socket) as client,
    ):
        await cluster.registered()
        await alice.create_folder("data", "minio")
        plan = await alice.create_session(AGENT_ID, [MountAsked(folder="data", target="/data")], session_id="s1")
        signer = TokenSigner(f"agent:{AGENT_ID}", [SigningKey.ed25519_load_or_create(cluster.grant_key)])
        late = signer.issue(Purpose.GRANT, "s1", timedelta(seconds=-120), {})
        with pytest.raises(TokenExpired):
            await client.attach(late)
        mount = plan.mounts[0].model_copy(update={"grant": late})
        bind = await attach_planned(alice, client, "s1", mount)
        assert bind.target == "/data"
        await client.detach_session("s1")
        await alice.delete_session("s1")
    assert node.residue() == {}


# --- what a renewal does to files -------------------------------------------------------------------------------------


@pytest.mark.semantics(17)
async def test_open_files_go_on_and_the_old_key_may_end(node: Node, keys: Keys, s3: S3Client) -> None:
    work, first = Work(node, keys.bucket), await keys.new(3600)
    await s3.put(keys.bucket, "data/later.txt", b"not looked at before")
    async with node.agent() as client:
        bind = await client.attach(work.grant(first))
        (old,) = node.processes()
        held = await asyncio.to_thread(os.open, Path(bind.source) / "hello.txt", os.O_RDONLY)
        try:
            second = await keys.new(7200)
            answer = await client.renew(work.session, str(work.vfid), work.grant(second))
            assert answer.mount_key == bind.mount_key
            assert answer.credential_expires_at == second.expires_at
            (mount,) = await client.mounts()
            assert mount.pid not in (None, old)
            assert await off(lambda: os.pread(held, 100, 0).decode()) == TEXT
            assert sorted(node.processes()) == sorted([old, mount.pid])
            await keys.revoke(first)
            assert await off(lambda: read(bind.source, "later.txt")) == "not looked at before"
        finally:
            os.close(held)
        await client.detach_session(work.session)
        await until(lambda: node.processes() == [], "both processes have ended")
    assert node.residue() == {}


async def test_every_session_of_the_mount_gets_the_new_key(node: Node, keys: Keys) -> None:
    one, first = Work(node, keys.bucket), await keys.new(3600)
    two = Work(node, keys.bucket, "s2")
    two.vfid = one.vfid
    async with node.agent() as client:
        binds = [await client.attach(work.grant(first)) for work in (one, two)]
        await client.renew("s2", str(two.vfid), two.grant(await keys.new(7200)))
        await keys.revoke(first)
        for bind in binds:
            assert await off(lambda bind=bind: read(bind.source)) == TEXT  # type: ignore[misc]
        await client.detach_session("s1")
        assert await off(lambda: read(binds[1].source)) == TEXT
        await client.detach_session("s2")
    assert node.residue() == {}


@pytest.mark.expects_log("does not accept this credential")
async def test_grants_that_renew_nothing(node: Node, keys: Keys) -> None:
    work, first = Work(node, keys.bucket), await keys.new(3600)
    second = await keys.new(7200)
    async with node.agent() as client:
        bind = await client.attach(work.grant(first))
        (pid,) = node.processes()
        other = Work(node, keys.bucket, "s2")
        with pytest.raises(InvalidRequest, match="another session"):
            await client.renew(work.session, str(work.vfid), other.grant(second))
        with pytest.raises(NotFound):
            await client.renew("s2", str(other.vfid), other.grant(second))
        with pytest.raises(Conflict, match="other terms"):
            await client.renew(work.session, str(work.vfid), work.grant(second, credential_id="another"))
        await keys.revoke(second)
        with pytest.raises(S3Error):
            await client.renew(work.session, str(work.vfid), work.grant(second))
        assert node.processes() == [pid]
        assert await off(lambda: read(bind.source)) == TEXT
        await client.detach_session(work.session)
    assert node.residue() == {}


# --- when it fails ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def asking(
    node: Node, source: Callable[[], PlannedMount], *, wall: Callable[[], float] = time.time, **settings: object
) -> AsyncIterator[tuple[AgentClient, Agent]]:
    """An agent with another source of grants than a manager extension, and another clock."""

    async def ask(_: AttachmentRecord) -> PlannedMount:
        return source()

    config = node.config(**settings)
    async with running(config) as agent, agent.server, AgentClient(node.socket) as client:
        agent.renewals._source, agent.renewals._wall, agent.renewals._look = ask, wall, 0.05
        yield client, agent


@pytest.mark.expects_log("credential not renewed")
async def test_a_manager_that_is_away_is_asked_again(node: Node, keys: Keys) -> None:
    work, calls = Work(node, keys.bucket), 0
    second = await keys.new(3600)

    def source() -> PlannedMount:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ServiceUnavailable("The manager extension does not answer.")
        return work.planned(second)

    async with asking(node, source) as (client, agent):
        bind = await client.attach(work.grant(await keys.new(4)))

        async def warnings() -> str:
            return " ".join((await client.status()).warnings)

        async def warned() -> bool:
            return "which ends in" in await warnings()

        await until_async(warned, "it is a warning")
        assert "does not answer" in await warnings()
        await until(lambda: ends(agent.attachments) == second.expires_at, "it is renewed")

        async def well() -> bool:
            return await warnings() == ""

        await until_async(well, "the warning is gone")
        assert await off(lambda: read(bind.source)) == TEXT
        await client.detach_session(work.session)
    assert node.residue() == {}


async def test_a_clock_that_jumps_is_noticed(node: Node, keys: Keys) -> None:
    """As after a sleep of the machine: the time is over or almost, whatever was waited for."""
    work, jump, asked = Work(node, keys.bucket), 0.0, asyncio.Event()
    fresh = await keys.new(7200)

    def source() -> PlannedMount:
        asked.set()
        return work.planned(fresh)

    async with asking(node, source, wall=lambda: time.time() + jump) as (client, agent):
        await client.attach(work.grant(await keys.new(3600)))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asked.wait(), 0.3)
        jump = 3590.0
        await asyncio.wait_for(asked.wait(), 15)
        await until(lambda: ends(agent.attachments) == fresh.expires_at, "it is renewed")
        await client.detach_session(work.session)


async def test_a_key_that_is_revoked_early_is_replaced(node: Node, keys: Keys) -> None:
    """The watchdog sees that S3 refuses it; there is another one, so the mount lives on."""
    work, first = Work(node, keys.bucket), await keys.new()
    fresh = await keys.new()
    async with asking(node, lambda: work.planned(fresh), s3_check_interval=1.0) as (client, agent):
        bind = await client.attach(work.grant(first))
        (pid,) = node.processes()
        await keys.revoke(first)

        async def reads() -> bool:
            return await off(lambda: read(bind.source)) == TEXT

        await until_async(reads, "it reads with the other key", 30.0)
        ((record, _),) = agent.attachments.mounts()
        assert record.process is not None
        assert record.process.pid != pid
        assert record.repairs == 0, "the mount did not die"
        await client.detach_session(work.session)
    assert node.residue() == {}


@pytest.mark.expects_log("credential not renewed")
@pytest.mark.expects_log("giving up a mount")
@pytest.mark.expects_log("a mount could not be repaired yet")
async def test_a_refused_key_without_another_comes_back_with_s3(
    node: Node, keys: Keys, s3: S3Client, s3_server: S3Server
) -> None:
    """A policy that was changed and put back: the mount was given up meanwhile, and returns by itself."""
    work, first = Work(node, keys.bucket), await keys.new()
    user = keys.refs[first.access_key].removeprefix("iam:")
    policy = json.dumps(policy_for(BucketRef(keys.bucket, "data/"), AccessMode.READ_WRITE))
    nothing = json.dumps(policy_for(BucketRef(keys.bucket, "elsewhere/"), AccessMode.READ_ONLY, bucket_check=False))

    async def permit(document: str) -> None:
        values = {"UserName": user, "PolicyName": POLICY_NAME, "PolicyDocument": document}
        await keys.issuer._call("iam", "PutUserPolicy", values)

    async with node.agent(s3_check_interval=1.0, repair_attempts=2) as client:
        bind = await client.attach(work.grant(first))
        await permit(nothing)

        async def is_in(*states: MountState) -> bool:
            (mount,) = await client.mounts()
            return mount.state in states

        await until_async(lambda: is_in(MountState.DEAD, MountState.FAILED), "it is given up", 30.0)
        await permit(policy)
        await until_async(lambda: is_in(MountState.LIVE), "it is back", 40.0)
        assert await off(lambda: read(bind.source)) == TEXT
        await client.detach_session(work.session)
    await until(lambda: node.residue() == {}, "nothing is left")


@pytest.mark.expects_log("credential not renewed")
@pytest.mark.expects_log("giving up a mount")
@pytest.mark.expects_log("a mount could not be repaired yet")
@pytest.mark.semantics(19)
async def test_an_end_without_a_renewal_is_an_error_and_not_an_empty_folder(node: Node, keys: Keys) -> None:
    work, first = Work(node, keys.bucket), await keys.new(3)
    async with node.agent() as client:
        bind = await client.attach(work.grant(first))
        assert await off(lambda: read(bind.source)) == TEXT

        async def warned() -> bool:
            return any("no manager extension to ask" in text for text in (await client.status()).warnings)

        await until_async(warned, "the operator is told before the end")
        (mount,) = await client.mounts()
        assert mount.state is MountState.LIVE
        await keys.revoke(first)

        async def given_up() -> bool:
            (mount,) = await client.mounts()
            return mount.state in (MountState.DEAD, MountState.FAILED)

        await until_async(given_up, "the mount is given up", 20.0)

        def opened() -> str:
            try:
                return read(bind.source)
            except OSError as err:
                return errno.errorcode[err.errno or 0]

        assert await off(opened) in ("ENOTCONN", "ECONNABORTED", "EIO")

        async def explained() -> bool:
            warnings = " ".join((await client.status()).warnings)
            return "does not accept this credential" in warnings and "which ended" in warnings

        await until_async(explained, "the status says why")

        await client.renew(work.session, str(work.vfid), work.grant(await keys.new(3600)))
        assert await off(lambda: read(bind.source)) == TEXT
        (mount,) = await client.mounts()
        assert mount.state is MountState.LIVE
        assert (await client.status()).warnings == []
        await client.detach_session(work.session)
        await until(lambda: node.residue() == {}, "nothing is left")


# --- killed in the middle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [Step.RENEW_STARTED, Step.RENEW_PLACE])
async def test_an_agent_killed_in_a_renewal(node: Node, keys: Keys, step: Step) -> None:
    """Every step is in the crash matrix; here the keys count: whichever is in use then can be renewed and revoked."""
    work, first, second = Work(node, keys.bucket), await keys.new(3600), await keys.new(7200)
    agent = AgentProcess(node, "tests.t4_agent.crashing_agent", stop_mounts_on_exit=False)
    try:
        async with await agent.start() as client:
            bind = await client.attach(work.grant(first))
            arm(agent.config, step, "after")
            with pytest.raises(ServiceUnavailable):
                await client.renew(work.session, str(work.vfid), work.grant(second))
        await agent.wait()
        assert await off(lambda: read(bind.source)) == TEXT, "while there is no agent"
        async with await agent.start() as client:
            assert await off(lambda: read(bind.source)) == TEXT
            await client.renew(work.session, str(work.vfid), work.grant(await keys.new(7200)))
            await keys.revoke(first)
            await keys.revoke(second)
            assert await off(lambda: read(bind.source)) == TEXT
            assert [path.name for path in node.credentials()] == [bind.mount_key]
            await client.detach_session(work.session)
            await until(lambda: node.residue() == {}, "nothing is left")
    finally:
        await agent.close()
