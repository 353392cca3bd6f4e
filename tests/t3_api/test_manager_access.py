"""Who may call what: each route without a token, with a wrong one, as another user, with hostile ids; no secrets."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
import pytest_asyncio
from sqlalchemy import text

from manager_ext.api import AUDIENCE, TokenAuth, build_app
from storage_proxy.client.manager import MountAsked
from storage_proxy.core.crypto import SealingKey
from storage_proxy.core.errors import AlreadyExists, Forbidden, InvalidRequest, NotFound, UsageError
from storage_proxy.core.secrets import Secret
from storage_proxy.core.tokens import Purpose, SigningKey, TokenSigner
from storage_proxy.web import policy_of
from tests.fakes.fake_proxy import FakeProxy

from .manager_stack import ADMIN, AGENT_ID, ALICE, BOB, PROJECT, Stack, running

pytestmark = pytest.mark.asyncio

KEY, SECRET = "AKIDEXAMPLE12345", "the-secret-of-the-bucket-owner-0123456789"

# Every route with the body of a valid request; `{folder}` and the like are filled in by the test.
ROUTES: dict[tuple[str, str], dict[str, Any] | None] = {
    ("POST", "/v1/folders"): {"name": "x", "volume": "minio"},
    ("POST", "/v1/folders/bind"): {
        "name": "x",
        "volume": "minio",
        "bucket": "datasets",
        "credential": {"access_key": KEY, "secret_key": SECRET},
    },
    ("GET", "/v1/folders"): None,
    ("GET", "/v1/folders/{folder}"): None,
    ("GET", "/v1/folders/{folder}/files"): None,
    ("POST", "/v1/folders/{folder}/files/mkdir"): {"path": "d"},
    ("POST", "/v1/folders/{folder}/files/delete"): {"paths": ["d"]},
    ("GET", "/v1/folders/{folder}/usage"): None,
    ("POST", "/v1/folders/{folder}/request-upload"): {"path": "f", "size": 1},
    ("POST", "/v1/folders/{folder}/request-download"): {"path": "f"},
    ("POST", "/v1/credentials"): {"name": "x", "access_key": KEY, "secret_key": SECRET},
    ("GET", "/v1/credentials"): None,
    ("PUT", "/v1/agents/{agent}"): {"public_key": SealingKey.generate().public},
    ("GET", "/v1/agents"): None,
    ("POST", "/v1/agents/{agent}/folders"): {"volume": "minio", "scope": "0" * 32, "folder": "0" * 32},
    ("GET", "/v1/agents/{agent}/folders"): None,
    ("DELETE", "/v1/agents/{agent}/folders/{session}"): None,
    ("POST", "/v1/sessions"): {"agent_id": AGENT_ID, "mounts": [{"folder": "data", "target": "/data"}]},
    ("GET", "/v1/sessions/{session}"): None,
    ("POST", "/v1/sessions/{session}/mounts/{folder}/grant"): None,
    ("DELETE", "/v1/sessions/{session}"): None,
    ("DELETE", "/v1/credentials/{credential}"): None,
    ("DELETE", "/v1/folders/{folder}"): None,
}
PUBLIC = {("GET", "/livez"), ("GET", "/readyz"), ("GET", "/health")}


@pytest.fixture
def proxy() -> FakeProxy:
    fake = FakeProxy()
    fake.known_keys[KEY] = SECRET
    fake.buckets.add("datasets")
    return fake


@pytest_asyncio.fixture
async def stack(tmp_path: Path, proxy: FakeProxy) -> AsyncIterator[Stack]:
    async with running(tmp_path, proxy, f"sqlite:///{tmp_path / 'm.db'}") as running_stack:
        yield running_stack


@pytest.mark.semantics(9)
async def test_the_table_above_has_every_route(stack: Stack) -> None:
    app = build_app(stack.services, TokenAuth(stack.signer))
    served: set[tuple[str, str]] = set()
    public: set[tuple[str, str]] = set()
    for route in app.router.routes():
        assert route.resource is not None
        policy = policy_of(route.handler)
        assert policy is not None
        if route.method == "HEAD":
            continue
        (public if policy.scope is None else served).add((route.method, route.resource.canonical))
    assert served == set(ROUTES)
    assert public == PUBLIC


async def _things(stack: Stack) -> dict[str, str]:
    """Alice's folder, credential and session, and the agent."""
    await stack.register_agent()
    async with stack.client() as alice:
        folder = await alice.create_folder("data", "minio")
        stored = await alice.create_credential("keys", KEY, Secret(SECRET))
        await alice.create_session(AGENT_ID, [MountAsked(folder="data", target="/data")], session_id="s1")
    return {"folder": folder.id, "credential": stored.id, "session": "s1", "agent": AGENT_ID}


def _forged() -> dict[str, str]:
    """Tokens that are almost right, by what is wrong with them."""
    right = {"role": "admin", "projects": []}
    hour = timedelta(hours=1)
    key, other = SigningKey.hs256(Secret("t" * 32)), SigningKey.hs256(Secret("u" * 32))
    claims = {
        **right,
        "aud": AUDIENCE,
        "purpose": "api",
        "sub": ADMIN,
        "jti": "1",
        "iat": 1_700_000_000,
        "exp": 4_000_000_000,
    }
    return {
        "garbage": "garbage",
        "empty": "",
        "other key": TokenSigner(AUDIENCE, [other]).issue(Purpose.API, ADMIN, hour, right),
        "other audience": TokenSigner("mooring-client", [key]).issue(Purpose.API, ADMIN, hour, right),
        "other purpose": TokenSigner(AUDIENCE, [key]).issue(Purpose.DOWNLOAD, ADMIN, hour, right),
        "expired": TokenSigner(AUDIENCE, [key]).issue(Purpose.API, ADMIN, timedelta(seconds=-60), right),
        "unknown role": TokenSigner(AUDIENCE, [key]).issue(Purpose.API, ADMIN, hour, {"role": "root"}),
        "no role": TokenSigner(AUDIENCE, [key]).issue(Purpose.API, ADMIN, hour, {}),
        "subject is no id": TokenSigner(AUDIENCE, [key]).issue(Purpose.API, "../x", hour, right),
        "unsigned": jwt.encode(claims, None, algorithm="none", headers={"kid": "1"}),
        "another algorithm": jwt.encode(claims, b"t" * 64, algorithm="HS512", headers={"kid": "1"}),
    }


@pytest.mark.semantics(9)
@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_every_route_refuses_strangers(stack: Stack, proxy: FakeProxy, method: str, path: str) -> None:
    things = await _things(stack)
    proxy.calls.clear()
    url, body = path.format(**things), ROUTES[method, path]
    status, problem = await stack.call(method, url, body)
    assert status == 401, problem
    for wrong, token in _forged().items():
        status, problem = await stack.call(method, url, body, token=token)
        assert status == 401, wrong
        assert len(token) < 20 or token not in stack.answers[-1]
    for header in ("Basic YTpi", "Bearer", f"Token {stack.token()}"):
        status, _ = await stack.call(method, url, body, Authorization=header)
        assert status == 401, header
    status, _ = await stack.call(method, f"{url}?token={stack.token()}", body)
    assert status == 401, "a token in the query counts for nothing"
    assert proxy.calls == []


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_roles_reach_their_routes_only(stack: Stack, method: str, path: str) -> None:
    things = await _things(stack)
    url, body = path.format(**things), ROUTES[method, path]
    stranger = stack.token(BOB) if path.startswith("/v1/agents") else stack.token("node-2", "agent")
    status, _ = await stack.call(method, url, body, token=stranger)
    # Grants are for users and for agents: another agent learns no more than another user does.
    assert status == (404 if path.endswith("/grant") else 403)


@pytest.mark.parametrize(
    ("method", "path"), [route for route in ROUTES if "{folder}" in route[1] or "{credential}" in route[1]]
)
async def test_things_of_others_do_not_exist(stack: Stack, proxy: FakeProxy, method: str, path: str) -> None:
    things = await _things(stack)
    body = ROUTES[method, path]
    for names in (things, {**things, "folder": "data", "credential": "keys"}):
        proxy.calls.clear()
        hers, problem = await stack.call(method, path.format(**names), body, token=stack.token(BOB))
        assert (hers, proxy.calls) == (404, []), problem
        nobody = {**names, "folder": str(uuid.uuid4()), "credential": str(uuid.uuid4())}
        none, other = await stack.call(method, path.format(**nobody), body, token=stack.token(BOB))
        assert none == 404
        assert (problem["type"], problem["error_code"]) == (other["type"], other["error_code"])
    async with stack.client() as alice:
        assert (await alice.folder("data")).id == things["folder"]
        assert [item.id for item in (await alice.credentials_page()).items] == [things["credential"]]


@pytest.mark.parametrize(
    "raw",
    ["..%2F..%2Fetc", "%00", "a%2Fb", "a%5Cb", "%0a", "%E2%80%AEx", "%7F", "x" * 65, "user:1/2", "%20x", "e%CC%81"],
)
async def test_hostile_ids_are_refused_on_every_route(stack: Stack, proxy: FakeProxy, raw: str) -> None:
    await stack.register_agent()
    proxy.calls.clear()
    for (method, path), body in ROUTES.items():
        if "{" not in path:
            continue
        url = path.format(folder=raw, credential=raw, session=raw, agent=raw)
        token = stack.token(ADMIN, "admin")
        status, problem = await stack.call(method, url, body, token=token)
        # "user:1/2" has a slash: such a path is no route at all, or another one.
        assert status == 400 or ("/" in raw and status in (404, 405)), (method, url, problem)
    assert proxy.calls == []


@pytest.mark.parametrize(("method", "path"), [route for route, body in ROUTES.items() if body is not None])
async def test_bodies_that_are_no_json_object_are_refused(stack: Stack, method: str, path: str) -> None:
    things = await _things(stack)
    url = path.format(**things)
    for body in ([], "text", 7, {"unknown-key": 1}, {"name": {"a": 1}, "path": [], "paths": "x", "mounts": {}}):
        status, problem = await stack.call(method, url, body, token=stack.token(ADMIN, "admin"))
        assert status == 400, (body, problem)


@pytest.mark.semantics(5)
@pytest.mark.expects_log("does not match the access key")
async def test_no_answer_holds_a_secret(stack: Stack, proxy: FakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    """Every route, good and bad, with secrets inside; then every answer, log line and the database are searched."""
    things = await _things(stack)
    token = stack.token(ADMIN, "admin", projects=(PROJECT,))
    for (method, path), body in ROUTES.items():
        await stack.call(method, path.format(**things), body, token=token)
        for broken in (SECRET, [SECRET], {"secret_key": SECRET, "name": [SECRET]}, {**(body or {}), SECRET: 1}):
            if body is not None:
                await stack.call(method, path.format(**things), broken, token=token)
    wrong = {**ROUTES["POST", "/v1/folders/bind"], "credential": {"access_key": KEY, "secret_key": SECRET + "x"}}  # type: ignore[dict-item]
    await stack.call("POST", "/v1/folders/bind", wrong, token=token)
    await stack.call("POST", "/v1/folders", {"name": "y", "volume": "minio"}, token=token)
    everything = "\n".join(stack.answers) + "".join(capfd.readouterr())
    # A misspelt key is named in the answer, since the caller sent it as a name.
    everything = everything.replace(f"{SECRET}: unknown key", "").replace(f'"{SECRET}":', "")
    for secret in (SECRET, KEY, stack.key_file.read_text(), "t" * 32):
        assert secret not in everything
    async with stack.db.engine.connect() as connection:
        for table in ("manager_credentials", "manager_folders", "manager_sessions", "manager_session_mounts"):
            dump = repr((await connection.execute(text(f"SELECT * FROM {table}"))).all())
            assert SECRET not in dump
            assert KEY not in dump


# --- agents and credentials -------------------------------------------------------------------------------------------


async def test_an_agents_key_is_changed_by_its_owner_or_an_admin(stack: Stack) -> None:
    first, second, third = (SealingKey.generate().public for _ in range(3))
    async with stack.client("node-1", "agent") as agent, stack.client("node-2", "agent") as other:
        made = await agent.register_agent("node-1", first)
        assert (await agent.register_agent("node-1", first)).updated_at == made.updated_at
        assert (await agent.register_agent("node-1", second)).public_key == second
        with pytest.raises(Forbidden, match="node-2"):
            await other.register_agent("node-1", third)
        async with stack.client(str(uuid.uuid4()), "agent") as stranger:  # a token for any new agent
            await stranger.register_agent("node-3", third)
            with pytest.raises(Forbidden, match="another subject"):
                await stranger.register_agent("node-1", third)
        assert [item.agent_id for item in (await agent.agents_page(limit=1)).items] == ["node-1"]
    async with stack.client(ADMIN, "admin") as admin:
        assert (await admin.register_agent("node-1", third)).public_key == third
        page = await admin.agents_page(limit=1)
        assert [item.agent_id for item in (await admin.agents_page(cursor=page.next_cursor)).items] == ["node-3"]


@pytest.mark.parametrize("key", ["", "A" * 42, "A" * 44, "A" * 43, "!" * 43, "A" * 42 + "="])
async def test_keys_that_seal_nothing_are_refused(stack: Stack, key: str) -> None:
    async with stack.client("node-1", "agent") as agent:
        with pytest.raises(InvalidRequest):
            await agent.register_agent("node-1", key)


async def test_credentials_are_listed_without_keys(stack: Stack) -> None:
    async with stack.client(projects=(PROJECT,)) as alice:
        await alice.create_credential("b", KEY, Secret(SECRET), endpoint="HTTPS://S3.Example.com:443/")
        await alice.create_credential("a", "short", Secret(SECRET), quota_scope=f"project:{PROJECT}")
        with pytest.raises(AlreadyExists):
            await alice.create_credential("b", KEY, Secret(SECRET))
        first = await alice.credentials_page(limit=1)
        rest = await alice.credentials_page(cursor=first.next_cursor)
        a, b = [*first.items, *rest.items]
        assert (a.name, a.access_key_hint, b.access_key_hint, b.endpoint) == (
            "a",
            "...",
            "...2345",
            "https://s3.example.com",
        )
        assert rest.next_cursor is None
        await alice.delete_credential("a")
        with pytest.raises(NotFound):
            await alice.delete_credential(a.id)


async def test_the_keys_of_one_folder_are_no_credential(stack: Stack) -> None:
    async with stack.client() as alice:
        made = await alice.bind_folder("set", "minio", "datasets", access_key=KEY, secret_key=Secret(SECRET))
        assert made.credential_id is not None
        with pytest.raises(NotFound):
            await alice.delete_credential(made.credential_id)
        with pytest.raises(NotFound):
            await alice.bind_folder("two", "minio", "datasets", credential_id=made.credential_id)


@pytest.mark.parametrize(
    "options",
    [
        {"user": "x"},
        {"role": "root"},
        {"projects": ("p",)},
        {"lifetime": "x"},
        {"lifetime": "0"},
        {"lifetime": "-1h"},
        {"lifetime": "9999d"},
        {"user": "../x", "role": "agent"},
    ],
)
async def test_tokens_that_are_not_made(stack: Stack, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        stack.token(**options)


async def test_health_is_open_and_says_nothing_secret(stack: Stack) -> None:
    for path in ("/livez", "/readyz", "/health"):
        status, body = await stack.call("GET", path)
        assert (status, body["component"]) == (200, "manager-ext")
    assert ALICE not in "".join(stack.answers)
