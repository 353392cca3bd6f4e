"""Folders of the manager extension: who sees what, names, paging, and that nothing stays half made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy import func, select, update

from manager_ext.models import CredentialRow, FolderRow
from manager_ext.models.base import now
from storage_proxy.client.manager import MountAsked
from storage_proxy.core.errors import (
    AlreadyExists,
    BucketNotFound,
    Conflict,
    Forbidden,
    InUse,
    InvalidIdentifier,
    InvalidPath,
    InvalidRequest,
    ReadOnly,
    S3BadCredential,
    ServiceUnavailable,
    VFolderNotFound,
    VolumeNotFound,
)
from storage_proxy.core.secrets import Secret
from tests.fakes.fake_proxy import ENDPOINT, FakeProxy

from .manager_stack import ADMIN, AGENT_ID, ALICE, BOB, CLIENT_URL, PROJECT, Stack, running

pytestmark = pytest.mark.asyncio

KEY, SECRET = "AKIDEXAMPLE12345", "the-secret-of-the-bucket-owner-0123456789"


@pytest.fixture
def proxy() -> FakeProxy:
    fake = FakeProxy()
    fake.known_keys[KEY] = SECRET
    fake.buckets.add("datasets")
    return fake


@pytest_asyncio.fixture
async def stack(tmp_path: Path, proxy: FakeProxy, any_database_url: str) -> AsyncIterator[Stack]:
    async with running(tmp_path, proxy, any_database_url) as running_stack:
        yield running_stack


proxy_is_down = pytest.mark.expects_log("The storage proxy does not answer")


@pytest_asyncio.fixture
async def quick(tmp_path: Path, proxy: FakeProxy) -> AsyncIterator[Stack]:
    """For many inputs that never reach the database."""
    async with running(tmp_path, proxy, f"sqlite:///{tmp_path / 'm.db'}") as running_stack:
        yield running_stack


def down() -> None:
    raise ServiceUnavailable("The storage proxy does not answer.")


async def rows(stack: Stack) -> int:
    async with stack.db.session() as session:
        return await session.scalar(select(func.count()).select_from(FolderRow)) or 0


async def stored_keys(stack: Stack) -> int:
    async with stack.db.session() as session:
        return await session.scalar(select(func.count()).select_from(CredentialRow)) or 0


async def test_create_find_and_delete(stack: Stack, proxy: FakeProxy) -> None:
    async with stack.client() as alice:
        made = await alice.create_folder("my data", "minio")
        assert made.vfid == f"user:{ALICE}/{made.id.replace('-', '')}"
        assert (made.kind, made.quota_scope, made.read_only, made.bucket) == ("managed", f"user:{ALICE}", False, None)
        assert list(proxy.folders) == [made.vfid]
        assert await alice.folder("my data") == made
        assert await alice.folder(made.id) == made
        assert await alice.folder(made.id.replace("-", "")) == made
        assert [folder.name async for folder in alice.folders()] == ["my data"]
        await alice.delete_folder("my data")
        assert proxy.folders == {}
        with pytest.raises(VFolderNotFound):
            await alice.folder("my data")
        with pytest.raises(VFolderNotFound):
            await alice.delete_folder(made.id)
        assert await rows(stack) == 0


async def test_a_name_is_unique_in_its_scope_only(stack: Stack) -> None:
    async with stack.client(projects=(PROJECT,)) as alice, stack.client(BOB) as bob:
        first = await alice.create_folder("data", "minio")
        with pytest.raises(AlreadyExists):
            await alice.create_folder("data", "minio")
        await bob.create_folder("data", "minio")
        second = await alice.create_folder("data", "minio", quota_scope=f"project:{PROJECT}")
        with pytest.raises(Conflict) as caught:
            await alice.folder("data")
        assert set(caught.value.detail["ids"]) == {first.id, second.id}  # type: ignore[arg-type]
        assert "id" in str(caught.value)
        assert (await alice.folder(second.id)).quota_scope == f"project:{PROJECT}"


async def test_scopes_of_others_are_not_used(stack: Stack) -> None:
    async with stack.client() as alice:
        for scope in (f"user:{BOB}", f"project:{PROJECT}"):
            with pytest.raises(Forbidden):
                await alice.create_folder("data", "minio", quota_scope=scope)
    async with stack.client(ADMIN, "admin") as admin:
        assert (await admin.create_folder("data", "minio", quota_scope=f"user:{BOB}")).quota_scope == f"user:{BOB}"
    assert await rows(stack) == 1


async def test_project_folders_are_shared_by_the_project(stack: Stack) -> None:
    async with stack.client(projects=(PROJECT,)) as alice, stack.client(BOB, projects=(PROJECT,)) as bob:
        made = await alice.create_folder("shared", "minio", quota_scope=f"project:{PROJECT}")
        assert await bob.folder("shared") == made
    async with stack.client(BOB) as outsider:
        with pytest.raises(VFolderNotFound):
            await outsider.folder(made.id)


@pytest.mark.parametrize(
    "name",
    [
        "",
        " padded",
        "a/b",
        "a\\b",
        ".",
        "..",
        "a\nb",
        "a\x00b",
        "a\x7fb",
        "\u202eabc",
        "e\u0301",
        "x" * 65,
        ALICE,
        "\ud800",
    ],
)
async def test_bad_names_are_refused(quick: Stack, proxy: FakeProxy, name: str) -> None:
    status, body = await quick.call("POST", "/v1/folders", {"name": name, "volume": "minio"}, token=quick.token())
    assert (status, proxy.calls) == (400, [])
    assert body["type"].endswith("invalid-api-params")


@pytest.mark.parametrize("name", ["x", "a b", "100%", "ünïcödé", "データ", "a+b&c?d#e", "-rf", "..a", "x" * 64])
async def test_good_names_work_everywhere(quick: Stack, name: str) -> None:
    async with quick.client() as alice:
        made = await alice.create_folder(name, "minio")
        assert await alice.folder(name) == made
        await alice.delete_folder(name)


async def test_unknown_volumes_and_proxies(stack: Stack) -> None:
    async with stack.client() as alice:
        with pytest.raises(VolumeNotFound):
            await alice.create_folder("data", "nowhere")
        with pytest.raises(VolumeNotFound):
            await alice.create_folder("data", "other:minio")
        assert (await alice.create_folder("data", "local:minio")).proxy == "local"
    assert await rows(stack) == 1


async def test_pages_are_complete_and_ordered(stack: Stack) -> None:
    async with stack.client() as alice, stack.client(BOB) as bob:
        await bob.create_folder("not yours", "minio")
        names = [f"f{number:02}" for number in (3, 1, 4, 0, 2, 6, 5)]
        for name in names:
            await alice.create_folder(name, "minio")
        seen: list[str] = []
        cursor = None
        pages = 0
        while True:
            page = await alice.folders_page(cursor=cursor, limit=3)
            seen += [folder.name for folder in page.items]
            pages += 1
            if page.next_cursor is None:
                break
            cursor = page.next_cursor
        assert (seen, pages) == (sorted(names), 3)
        # A cursor of somebody else shows nothing that is not yours.
        assert [folder.name for folder in (await bob.folders_page(cursor=cursor)).items] == ["not yours"]


@pytest.mark.parametrize("cursor", ["x", "%%", "bnVsbA", "WyJhIl0", "WyJhIiwgImIiXQ", "W1tdLCBbXV0", "=" * 9])
async def test_forged_cursors_are_refused(quick: Stack, cursor: str) -> None:
    async with quick.client() as alice:
        with pytest.raises(InvalidRequest):
            await alice.folders_page(cursor=cursor)
    status, _ = await quick.call("GET", "/v1/folders?limit=0", token=quick.token())
    assert status == 400
    status, _ = await quick.call("GET", "/v1/folders?limit=1001", token=quick.token())
    assert status == 400


# --- bound folders ----------------------------------------------------------------------------------------------------


async def test_bind_with_keys_of_its_own(stack: Stack, proxy: FakeProxy) -> None:
    async with stack.client() as alice:
        made = await alice.bind_folder(
            "set", "minio", "datasets", prefix="a/b", read_only=True, access_key=KEY, secret_key=Secret(SECRET)
        )
        assert (made.kind, made.bucket, made.prefix, made.read_only) == ("bound", "datasets", "a/b/", True)
        binding = proxy.folders[made.vfid].binding
        assert binding is not None
        assert (binding.bucket, binding.prefix, binding.read_only) == ("datasets", "a/b/", True)
        assert binding.credential.secret_key.reveal() == SECRET
        assert (await alice.credentials_page()).items == []
        assert await stored_keys(stack) == 1
        await alice.delete_folder("set")
        assert (await stored_keys(stack), await rows(stack)) == (0, 0)


async def test_bind_with_a_stored_credential(stack: Stack, proxy: FakeProxy) -> None:
    async with stack.client() as alice:
        stored = await alice.create_credential("owner", KEY, Secret(SECRET))
        assert stored.access_key_hint == "...2345"
        by_id = await alice.bind_folder("one", "minio", "datasets", credential_id=stored.id)
        await alice.bind_folder("two", "minio", "datasets", credential_id="owner")
        assert by_id.credential_id == stored.id
        with pytest.raises(InUse, match="one, two"):
            await alice.delete_credential(stored.id)
        await alice.delete_folder("one")
        await alice.delete_folder("two")
        assert await stored_keys(stack) == 1
        await alice.delete_credential("owner")
        assert await stored_keys(stack) == 0


@pytest.mark.expects_log("does not match the access key")
@pytest.mark.expects_log("There is no bucket")
async def test_the_errors_of_the_object_store_reach_the_user(stack: Stack, proxy: FakeProxy) -> None:
    async with stack.client() as alice:
        with pytest.raises(S3BadCredential, match="does not match"):
            await alice.bind_folder("a", "minio", "datasets", access_key=KEY, secret_key=Secret("wrong"))
        with pytest.raises(BucketNotFound, match="missing"):
            await alice.bind_folder("a", "minio", "missing", access_key=KEY, secret_key=Secret(SECRET))
        assert (await rows(stack), await stored_keys(stack), proxy.folders) == (0, 0, {})
        await alice.bind_folder("a", "minio", "datasets", access_key=KEY, secret_key=Secret(SECRET))


@pytest.mark.parametrize(
    "change",
    [
        {"bucket": "UPPER"},
        {"bucket": "a"},
        {"bucket": "../x"},
        {"prefix": "/abs"},
        {"prefix": "a/../b"},
        {"prefix": "a//b"},
        {"prefix": "a\\b"},
        {"uid": -1},
        {"umask": 0o1000},
        {"credential": {"access_key": "k", "secret_key": ""}},
        {"credential": None},
        {"credential_id": "both", "credential": {"access_key": "k", "secret_key": "s"}},
        {"endpoint": "ftp://x"},
        {"endpoint": "http://user:password@x"},
        {"endpoint": "http://x/path"},
        {"endpoint": "http://169.254.169.254/latest?x=1"},
        {"readonly": True},
    ],
)
async def test_bad_bindings_are_refused(quick: Stack, proxy: FakeProxy, change: dict[str, object]) -> None:
    body: dict[str, object] = {
        "name": "a",
        "volume": "minio",
        "bucket": "datasets",
        "credential": {"access_key": KEY, "secret_key": SECRET},
        **change,
    }
    status, answer = await quick.call("POST", "/v1/folders/bind", body, token=quick.token())
    assert (status, proxy.folders) == (400, {}), answer
    assert SECRET not in quick.answers[-1]


async def test_users_do_not_choose_where_the_proxy_connects(tmp_path: Path, proxy: FakeProxy) -> None:
    settings = {"binding": {"allowed-endpoints": ["https://S3.example.com:443/"]}}
    keys = {"access_key": KEY, "secret_key": Secret(SECRET)}
    async with (
        running(tmp_path, proxy, f"sqlite:///{tmp_path}/m.db", settings=settings) as stack,
        stack.client() as alice,
        stack.client(ADMIN, "admin") as admin,
    ):
        for endpoint in ("http://169.254.169.254", "http://127.0.0.1:22", "https://s3.example.com:8443"):
            with pytest.raises(Forbidden, match="not allowed"):
                await alice.bind_folder("a", "minio", "datasets", endpoint=endpoint, **keys)  # type: ignore[arg-type]
        await alice.bind_folder("own", "minio", "datasets", endpoint=ENDPOINT, **keys)  # type: ignore[arg-type]
        await alice.bind_folder("listed", "minio", "datasets", endpoint="https://s3.example.com", **keys)  # type: ignore[arg-type]
        await admin.bind_folder("any", "minio", "datasets", endpoint="http://127.0.0.1:7", **keys)  # type: ignore[arg-type]


async def test_stored_keys_go_to_their_endpoint_only(stack: Stack, proxy: FakeProxy) -> None:
    async with stack.client() as alice:
        await alice.create_credential("here", KEY, Secret(SECRET), endpoint=ENDPOINT)
        await alice.create_credential("volume", KEY, Secret(SECRET))
        with pytest.raises(Forbidden):
            await alice.bind_folder("a", "minio", "datasets", credential_id="here", endpoint="http://127.0.0.1:1")
        with pytest.raises(Forbidden):
            await alice.bind_folder("a", "minio", "datasets", credential_id="volume", endpoint=ENDPOINT)
        made = await alice.bind_folder("a", "minio", "datasets", credential_id="here")
        assert made.endpoint == ENDPOINT


# --- nothing half made ------------------------------------------------------------------------------------------------


@proxy_is_down
async def test_a_proxy_that_is_down_leaves_nothing_that_shows(stack: Stack, proxy: FakeProxy) -> None:
    async with stack.client() as alice:
        proxy.before["*"] = down
        with pytest.raises(ServiceUnavailable):
            await alice.create_folder("data", "minio")
        assert [folder async for folder in alice.folders()] == []
        with pytest.raises(VFolderNotFound):
            await alice.folder("data")
        proxy.before.clear()
        made = await alice.create_folder("data", "minio")
        assert list(proxy.folders) == [made.vfid]
        assert await rows(stack) == 1


@proxy_is_down
async def test_an_answer_that_got_lost_is_undone(stack: Stack, proxy: FakeProxy) -> None:
    async with stack.client() as alice:
        proxy.after["create_folder"] = down
        with pytest.raises(ServiceUnavailable):
            await alice.create_folder("data", "minio")
        assert (proxy.folders, await rows(stack)) == ({}, 0)


@proxy_is_down
async def test_what_could_not_be_undone_is_swept(stack: Stack, proxy: FakeProxy) -> None:
    async with stack.client() as alice:
        proxy.after["create_folder"] = down
        proxy.before["delete_folder"] = down
        with pytest.raises(ServiceUnavailable):
            await alice.bind_folder("data", "minio", "datasets", access_key=KEY, secret_key=Secret(SECRET))
        assert (len(proxy.folders), await rows(stack), await stored_keys(stack)) == (1, 1, 1)
        assert await stack.services.folders.sweep() == 0
        proxy.before.clear()
        assert await stack.services.folders.sweep() == 1
        assert (proxy.folders, await rows(stack), await stored_keys(stack)) == ({}, 0, 0)


async def test_of_two_at_once_one_makes_the_folder(stack: Stack, proxy: FakeProxy) -> None:
    async with stack.client() as alice:
        results = await asyncio.gather(
            *(alice.create_folder("data", "minio") for _ in range(5)), return_exceptions=True
        )
        made = [result for result in results if not isinstance(result, BaseException)]
        assert len(made) == 1
        assert all(isinstance(result, Conflict) for result in results if isinstance(result, BaseException))
        assert list(proxy.folders) == [made[0].vfid]


async def test_a_create_in_progress_is_not_disturbed_but_a_dead_one_is_replaced(stack: Stack, proxy: FakeProxy) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        started.set()
        await go_on.wait()

    proxy.before["create_folder"] = wait
    async with stack.client() as alice:
        first = asyncio.create_task(alice.create_folder("data", "minio"))
        await asyncio.wait_for(started.wait(), 5)
        with pytest.raises(Conflict, match="right now"):
            await alice.create_folder("data", "minio")
        async with stack.db.session() as session:  # its process has died
            await session.execute(update(FolderRow).values(attempt_until=now()))
        proxy.before.clear()
        second = await alice.create_folder("data", "minio")
        go_on.set()
        with pytest.raises(Conflict, match="taken over"):
            await first
        assert (await alice.folder("data")).id == second.id
        assert list(proxy.folders) == [second.vfid]


async def test_a_caller_who_goes_away_leaves_nothing(stack: Stack, proxy: FakeProxy) -> None:
    started = asyncio.Event()

    async def wait() -> None:
        started.set()
        await asyncio.Event().wait()

    proxy.after["create_folder"] = wait
    async with stack.client() as alice:
        call = asyncio.create_task(alice.create_folder("data", "minio"))
        await asyncio.wait_for(started.wait(), 5)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        async with asyncio.timeout(5):
            while await rows(stack):  # noqa: ASYNC110 - the condition is in the database
                await asyncio.sleep(0.02)
        assert proxy.folders == {}


@proxy_is_down
async def test_an_interrupted_deletion_goes_on(stack: Stack, proxy: FakeProxy) -> None:
    async with stack.client() as alice:
        made = await alice.create_folder("data", "minio")
        proxy.before["delete_folder"] = down
        with pytest.raises(ServiceUnavailable):
            await alice.delete_folder("data")
        with pytest.raises(VFolderNotFound):
            await alice.folder("data")
        proxy.before.clear()
        await alice.delete_folder(made.id)
        assert (proxy.folders, await rows(stack)) == ({}, 0)


# --- files ------------------------------------------------------------------------------------------------------------


async def test_files_pass_through(stack: Stack, proxy: FakeProxy) -> None:
    async with stack.client() as alice:
        made = await alice.create_folder("data", "minio")
        proxy.folders[made.vfid].files.update({"a": 1, "b": 2, "c": 3})
        page = await alice.files("data", limit=2)
        assert ([entry.name for entry in page.items], page.next_cursor) == (["a", "b"], "b")
        assert [entry.name for entry in (await alice.files("data", cursor="b")).items] == ["c"]
        assert (await alice.usage("data")).used_bytes == 6
        await alice.mkdir("data", "new")
        with pytest.raises(Conflict, match="File exists"):
            await alice.mkdir("data", "new")
        await alice.mkdir("data", "new", exist_ok=True)
        await alice.delete_files("data", ["a", "new/"])
        assert sorted(proxy.folders[made.vfid].files) == ["b", "c", "new/"]
        up = await alice.request_upload("data", "dir/x y.bin", 10)
        assert (up.url, up.token) == (f"{CLIENT_URL}/upload", f'["upload", "{made.vfid}", "dir/x y.bin", 10]')
        assert (await alice.request_download("data", "b")).url == f"{CLIENT_URL}/download"


@pytest.mark.semantics(7)
async def test_read_only_folders_take_no_writes(stack: Stack, proxy: FakeProxy) -> None:
    async with stack.client() as alice:
        await alice.bind_folder("set", "minio", "datasets", read_only=True, access_key=KEY, secret_key=Secret(SECRET))
        proxy.calls.clear()
        with pytest.raises(ReadOnly):
            await alice.mkdir("set", "x")
        with pytest.raises(ReadOnly):
            await alice.delete_files("set", ["x"])
        with pytest.raises(ReadOnly):
            await alice.request_upload("set", "x", 1)
        assert proxy.calls == []
        await alice.request_download("set", "x")


async def test_a_folder_in_use_is_not_deleted(stack: Stack, proxy: FakeProxy) -> None:
    await stack.register_agent()
    async with stack.client(projects=(PROJECT,)) as alice:
        await alice.create_folder("data", "minio")
        await alice.create_session(AGENT_ID, [MountAsked(folder="data", target="/data")], session_id="job-7")
        with pytest.raises(InUse, match="job-7") as caught:
            await alice.delete_folder("data")
        assert caught.value.detail == {"sessions": ["job-7"]}
        assert len(proxy.folders) == 1
        await alice.delete_session("job-7")
        await alice.delete_folder("data")


@pytest.mark.semantics(6)
@pytest.mark.parametrize("path", ["/abs", "../x", "a/../b", "a//b", "a\\b", "a\x00b", "x" * 300, "a/./b"])
async def test_hostile_paths_are_refused(quick: Stack, proxy: FakeProxy, path: str) -> None:
    async with quick.client() as alice:
        await alice.create_folder("data", "minio")
        proxy.calls.clear()
        for call in (
            alice.files("data", path),
            alice.mkdir("data", path),
            alice.delete_files("data", [path]),
            alice.request_upload("data", path, 1),
            alice.request_download("data", path),
        ):
            with pytest.raises((InvalidPath, InvalidRequest, InvalidIdentifier)):
                await call
        assert proxy.calls == []
