"""`mooring agent status` and `mooring mounts …` as an operator calls them, on a real agent."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import pytest

from tests.t6_system.commands import PROGRAM, Done, environment

from .node import Node, until, until_async

pytestmark = [pytest.mark.root, pytest.mark.asyncio]


async def mooring(node: Node, *args: str) -> Done:
    """Runs one command against this node's agent, whose loop is ours."""
    process = await asyncio.create_subprocess_exec(
        *(*PROGRAM, *args),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment({"MOORING_AGENT_SOCKET": str(node.socket)}),
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode is not None
    return Done(process.returncode, out.decode(), err.decode())


async def ok(node: Node, *args: str) -> str:
    done = await mooring(node, *args)
    assert done.code == 0, done
    return done.out


async def parsed(node: Node, *args: str) -> Any:
    return json.loads(await ok(node, *args, "--json"))


async def test_looking(node: Node, folder: str) -> None:
    async with node.agent() as agent:
        assert await ok(node, "mounts", "ls") == "No mounts.\n"
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        listed = await ok(node, "mounts", "ls")
        assert spec.mount_key[:12] in listed
        assert f"s3://{folder}/data/" in listed
        assert (await parsed(node, "mounts", "ls"))[0]["attachments"] == 1
        shown = await ok(node, "mounts", "show", spec.mount_key[:7])
        for text in (spec.mount_key, spec.session_id, spec.source, "live", f"pid {node.processes()[0]}", "minio"):
            assert text in shown
        assert "No container holds it." in shown
        assert len(shown.splitlines()) < 30, "one screen"
        assert max(map(len, shown.splitlines())) < 200
        assert (await parsed(node, "mounts", "show", spec.mount_key))["path"] in shown
        status = await ok(node, "agent", "status")
        assert "1 of at most 500: 1 live" in status
        assert "draining" in status
        assert "not configured: nobody else is told" in status
        wrong = await mooring(node, "mounts", "show", "abc")
        assert (wrong.code, wrong.out) == (2, "")
        assert "is not the key of a mount" in wrong.err


async def test_draining(node: Node, folder: str) -> None:
    async with node.agent() as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        plan = await ok(node, "mounts", "drain", "--dry-run")
        assert "1 mount would refuse new attachments; 1 attachment would be waited for." in plan
        assert spec.session_id in plan
        assert not (await agent.drain_status()).draining, "nothing was done"
        late = await mooring(node, "mounts", "drain", "--wait", "0.3")
        assert (late.code, "1 attachment still there" in late.err) == (9, True)
        assert f"waiting for 1 attachment of {spec.session_id}" in late.err
        assert "yes: the node refuses" in await ok(node, "agent", "status")
        waiting = asyncio.create_task(mooring(node, "mounts", "drain", spec.mount_key[:8], "--wait", "50", "--json"))

        async def begun() -> bool:
            return (await agent.drain_status()).keys == [spec.mount_key]

        await until_async(begun, "it drains", 60)
        await agent.detach_session(spec.session_id)
        done = await waiting
        assert (done.code, done.json()["done"], done.json()["attachments"]) == (0, True, 0)
        assert await ok(node, "mounts", "drain", "--cancel") == "New attachments are taken again.\n"
        assert not (await agent.drain_status()).draining
        assert (await mooring(node, "mounts", "drain", "--cancel", "--dry-run")).code == 2


@pytest.mark.expects_log("giving up a mount")
async def test_repairing_and_collecting(node: Node, folder: str) -> None:
    async with node.agent(grace_period=600.0) as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        assert "was repaired in" in await ok(node, "mounts", "repair", spec.mount_key[:8], "--force")
        assert (await parsed(node, "mounts", "show", spec.mount_key))["repairs"] == 1
        await agent.detach_session(spec.session_id)
        assert (await parsed(node, "mounts", "gc", "--dry-run"))["mounts"] == [spec.mount_key]
        assert node.processes(), "nothing was done"
        assert await ok(node, "mounts", "gc") == "1 mount taken down.\n"
        assert node.residue() == {}


async def test_following(node: Node, folder: str) -> None:
    async with node.agent() as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        process = await asyncio.create_subprocess_exec(
            *(*PROGRAM, "mounts", "events", "--since", "0", "--json"),
            stdout=asyncio.subprocess.PIPE,
            env=environment({"MOORING_AGENT_SOCKET": str(node.socket)}),
        )
        assert process.stdout is not None
        async with asyncio.timeout(60):
            lines = [json.loads(await process.stdout.readline()) for _ in range(2)]
            assert [(line["old"], line["new"]) for line in lines] == [("absent", "staging"), ("staging", "live")]
            await agent.detach_session(spec.session_id)
            assert json.loads(await process.stdout.readline())["new"] == "absent"
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
        text = await asyncio.create_subprocess_exec(
            *(*PROGRAM, "mounts", "events", "--since", "0"),
            stdout=asyncio.subprocess.PIPE,
            env=environment({"MOORING_AGENT_SOCKET": str(node.socket)}),
        )
        assert text.stdout is not None
        async with asyncio.timeout(60):
            line = (await text.stdout.readline()).decode()
        assert f"{spec.mount_key[:12]}  absent -> staging" in line
        assert f"s3://{folder}/data/" in line
    async with asyncio.timeout(60):
        assert await text.wait() == 0, "it ends when the agent stops"
    await until(lambda: not os.path.lexists(node.socket), "the socket is gone")
