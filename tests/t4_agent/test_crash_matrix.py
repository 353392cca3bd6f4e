"""The agent killed at every step of its journal, before and after the step is on disk, and started again.

One node goes through all of it, while a session on another mount reads all the time. After each restart the caller
repeats what it asked for, and then: attachments are exactly the sessions that live, every mount has one process, one
pool entry, one credential file and one scratch directory, every session one working bind, and nothing else is there.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

from agent_plugin.journal import Step
from agent_plugin.kernel import read_mountinfo, top_at
from storage_proxy.client.agent import AgentClient
from storage_proxy.core.errors import MooringError
from storage_proxy.core.wire import BindSpec, MountRequest, MountState
from storage_proxy.s3 import S3Client
from tests.conftest import S3Server

from .crashing_agent import arm, is_armed
from .node import AgentProcess, Node, new_session, skip_reason, until

pytestmark = [pytest.mark.root, pytest.mark.asyncio(loop_scope="module")]

BUCKET = "t4-matrix"
HELLO = "hello"


@dataclass
class Matrix:
    """The node, the sessions that live on it, and how often its agent was killed."""

    node: Node
    agent: AgentProcess
    client: AgentClient
    live: dict[str, BindSpec] = field(default_factory=dict)
    requests: dict[str, MountRequest] = field(default_factory=dict)
    grants: dict[str, str] = field(default_factory=dict)
    kills: int = 0
    deaths: int = 0  # of mount processes
    others: list[str] = field(default_factory=list)  # what the session on the other mount noticed

    # --- what callers do ----------------------------------------------------------------------------------------------

    async def attach(self, prefix: str = "data", session: str | None = None) -> str:
        """A new session. The same grant is used until it succeeds, as a caller does that lost the connection."""
        session = session or new_session()
        request = self.requests.setdefault(session, self.node.request(BUCKET, prefix))
        grant = self.grants.setdefault(session, self.node.grant(request, session))
        self.live[session] = await self.client.attach(grant)
        return session

    async def detach(self, session: str) -> None:
        self.live.pop(session, None)
        await self.client.detach_session(session)

    async def renew(self, session: str) -> None:
        grant = self.node.grant(self.requests[session], session)
        await self.client.renew(session, self.live[session].vfid, grant)

    async def kill_mount(self) -> None:
        """Kills the process of the mount of `data`, and waits for its repair."""
        mount = await self.mount_of("data")
        assert mount.pid is not None
        self.deaths += 1
        os.kill(mount.pid, signal.SIGKILL)
        await self.repaired(mount.pid)

    async def mount_of(self, prefix: str):  # type: ignore[no-untyped-def]
        return next(mount for mount in await self.client.mounts() if mount.prefix.rstrip("/") == prefix)

    async def repaired(self, former: int) -> None:
        async with asyncio.timeout(20):
            while True:
                mount = await self.mount_of("data")
                if mount.state is MountState.LIVE and mount.pid != former:
                    return
                await asyncio.sleep(0.02)

    # --- the kill -----------------------------------------------------------------------------------------------------

    async def die_during(self, step: Step, moment: str, work: Callable[[], Awaitable[object]]) -> None:
        """Has the agent die at that step of `work`, and starts it again."""
        arm(self.agent.config, step, moment)
        # The caller is cut off, or was served in the last moment; it cannot tell which.
        task = asyncio.ensure_future(work())
        try:
            assert await self.agent.wait() == -signal.SIGKILL
        except TimeoutError:
            raise AssertionError(f"{step} was not reached: {await task}") from None
        assert not is_armed(self.agent.config)
        task.cancel()
        with suppress(MooringError, asyncio.CancelledError):
            await task
        await self.client.close()
        self.kills += 1
        self.client = await self.agent.start()

    # --- what must hold -----------------------------------------------------------------------------------------------

    async def check(self) -> None:
        assert {item.session_id for item in await self.client.attachments()} == set(self.live)
        await until(lambda: self.differences() == {}, f"only what is known is there: {self.differences()}", 20)
        for session, spec in self.live.items():
            assert await self.reads(spec), f"session {session} reads"
        assert self.others == []

    async def reads(self, spec: BindSpec) -> bool:
        process = await asyncio.create_subprocess_exec(
            "cat", f"{spec.source}/{HELLO}", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        async with asyncio.timeout(20):
            output, _ = await process.communicate()
        return output == HELLO.encode()

    def differences(self) -> dict[str, object]:
        """What is there and should not be, or the other way round."""
        node = self.node
        with closing(sqlite3.connect(f"file:{node.place}/state/journal.sqlite?mode=ro", uri=True)) as db:
            rows = db.execute("SELECT key, token, pid, state FROM mounts").fetchall()
            former = dict(db.execute("SELECT token, pid FROM retired").fetchall())
            bound = db.execute("SELECT count(*) FROM attachments WHERE state = 'bound'").fetchone()[0]
        table = read_mountinfo()
        keys = {key: (token, pid, state) for key, token, pid, state in rows}
        # A renewed mount keeps its former process for what is open; a repaired one has none left.
        retired = {token: pid for token, pid in former.items() if pid in node.processes()}
        tokens = sorted([token for token, _, _ in keys.values()] + list(retired))
        tops = {spec.source: top_at(spec.source, table) for spec in self.live.values()}
        pools = {f"{node.runtime}/pool/{key}" for key in keys}
        expected = {
            "states": {"live"} if keys else set(),
            "retired": retired,
            "bound": len(self.live),
            "processes": sorted([pid for _, pid, _ in keys.values()] + list(retired.values())),
            "credentials": sorted(keys),
            "scratch": tokens,
            "logs": tokens,
            "stage": [],
            "pool": pools,
            "binds": set(tops),
            "dead binds": [],
        }
        fuse = [entry.mount_point for entry in table if entry.is_fuse]
        found = {
            "states": {state for _, _, state in keys.values()},
            "retired": former,
            "bound": bound,
            "processes": sorted(node.processes()),
            "credentials": sorted(path.name for path in node.credentials()),
            "scratch": sorted(path.name for path in node.scratch()),
            "logs": sorted(path.name for path in (node.runtime / "log").iterdir()),
            "stage": node.staged(),
            "pool": {place for place in fuse if place.startswith(f"{node.runtime}/pool/")},
            "binds": {place for place in fuse if place.startswith(f"{node.runtime}/ses/")},
            "dead binds": [place for place, top in tops.items() if top is None or not top.is_fuse],
        }
        return {name: (found[name], expected[name]) for name in expected if found[name] != expected[name]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def matrix(s3_server: S3Server) -> AsyncIterator[Matrix]:
    if reason := skip_reason():
        pytest.skip(reason)
    async with S3Client(s3_server.endpoint, s3_server.admin) as s3:
        await s3.create_bucket(BUCKET)
        for prefix in ("data", "other", "third"):
            await s3.put(BUCKET, f"{prefix}/{HELLO}", HELLO.encode())
    node = Node(s3_server.endpoint.url, s3_server.admin)
    agent = AgentProcess(node, "tests.t4_agent.crashing_agent", stop_mounts_on_exit=False, repair_pause=0.2)
    made = Matrix(node, agent, await agent.start())
    try:
        other = await made.attach("other")
        await made.attach("data")
        stop = asyncio.Event()
        reader = asyncio.create_task(_read_all_the_time(made, Path(made.live[other].source) / HELLO, stop))
        yield made
        stop.set()
        await reader
        for session in list(made.live):
            await made.detach(session)
        await until(lambda: node.residue() == {}, f"nothing is left: {node.residue()}", 20)
        print(f"agents killed: {made.kills}, mount processes killed: {made.deaths}")
    finally:
        await made.client.close()
        await agent.close()
        node.destroy()


async def _read_all_the_time(matrix: Matrix, place: Path, stop: asyncio.Event) -> None:
    """The other session: it must not notice anything, whatever happens to the agent."""
    while not stop.is_set():
        try:
            text = await asyncio.to_thread(place.read_text)
        except OSError as err:
            text = str(err)
        if text != HELLO:
            matrix.others.append(text)
        await asyncio.sleep(0.05)


MOMENTS = ("before", "after")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("step", [Step.ATTACH_BEGIN, Step.MOUNT_STARTED, Step.MOUNT_LIVE, Step.ATTACH_BOUND])
async def test_killed_while_a_first_session_attaches(matrix: Matrix, step: Step, moment: str) -> None:
    session = new_session()
    await matrix.die_during(step, moment, lambda: matrix.attach("third", session))
    await matrix.attach("third", session)
    await matrix.check()
    await matrix.detach(session)
    await matrix.check()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("step", [Step.ATTACH_BEGIN, Step.ATTACH_BOUND])
async def test_killed_while_a_further_session_attaches(matrix: Matrix, step: Step, moment: str) -> None:
    session = new_session()
    await matrix.die_during(step, moment, lambda: matrix.attach("data", session))
    await matrix.attach("data", session)
    await matrix.check()
    await matrix.detach(session)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("step", [Step.DETACH_BEGIN, Step.DETACH_DONE, Step.MOUNT_GONE])
async def test_killed_while_the_last_session_detaches(matrix: Matrix, step: Step, moment: str) -> None:
    session = await matrix.attach("third")
    await matrix.die_during(step, moment, lambda: matrix.detach(session))
    await matrix.detach(session)
    await matrix.check()


@pytest.mark.semantics(16)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    "step",
    [Step.MOUNT_DEAD, Step.REPAIR_BEGIN, Step.MOUNT_STARTED, Step.REPAIR_PLACE, Step.REPAIR_LIVE, Step.RETIRED_GONE],
)
async def test_killed_while_a_mount_is_repaired(matrix: Matrix, step: Step, moment: str) -> None:
    await matrix.die_during(step, moment, matrix.kill_mount)
    await matrix.check()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("step", [Step.RENEW_BEGIN, Step.RENEW_STARTED, Step.RENEW_PLACE, Step.RENEW_LIVE])
async def test_killed_while_a_credential_is_renewed(matrix: Matrix, step: Step, moment: str) -> None:
    session = await matrix.attach("data")
    await matrix.die_during(step, moment, lambda: matrix.renew(session))
    await matrix.check()
    await matrix.renew(session)
    await matrix.detach(session)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("step", [Step.DRAIN_BEGIN, Step.DRAIN_END])
async def test_killed_while_draining(matrix: Matrix, step: Step, moment: str) -> None:
    if step is Step.DRAIN_END:
        await matrix.client.drain()
    work = matrix.client.drain if step is Step.DRAIN_BEGIN else matrix.client.resume
    await matrix.die_during(step, moment, work)
    await matrix.check()
    await matrix.client.resume()
    session = await matrix.attach("data")
    await matrix.check()
    await matrix.detach(session)


@pytest.mark.parametrize("moment", MOMENTS)
async def test_killed_while_it_takes_over_what_died_meanwhile(matrix: Matrix, moment: str) -> None:
    mount = await matrix.mount_of("data")
    await matrix.agent.kill()
    os.kill(mount.pid, signal.SIGKILL)
    matrix.deaths += 1
    arm(matrix.agent.config, Step.ADOPT, moment)
    with pytest.raises(AssertionError, match="the agent ended"):
        await matrix.agent.start()
    await matrix.client.close()
    matrix.kills += 2
    matrix.client = await matrix.agent.start()
    await matrix.check()
