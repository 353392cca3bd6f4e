"""The API on its socket: who gets in, what it answers."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from agent_plugin.peers import LOCAL, peer_authenticator
from storage_proxy.client.agent import AgentClient
from storage_proxy.core.errors import InvalidIdentifier, InvalidRequest, MooringError
from storage_proxy.web import authenticated, edge_middleware, require

from .node import AGENT_ID, Node, new_session

pytestmark = [pytest.mark.root, pytest.mark.asyncio]

_ASK = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
sock.sendall(b"GET /v1/status HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n")
print(sock.recv(65536).decode())
"""
_CONNECT_AS = """
import os, socket, sys
os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
sock.sendall(b"GET /v1/status HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n")
print(sock.recv(65536).decode())
"""


async def ask_as(uid: int, node: Node, text: str = _CONNECT_AS) -> str:
    """Asks for the status as another user; the answer, or the error of the connection."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-c", text, str(node.socket), str(uid)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return output.decode()


async def test_identity_and_status(node: Node) -> None:
    async with node.agent() as agent:
        identity = await agent.identity()
        assert (identity.agent_id, identity.public_key) == (AGENT_ID, node.sealing_key.public)
        status = json.loads(await agent.call("GET", "/v1/status"))
        assert (status["agent_id"], status["status"], status["mounts"]) == (AGENT_ID, "ok", 0)
        (driver,) = status["drivers"]
        assert driver["available"]
        assert driver["name"] == "s3fs"
        assert driver["version"]
        for path in ("/livez", "/readyz", "/health"):
            assert json.loads(await agent.call("GET", path))["status"] == "ok"


async def test_the_socket_is_private(node: Node) -> None:
    async with node.agent():
        assert node.socket.stat().st_mode & 0o777 == 0o600
        assert node.socket.parent.stat().st_mode & 0o777 == 0o700
        assert "PermissionError" in await ask_as(1000, node)


async def test_the_kernel_says_who_is_connected(node: Node) -> None:
    """Also when the directories and the socket let everybody in."""
    async with node.agent():
        for path in (node.place, node.runtime):
            path.chmod(0o711)
        node.socket.chmod(0o666)
        answer = await ask_as(1000, node)
        assert "403" in answer.splitlines()[0]
        assert "User 1000 may not use this agent" in answer
        assert "200" in (await ask_as(0, node)).splitlines()[0]
    async with node.agent(allowed_uids=(0, 1000)):
        for path in (node.place, node.runtime):
            path.chmod(0o711)
        node.socket.chmod(0o666)
        assert "200" in (await ask_as(1000, node)).splitlines()[0]
        assert "403" in (await ask_as(1001, node)).splitlines()[0]
        assert "200" in (await ask_as(1001, node, _ASK)).splitlines()[0], "the kernel notes who connected"


async def test_over_tcp_nobody_is_known() -> None:
    app = web.Application(middlewares=[edge_middleware, authenticated(peer_authenticator({0}))])
    app.add_routes([web.get("/v1/x", _locals_only)])
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        async with aiohttp.ClientSession() as session, session.get(f"http://{host}:{port}/v1/x") as answer:
            assert answer.status == 401
    finally:
        await runner.cleanup()


@require(LOCAL)
async def _locals_only(_: web.Request) -> web.Response:
    return web.Response()


async def test_wrong_requests(node: Node) -> None:
    async with node.agent() as agent:
        for body in ({}, {"grant": 7}):
            with pytest.raises(InvalidRequest):
                await agent.call("POST", "/v1/attachments", body=body)
        with pytest.raises(InvalidIdentifier):
            await agent.call("DELETE", "/v1/sessions/..%2F..%2Fetc")
        with pytest.raises(InvalidIdentifier):
            await agent.call("DELETE", f"/v1/attachments/{new_session()}/not-hex")
        with pytest.raises(MooringError):
            await agent.call("GET", "/v1/nothing")
        assert await agent.detach_session("never-was") == 0
        assert await agent.gc() == 0


@pytest.mark.semantics(5)
async def test_no_answer_shows_a_secret(node: Node, folder: str) -> None:
    async with node.agent() as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        text = spec.model_dump_json()
        for path in ("/v1/status", "/v1/mounts", "/v1/attachments", "/v1/identity"):
            text += (await agent.call("GET", path)).decode()
        assert node.credential.secret_key.reveal() not in text
        assert node.credential.access_key not in text
        state = b"".join(path.read_bytes() for path in (node.place / "state").glob("journal*"))
        assert node.credential.secret_key.reveal().encode() not in state


async def test_without_an_agent(tmp_path: Path) -> None:
    async with AgentClient(tmp_path / "none.sock") as agent:
        with pytest.raises(MooringError, match="nothing listens there"):
            await agent.status()
