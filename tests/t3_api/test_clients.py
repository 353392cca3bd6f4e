"""The typed clients: error answers come back as their classes, waits end, retries are bounded, names stay names."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from storage_proxy.client import AgentClient, HttpService, ManagerClient, ProxyClient, error_from_answer
from storage_proxy.core import errors
from storage_proxy.core.errors import (
    AlreadyExists,
    ConfigError,
    DeadlineExceeded,
    FileNotFound,
    InternalError,
    InvalidIdentifier,
    ReadOnly,
    S3BadCredential,
    ServiceUnavailable,
    VFolderNotFound,
)
from storage_proxy.core.logs import request_id
from storage_proxy.core.secrets import Secret
from storage_proxy.web.errors import problem_answer

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
VFID = "user:3d9f0f0e-7f3a-4b58-9c79-0d0e6b8f6a11/0123456789abcdef0123456789abcdef"


@asynccontextmanager
async def serving(handler: Handler, *, socket: Path | None = None) -> AsyncIterator[str]:
    """A server that gives every request to `handler`; yields its base URL."""
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site: web.BaseSite
        if socket:
            site = web.UnixSite(runner, str(socket))
            await site.start()
            yield "http://agent"
        else:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def closed_port() -> str:
    server = await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("cls", errors.walk(), ids=lambda cls: cls.__name__)
def test_every_error_class_survives_the_wire(cls: type[errors.MooringError]) -> None:
    sent = cls("Folder 'a' did something.", hint="Do this next.", detail={"offset": 7})
    answer = problem_answer(sent, "a" * 16)
    got = error_from_answer(answer.status, answer.text.encode() if answer.text else b"", "test service")
    # Classes that render the same are one thing to a receiver; the deepest of them stands for all.
    assert (got.code, got.problem, got.status, got.exit_code) == (cls.code, cls.problem, cls.status, cls.exit_code)
    assert issubclass(type(got), cls) or issubclass(cls, type(got))
    assert (got.message, got.hint, got.detail) == (sent.message, sent.hint, sent.detail)


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (502, b"<html>Bad gateway</html>", ServiceUnavailable),
        (504, b"", DeadlineExceeded),
        (404, b'{"msg": "no such thing"}', errors.NotFound),
        (400, b'{"msg": "VFolder not found", "vfid": "x"}', errors.UsageError),
        (418, b"[]", errors.UsageError),
        (500, b'{"error_code": 5}', InternalError),
        (302, b"", InternalError),
    ],
)
def test_foreign_answers_are_mapped_by_status(status: int, body: bytes, expected: type[errors.MooringError]) -> None:
    error = error_from_answer(status, body, "storage proxy")
    assert type(error) is expected
    assert error.message


@pytest.mark.asyncio
async def test_bodies_go_out_on_get_and_the_secret_stays_in_its_header() -> None:
    seen: list[tuple[str, str, Any, str | None]] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(
            (request.method, request.path, await request.json(), request.headers.get("X-BackendAI-Storage-Auth-Token"))
        )
        return web.json_response({"file_count": 3, "used_bytes": 12, "new_field": True})

    async with serving(handler) as url, ProxyClient(url, Secret("the-shared-secret")) as proxy:
        usage = await proxy.usage("minio", VFID)
    assert (usage.file_count, usage.used_bytes) == (3, 12)
    assert seen == [("GET", "/folder/usage", {"volume": "minio", "vfid": VFID}, "the-shared-secret")]


@pytest.mark.asyncio
async def test_typed_errors_arrive_and_are_not_repeated() -> None:
    calls = 0

    async def handler(request: web.Request) -> web.Response:
        nonlocal calls
        calls += 1
        return problem_answer(S3BadCredential("The secret does not match.", hint="Check it."), "r" * 8)

    async with serving(handler) as url, ProxyClient(url, Secret("s" * 32)) as proxy:
        with pytest.raises(S3BadCredential, match="does not match"):
            await proxy.volumes()
    assert calls == 1


@pytest.mark.asyncio
async def test_a_refused_proxy_secret_is_a_setting_not_a_403() -> None:
    async def handler(request: web.Request) -> web.Response:
        return problem_answer(errors.AccessError("Forbidden (invalid auth token)"), "r" * 8)

    async with serving(handler) as url, ProxyClient(url, Secret("s" * 32)) as proxy:
        with pytest.raises(ConfigError, match="refuses the secret"):
            await proxy.volumes()


@pytest.mark.asyncio
async def test_a_read_only_refusal_stays_what_it_is() -> None:
    async def handler(request: web.Request) -> web.Response:
        return problem_answer(ReadOnly("Bound read-only."), "r" * 8)

    async with serving(handler) as url, ProxyClient(url, Secret("s" * 32)) as proxy:
        with pytest.raises(ReadOnly):
            await proxy.delete_files("minio", VFID, ["a"])


@pytest.mark.asyncio
async def test_temporary_errors_are_repeated_only_where_it_is_safe() -> None:
    calls: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        calls.append(request.path)
        return problem_answer(ServiceUnavailable("SQL does not answer."), "r" * 8)

    async with serving(handler) as url, ProxyClient(url, Secret("s" * 32)) as proxy:
        with pytest.raises(ServiceUnavailable, match="SQL"):
            await proxy.volumes()
        assert calls == ["/volumes"] * 3
        calls.clear()
        with pytest.raises(ServiceUnavailable, match="SQL"):
            await proxy.create_folder("minio", VFID)
        assert calls == ["/folder/create"]


@pytest.mark.asyncio
async def test_a_service_that_comes_back_is_used() -> None:
    answers = [503, 503, 200]

    async def handler(request: web.Request) -> web.Response:
        if answers.pop(0) == 503:
            return problem_answer(ServiceUnavailable("Starting."), "r" * 8)
        return web.json_response({"volumes": [{"name": "minio", "backend": "minio"}]})

    async with serving(handler) as url, ProxyClient(url, Secret("s" * 32)) as proxy:
        assert [volume.name for volume in await proxy.volumes()] == ["minio"]


@pytest.mark.asyncio
async def test_refused_connection_names_the_service_and_the_remedy() -> None:
    async with ManagerClient(await closed_port(), "token") as manager:
        with pytest.raises(ServiceUnavailable) as caught:
            await manager.create_folder("a", "minio")
    assert "manager extension" in str(caught.value)
    assert "refused" in str(caught.value)
    assert "mooring doctor" in str(caught.value)


@pytest.mark.asyncio
async def test_silence_ends_at_the_deadline() -> None:
    async def handler(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async with serving(handler) as url, ManagerClient(url, "token", timeout=0.2) as manager:
        with pytest.raises(DeadlineExceeded, match=r"manager extension.*within 0\.2 s"):
            await manager.folder("data")


@pytest.mark.asyncio
async def test_a_connection_that_breaks_is_unavailable() -> None:
    async def handler(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with serving(handler) as url, ManagerClient(url, "token") as manager:
        with pytest.raises(ServiceUnavailable, match="broke"):
            await manager.create_folder("a", "minio")


@pytest.mark.asyncio
async def test_another_shape_is_named_not_crashed_on() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"file_count": "many"})

    async with serving(handler) as url, ProxyClient(url, Secret("s" * 32)) as proxy:
        with pytest.raises(InternalError, match="file_count"):
            await proxy.usage("minio", VFID)


@pytest.mark.asyncio
async def test_redirects_are_not_followed() -> None:
    paths: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        paths.append(request.path)
        return web.Response(status=302, headers={"Location": "/elsewhere"})

    async with serving(handler) as url, ProxyClient(url, Secret("s" * 32)) as proxy:
        with pytest.raises(InternalError):
            await proxy.volumes()
    assert paths == ["/volumes"]


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["my data", "a+b%20c", "Überschrift", "100%", "a?b#c", "..a"])
async def test_a_name_stays_one_path_segment(name: str) -> None:
    seen: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.path)
        return problem_answer(VFolderNotFound("None."), "r" * 8)

    async with serving(handler) as url, ManagerClient(url, "token") as manager:
        with pytest.raises(VFolderNotFound):
            await manager.folder(name)
    assert seen == [f"/v1/folders/{name}"]


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["", ".", ".."])
async def test_names_that_would_be_paths_are_not_sent(name: str) -> None:
    async with ManagerClient(await closed_port(), "token") as manager:
        with pytest.raises(InvalidIdentifier):
            await manager.folder(name)


@pytest.mark.asyncio
async def test_the_request_id_is_passed_on() -> None:
    seen: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.headers["X-Request-ID"])
        return web.json_response({"volumes": []})

    token = request_id.set("request-0123456789")
    try:
        async with serving(handler) as url, ProxyClient(url, Secret("s" * 32)) as proxy:
            await proxy.volumes()
    finally:
        request_id.reset(token)
    assert seen == ["request-0123456789"]


@pytest.mark.asyncio
async def test_pages_are_followed_to_the_end() -> None:
    async def handler(request: web.Request) -> web.Response:
        body = await request.json()
        start = int(body.get("cursor", "0"))
        stat = {"mode": 33188, "size": 1, "created": "2026-01-01T00:00:00Z", "modified": "2026-01-01T00:00:00Z"}
        items = [{"name": f"f{start + n}", "type": "FILE", "stat": stat} for n in range(3)]
        return web.json_response({"items": items, "next_cursor": str(start + 3) if start < 6 else None})

    async with serving(handler) as url, ProxyClient(url, Secret("s" * 32)) as proxy:
        names = [entry.name async for entry in proxy.iter_files("minio", VFID)]
    assert names == [f"f{n}" for n in range(9)]


@pytest.mark.asyncio
async def test_partial_failures_of_mkdir_are_results() -> None:
    async def handler(request: web.Request) -> web.Response:
        results = {"success": [], "failed": [{"msg": "exists", "item": "a"}]}
        return web.json_response({"results": results}, status=422)

    async with serving(handler) as url, ProxyClient(url, Secret("s" * 32)) as proxy:
        answer = await proxy.mkdir("minio", VFID, ["a"])
    assert answer.results.failed[0].msg == "exists"


@pytest.mark.asyncio
async def test_a_missing_agent_socket_says_how_to_start_the_agent(tmp_path: Path) -> None:
    async with AgentClient(tmp_path / "agent.sock") as agent:
        with pytest.raises(ServiceUnavailable) as caught:
            await agent.identity()
    assert str(tmp_path / "agent.sock") in str(caught.value)
    assert "mooring agent serve" in str(caught.value)


@pytest.mark.asyncio
async def test_agent_answers_are_typed(tmp_path: Path) -> None:
    async def handler(request: web.Request) -> web.Response:
        if request.path == "/v1/mounts":
            mount = {"key": "k", "state": "live", "driver": "s3fs", "bucket": "b1b", "mode": "ro", "sessions": ["s1"]}
            return web.json_response([mount])
        if request.method == "POST":
            return problem_answer(AlreadyExists("Taken."), "r" * 8)
        return web.json_response({"detached": 2})

    socket = tmp_path / "agent.sock"
    async with serving(handler, socket=socket), AgentClient(socket) as agent:
        assert [mount.sessions for mount in await agent.mounts()] == [["s1"]]
        assert await agent.detach_session("s1") == 2
        with pytest.raises(AlreadyExists):
            await agent.attach("grant")


@pytest.mark.asyncio
async def test_no_client_shows_its_secret() -> None:
    secret = "correct-horse-battery-staple-0123456789"

    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=500, text=json.dumps({"msg": "bug"}))

    async with serving(handler) as url:
        clients: list[HttpService] = [ProxyClient(url, Secret(secret)), ManagerClient(url, secret)]
        for client in clients:
            async with client:
                with pytest.raises(InternalError) as caught:
                    await client.call("GET", "/v1/x")
                assert secret not in repr(client) + repr(caught.value) + str(caught.value)


@pytest.mark.parametrize("url", ["", "127.0.0.1:1", "ftp://h", "http://", "http://h/?x=1"])
def test_a_base_url_is_checked(url: str) -> None:
    with pytest.raises(ConfigError):
        ProxyClient(url, Secret("s" * 32))


@pytest.mark.asyncio
async def test_fetch_is_the_bytes_and_missing_is_missing() -> None:
    async def handler(request: web.Request) -> web.Response:
        body = await request.json()
        if body["relpath"] == "gone":
            return problem_answer(FileNotFound("None."), "r" * 8)
        return web.Response(body=b"\x00\x01", content_type="application/octet-stream")

    async with serving(handler) as url, ProxyClient(url, Secret("s" * 32)) as proxy:
        assert await proxy.fetch("minio", VFID, "there") == b"\x00\x01"
        with pytest.raises(FileNotFound):
            await proxy.fetch("minio", VFID, "gone")
