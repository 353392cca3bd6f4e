"""The HTTP edge of all daemons: error answers, deny by default, request ids, health, starting and stopping."""

import asyncio
import json
import os
import socket
import stat
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from pydantic import BaseModel

from storage_proxy.core.errors import ConfigError, FileNotFound, Forbidden, PortTaken, S3Unavailable, Unauthenticated
from storage_proxy.web import (
    HealthCheck,
    Listener,
    Principal,
    Server,
    authenticated,
    edge_middleware,
    health_routes,
    json_answer,
    public,
    read_json,
    require,
)

pytestmark = pytest.mark.asyncio


class Body(BaseModel):
    size: int


@public
async def missing(_: web.Request) -> web.Response:
    raise FileNotFound("There is no file a.", hint="Look.", detail={"path": "a"})


@public
async def later(_: web.Request) -> web.Response:
    raise S3Unavailable("S3 does not answer.")


@public
async def bug(_: web.Request) -> web.Response:
    raise RuntimeError("password=hunter2")


@public
async def echo(request: web.Request) -> web.Response:
    return json_answer(await read_json(request, Body))


@public
async def breaks_off(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b"x" * 10)
    raise S3Unavailable("S3 does not answer.")


@require("admin")
async def admin(_: web.Request) -> web.Response:
    return json_answer({"ok": True})


async def forgotten(_: web.Request) -> web.Response:
    return json_answer({"ok": True})


async def by_header(request: web.Request) -> Principal:
    name = request.headers.get("X-Name")
    if name is None:
        raise Unauthenticated("No name.")
    return Principal(name, frozenset({"admin"} if name == "root" else {"user"}))


def application(*extra: web.RouteDef) -> web.Application:
    app = web.Application(middlewares=[edge_middleware, authenticated(by_header)])
    app.add_routes(
        [
            web.get("/missing", missing),
            web.get("/later", later),
            web.get("/bug", bug),
            web.get("/breaks-off", breaks_off),
            web.post("/echo", echo),
            web.get("/admin", admin),
            *extra,
        ]
    )
    return app


async def client_for(app: web.Application) -> TestClient[web.Request, web.Application]:
    client: TestClient[web.Request, web.Application] = TestClient(TestServer(app))
    await client.start_server()
    return client


async def test_errors_are_problems_with_a_request_id() -> None:
    client = await client_for(application())
    async with client:
        answer = await client.get("/missing", headers={"X-Request-ID": "abcdefgh-1"})
        body = await answer.json(content_type="application/problem+json")
        assert answer.status == 404
        assert answer.headers["X-Request-ID"] == body["request_id"] == "abcdefgh-1"
        assert body["error_code"] == "vfolder_read_not-found"
        assert (body["msg"], body["hint"], body["data"]) == ("There is no file a.", "Look.", {"path": "a"})


@pytest.mark.expects_log("S3 does not answer")
async def test_a_temporary_error_says_when_to_come_back() -> None:
    async with await client_for(application()) as client:
        answer = await client.get("/later")
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")


@pytest.mark.expects_log("unexpected error")
@pytest.mark.semantics(5)
async def test_a_bug_tells_the_request_id_and_nothing_else() -> None:
    async with await client_for(application()) as client:
        answer = await client.get("/bug")
        text = await answer.text()
        assert answer.status == 500
        assert "hunter2" not in text
        assert answer.headers["X-Request-ID"] in json.loads(text)["hint"]


@pytest.mark.expects_log("S3 does not answer")
async def test_an_error_never_becomes_part_of_an_answer_that_has_begun() -> None:
    async with await client_for(application()) as client:
        answer = await client.get("/breaks-off")
        assert await answer.content.readexactly(10) == b"x" * 10
        with pytest.raises(aiohttp.ClientError):
            await answer.content.read()


@pytest.mark.parametrize(("path", "method", "status"), [("/none", "GET", 404), ("/echo", "GET", 405)])
async def test_refusals_of_the_router_have_the_same_shape(path: str, method: str, status: int) -> None:
    async with await client_for(application()) as client:
        answer = await client.request(method, path)
        assert answer.status == status
        assert (await answer.json(content_type="application/problem+json"))["status"] == status


@pytest.mark.parametrize("body", ["{", "[]", '"x"', '{"size": "x"}', "{}", "[" * 100_000, '{"size": 1, "size": null}'])
async def test_a_broken_body_is_400(body: str) -> None:
    async with await client_for(application()) as client:
        answer = await client.post("/echo", data=body)
        assert answer.status == 400
        assert (await answer.json(content_type="application/problem+json"))["data"]


async def test_a_body_without_end_is_refused() -> None:
    async def endless():  # type: ignore[no-untyped-def]
        for _ in range(100):
            yield b" " * 64 * 1024

    async with await client_for(application()) as client:
        answer = await client.post("/echo", data=endless())
        assert answer.status == 413


async def test_unknown_keys_are_ignored() -> None:
    async with await client_for(application()) as client:
        assert await (await client.post("/echo", json={"size": 1, "new": 2})).json() == {"size": 1}


@pytest.mark.semantics(9)
async def test_access_is_denied_by_default() -> None:
    async with await client_for(application(web.get("/forgotten", forgotten))) as client:
        assert (await client.get("/admin")).status == 401
        assert (await client.get("/admin", headers={"X-Name": "bob"})).status == 403
        assert (await client.get("/admin", headers={"X-Name": "root"})).status == 200
        assert (await client.get("/forgotten", headers={"X-Name": "root"})).status == 403


@pytest.mark.semantics(9)
async def test_an_application_with_a_route_without_policy_does_not_start(tmp_path: Path) -> None:
    listener = Listener(application(web.get("/forgotten", forgotten)), "test", socket=tmp_path / "s")
    with pytest.raises(RuntimeError, match="no access policy"):
        async with Server([listener]):
            pass
    assert not (tmp_path / "s").exists()


async def test_a_unix_socket_is_private_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with Server([Listener(application(), "test", socket=path)]):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session,
            session.get("http://unix/missing") as answer,
        ):
            assert answer.status == 404
    assert not path.exists()


async def test_a_unix_socket_never_takes_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    for path, text in ((tmp_path / "notes", "is no socket"), (tmp_path / "none" / "s", "No such file")):
        with pytest.raises(ConfigError, match=text):
            async with Server([Listener(application(), "test", socket=path)]):
                pass
    assert (tmp_path / "notes").read_text() == "mine"


async def test_a_unix_socket_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    before = os.umask(0o077)
    try:
        async with Server([Listener(application(), "test", socket=path, mode=0o660)]):
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
            assert os.umask(0o077) == 0o077, "the umask belongs to the process"
    finally:
        os.umask(before)


async def test_a_taken_port_is_named() -> None:
    holder = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = holder.sockets[0].getsockname()[1]
    try:
        with pytest.raises(PortTaken, match=str(port)):
            async with Server([Listener(application(), "test", host="127.0.0.1", port=port)]):
                pass
    finally:
        holder.close()
        await holder.wait_closed()


async def test_readiness_follows_the_critical_checks() -> None:
    well = True

    async def database() -> None:
        if not well:
            raise S3Unavailable("It is gone.")

    async def cache() -> None:
        raise Forbidden("Not today.")

    checks = [HealthCheck("db", "main", database), HealthCheck("cache", "redis", cache, critical=False)]
    app = web.Application(middlewares=[edge_middleware])
    app.add_routes(health_routes("test", checks))
    async with await client_for(app) as client:
        assert (await client.get("/livez")).status == 200
        ready = await client.get("/readyz")
        assert (ready.status, (await ready.json())["status"]) == (200, "degraded")
        well = False
        gone = await client.get("/readyz")
        body = await gone.json()
        assert (gone.status, body["status"]) == (503, "error")
        assert body["connectivity"]["connectivity_checks"][0]["error_message"] == "It is gone."
        assert (await client.get("/health")).status == 200
