"""Files and trees through the client API, real parts at both ends: broken connections, hostile names, full disks."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import random
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from storage_proxy.client import ManagerClient, ProxyClient
from storage_proxy.client import downloading as downloading_module
from storage_proxy.client.manager import TransferTicket
from storage_proxy.client.proxy import Entry, EntryStat, EntryType, ListAnswer
from storage_proxy.client.transfer import Mode, TransferClient, scan_tree
from storage_proxy.core.errors import (
    Conflict,
    FileNotFound,
    IntegrityError,
    InvalidPath,
    NoSpace,
    NotFound,
    ReadOnly,
    ServiceUnavailable,
    TokenInvalid,
    UsageError,
)
from storage_proxy.core.secrets import Secret
from storage_proxy.s3 import S3Client
from tests.conftest import S3Server

from .manager_stack import database_files
from .manager_stack import running as running_manager
from .proxy_stand import ProxyStand, until

MIB = 1024 * 1024
BOTH = pytest.mark.parametrize("mode", list(Mode))


class Relay:
    """A TCP relay before a port that cuts connections: each entry of `cuts` ends one connection after so many bytes
    in one direction ("up" to the server, "down" from it)."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.cuts: list[tuple[str, int]] = []
        self.sent_up = 0
        self._tasks: list[asyncio.Task[None]] = []
        self.passed = asyncio.Event()  # set once `mark` bytes went through
        self.mark = 1 << 62

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        async with asyncio.TaskGroup() as group:
            server = await asyncio.start_server(lambda r, w: self._serve(group, r, w), "127.0.0.1", 0)
            try:
                yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            finally:
                server.close()
                for task in self._tasks:
                    task.cancel()
                await asyncio.sleep(0)  # the aborted transports close in the loop's next round

    async def _serve(
        self, group: asyncio.TaskGroup, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._port)
        both = (writer, inner_writer)
        self._tasks.append(group.create_task(self._pump("up", reader, inner_writer, both)))
        self._tasks.append(group.create_task(self._pump("down", inner_reader, writer, both)))

    async def _pump(
        self, way: str, source: asyncio.StreamReader, sink: asyncio.StreamWriter, both: tuple[asyncio.StreamWriter, ...]
    ) -> None:
        moved = 0
        try:
            while chunk := await source.read(64 * 1024):
                moved += len(chunk)
                if moved >= self.mark:
                    self.passed.set()
                if self.cuts and self.cuts[0][0] == way and moved > self.cuts[0][1]:
                    self.cuts.pop(0)
                    return
                self.sent_up += len(chunk) if way == "up" else 0
                sink.write(chunk)
                await sink.drain()
        except ConnectionError:
            pass
        finally:
            for writer in both:
                writer.transport.abort()


class Detoured(ManagerClient):
    """Sends the transfers to another address than the ticket says."""

    client_url = ""

    def _move(self, ticket: TransferTicket) -> TransferTicket:
        return ticket.model_copy(update={"url": self.client_url + "/" + ticket.url.rpartition("/")[2]})

    async def request_upload(self, folder: str, path: str, size: int) -> TransferTicket:
        return self._move(await super().request_upload(folder, path, size))

    async def request_download(self, folder: str, path: str) -> TransferTicket:
        return self._move(await super().request_download(folder, path))


@dataclass
class Place:
    """A folder with a manager extension and a proxy before it. `detour(url)` sends transfers to another address."""

    manager: Detoured
    transfer: TransferClient
    stand: ProxyStand
    relay: Relay
    relay_url: str
    folder: str

    def through_relay(self) -> None:
        self.manager.client_url = self.relay_url

    async def content(self, relpath: str) -> bytes:
        """What is in S3, past everything of ours."""
        vfid = (await self.manager.folder(self.folder)).vfid
        stream = await self.stand.s3.get(self.stand.bucket, self.stand.prefix(vfid) + relpath)
        async with stream:
            return b"".join([chunk async for chunk in stream.chunks(MIB)])


@pytest_asyncio.fixture
async def place(stand: ProxyStand, tmp_path: Path) -> AsyncIterator[Place]:
    relay = Relay(int(stand.client_url.rpartition(":")[2]))
    proxy = ProxyClient(stand.manager_url, Secret(stand.secret))
    (tmp_path / "manager").mkdir()
    async with (
        proxy,
        running_manager(tmp_path / "manager", proxy, database_files(tmp_path)) as stack,
        Detoured(stack.url, stack.token()) as manager,
        TransferClient(manager) as transfer,
        relay.running() as relay_url,
    ):
        manager.client_url = stand.client_url
        folder = await manager.create_folder("data", "minio")
        yield Place(manager, transfer, stand, relay, relay_url, folder.id)


def write(path: Path, size: int, seed: int = 1) -> bytes:
    data = random.Random(seed).randbytes(size)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return data


class Count:
    """A progress callback."""

    def __init__(self) -> None:
        self.total = 0
        self.steps: list[int] = []

    def __call__(self, count: int) -> None:
        self.total += count
        self.steps.append(count)


# --- the way there and back -------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.asyncio
async def test_a_tree_with_odd_names_comes_back_as_it_was(place: Place, tmp_path: Path, mode: Mode) -> None:
    tree = tmp_path / "tree"
    names = [
        "a b.txt",
        "ünï/日本.txt",
        "plus + and %41.txt",
        "q?&=#.txt",
        "deep/er/still/x",
        "-dash",
        "'quote\"",
        "~t;$`",
    ]
    files = {name: write(tree / name, 10 + index, index) for index, name in enumerate(names)}
    files["empty"] = write(tree / "empty", 0)
    files["parts.bin"] = write(tree / "parts.bin", 17 * MIB)
    (tree / "nothing here").mkdir()
    up, down = Count(), Count()

    sent = await place.transfer.upload_tree(place.folder, tree, "into", mode=mode, progress=up)
    assert (sent.files, sent.bytes, sent.failures) == (len(files), sum(map(len, files.values())), [])
    assert sent.sha256 == {f"into/{name}": hashlib.sha256(data).hexdigest() for name, data in files.items()}
    got = await place.transfer.download_tree(place.folder, "into", tmp_path / "back", mode=mode, progress=down)

    assert (got.files, got.bytes, got.failures) == (sent.files, sent.bytes, [])
    back = {str(p.relative_to(tmp_path / "back")): p for p in (tmp_path / "back").rglob("*")}
    assert {name for name, path in back.items() if path.is_file()} == set(files)
    assert all(back[name].read_bytes() == data for name, data in files.items())
    assert back["nothing here"].is_dir()
    assert up.total == down.total == sent.bytes


@BOTH
@pytest.mark.parametrize("size", [0, 1, 8 * MIB - 1, 8 * MIB, 8 * MIB + 1])
@pytest.mark.asyncio
async def test_sizes_around_a_part(place: Place, tmp_path: Path, mode: Mode, size: int) -> None:
    data = write(tmp_path / "f", size)
    done = await place.transfer.upload_file(place.folder, "dir/f", tmp_path / "f", mode=mode)
    assert (done.size, done.sha256) == (size, hashlib.sha256(data).hexdigest())
    assert await place.content("dir/f") == data
    assert await place.transfer.size(place.folder, "dir/f") == size
    got = await place.transfer.download_file(place.folder, "dir/f", tmp_path / "g", mode=mode, checksum=True)
    assert got.sha256 == done.sha256
    assert (tmp_path / "g").read_bytes() == data
    assert {path.name for path in tmp_path.iterdir()} >= {"f", "g"}
    assert not list(tmp_path.glob(".mooring-*"))


@pytest.mark.asyncio
async def test_an_existing_file_is_replaced_on_both_sides(place: Place, tmp_path: Path) -> None:
    for text in (b"first and long", b"second"):
        (tmp_path / "f").write_bytes(text)
        await place.transfer.upload_file(place.folder, "f", tmp_path / "f")
        await place.transfer.download_file(place.folder, "f", tmp_path / "g")
        assert (tmp_path / "g").read_bytes() == text


@pytest.mark.asyncio
async def test_streams_are_sent_whole(place: Place) -> None:
    await place.transfer.upload_file(place.folder, "memory", io.BytesIO(b"from memory"))
    assert await place.content("memory") == b"from memory"
    read, write_end = os.pipe()
    with os.fdopen(read, "rb") as source, os.fdopen(write_end, "wb") as sink:

        def feed() -> None:
            sink.write(b"x" * 3 * MIB)
            sink.close()

        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(feed))
            group.create_task(place.transfer.upload_file(place.folder, "pipe", source))
        assert os.get_blocking(source.fileno())
    assert await place.content("pipe") == b"x" * 3 * MIB


@pytest.mark.asyncio
async def test_what_is_not_there(place: Place, tmp_path: Path) -> None:
    with pytest.raises(FileNotFound):
        await place.transfer.download_file(place.folder, "nope", tmp_path / "g")
    with pytest.raises(FileNotFound):
        await place.transfer.size(place.folder, "nope")
    with pytest.raises(NotFound):
        await place.transfer.upload_file(place.folder, "f", tmp_path / "nope")
    with pytest.raises(NotFound):
        await place.transfer.upload_tree(place.folder, tmp_path / "nope")
    assert not await place.transfer.is_directory(place.folder, "nope")
    assert await place.transfer.is_directory(place.folder, "")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".mooring", "g"))]


@pytest.mark.asyncio
async def test_a_read_only_folder_refuses(place: Place, s3_server: S3Server, s3: S3Client, bucket: str) -> None:
    await s3.put(bucket, "there/x", b"x")
    folder = await place.manager.bind_folder(
        "fixed",
        "minio",
        bucket,
        prefix="there/",
        read_only=True,
        access_key=s3_server.admin.access_key,
        secret_key=s3_server.admin.secret_key,
    )
    with pytest.raises(ReadOnly):
        await place.transfer.upload_file(folder.id, "y", io.BytesIO(b"y"))


# --- connections that break -------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_broken_upload_goes_on_where_it_stopped(place: Place, tmp_path: Path) -> None:
    data = write(tmp_path / "f", 24 * MIB)
    place.through_relay()
    place.relay.cuts = [("up", 9 * MIB), ("up", 9 * MIB)]
    count = Count()
    done = await place.transfer.upload_file(place.folder, "f", tmp_path / "f", progress=count)
    assert place.relay.cuts == []
    assert done.sha256 == hashlib.sha256(data).hexdigest()
    assert await place.content("f") == data
    assert count.total == len(data)
    assert place.relay.sent_up < len(data) + 6 * MIB  # what had arrived was kept


@pytest.mark.asyncio
async def test_a_lost_answer_does_not_upload_twice(place: Place, tmp_path: Path) -> None:
    data = write(tmp_path / "f", MIB)
    place.through_relay()
    place.relay.cuts = [("down", 0)]
    await place.transfer.upload_file(place.folder, "f", tmp_path / "f")
    assert place.relay.cuts == []
    assert await place.content("f") == data


@pytest.mark.asyncio
async def test_a_broken_download_goes_on_where_it_stopped(place: Place, tmp_path: Path) -> None:
    data = write(tmp_path / "f", 20 * MIB)
    await place.transfer.upload_file(place.folder, "f", tmp_path / "f")
    place.through_relay()
    place.relay.cuts = [("down", 5 * MIB), ("down", 5 * MIB)]
    count = Count()
    await place.transfer.download_file(place.folder, "f", tmp_path / "g", progress=count)
    assert place.relay.cuts == []
    assert (tmp_path / "g").read_bytes() == data
    assert count.total == len(data)


@pytest.mark.asyncio
async def test_an_unreachable_proxy_is_given_up_with_one_sentence(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage_proxy.client.uploading.FIRST_PAUSE_SECONDS", 0.001)
    write(tmp_path / "f", 10)
    await place.transfer.upload_file(place.folder, "f", tmp_path / "f")
    place.manager.client_url = "http://127.0.0.1:1"
    with pytest.raises(ServiceUnavailable, match=r"refused"):
        await place.transfer.upload_file(place.folder, "f", tmp_path / "f")
    with pytest.raises(ServiceUnavailable, match=r"127\.0\.0\.1:1"):
        await place.transfer.download_file(place.folder, "f", tmp_path / "g")


@pytest.mark.asyncio
async def test_a_refusal_arrives_before_the_whole_file_is_sent(place: Place, tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as file:
        file.truncate(256 * MIB)

    class Wrong(Detoured):
        async def request_upload(self, folder: str, path: str, size: int) -> TransferTicket:
            return TransferTicket(token="no.such.token", url=place.stand.client_url + "/upload")

    count = Count()
    async with (
        Wrong(place.manager.base_url, "unused") as wrong,
        TransferClient(wrong) as transfer,
    ):
        with pytest.raises(TokenInvalid):
            await transfer.upload_file(place.folder, "big", tmp_path / "big", progress=count)
    assert max(count.steps, default=0) < 200 * MIB


@pytest.mark.asyncio
async def test_cancelling_ends_at_once_and_the_upload_can_be_repeated(place: Place, tmp_path: Path) -> None:
    data = write(tmp_path / "f", 40 * MIB)
    place.through_relay()
    place.relay.mark = 8 * MIB
    task = asyncio.ensure_future(place.transfer.upload_file(place.folder, "f", tmp_path / "f"))
    async with asyncio.timeout(30):
        await place.relay.passed.wait()
    task.cancel()
    async with asyncio.timeout(3):
        await asyncio.wait([task])
    assert task.cancelled()
    await place.transfer.upload_file(place.folder, "f", tmp_path / "f")
    assert await place.content("f") == data


# --- resuming a download in a later call ------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    size = 2 * MIB
    monkeypatch.setattr(downloading_module, "PIECE_BYTES", size)
    monkeypatch.setattr(downloading_module, "PIECES_AT_ONCE", 1)
    return size


async def break_off(place: Place, target: Path, after: int) -> None:
    """Starts a download and cancels it when `after` bytes are here."""
    reached = asyncio.Event()
    got = 0

    def progress(count: int) -> None:
        nonlocal got
        got += count
        if got >= after:
            reached.set()

    place.through_relay()
    task = asyncio.ensure_future(place.transfer.download_file(place.folder, "f", target, progress=progress))
    async with asyncio.timeout(20):
        await reached.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


@pytest.mark.asyncio
async def test_a_later_call_fetches_only_the_rest(place: Place, tmp_path: Path, small_pieces: int) -> None:
    data = write(tmp_path / "f", 28 * MIB + 5)
    await place.transfer.upload_file(place.folder, "f", tmp_path / "f")
    await break_off(place, tmp_path / "g", 3 * small_pieces)
    assert not (tmp_path / "g").exists()  # nothing under the name before it is whole
    got = await place.transfer.download_file(place.folder, "f", tmp_path / "g")
    assert got.resumed >= 2 * small_pieces
    assert (tmp_path / "g").read_bytes() == data
    assert not list(tmp_path.glob(".mooring-*"))


@pytest.mark.asyncio
async def test_another_version_is_not_mixed_in(place: Place, tmp_path: Path, small_pieces: int) -> None:
    write(tmp_path / "f", 28 * MIB)
    await place.transfer.upload_file(place.folder, "f", tmp_path / "f")
    await break_off(place, tmp_path / "g", 3 * small_pieces)
    newer = write(tmp_path / "f", 28 * MIB, seed=2)
    await place.transfer.upload_file(place.folder, "f", tmp_path / "f")
    count = Count()
    got = await place.transfer.download_file(place.folder, "f", tmp_path / "g", progress=count)
    assert got.resumed == 0
    assert (tmp_path / "g").read_bytes() == newer
    assert count.total == len(newer)


@pytest.mark.asyncio
async def test_a_file_that_changes_under_the_download(place: Place, tmp_path: Path, small_pieces: int) -> None:
    write(tmp_path / "f", 12 * MIB)
    await place.transfer.upload_file(place.folder, "f", tmp_path / "f")
    newer = write(tmp_path / "n", 8 * MIB, seed=3)
    changed: asyncio.Future[Any] | None = None

    def progress(count: int) -> None:
        nonlocal changed
        if changed is None:
            changed = asyncio.ensure_future(place.transfer.upload_file(place.folder, "f", tmp_path / "n"))

    await place.transfer.download_file(place.folder, "f", tmp_path / "g", progress=progress)
    assert changed is not None
    await changed
    assert (tmp_path / "g").read_bytes() in (newer, (tmp_path / "f").read_bytes())  # one of both, whole


@pytest.mark.asyncio
async def test_two_downloads_do_not_write_one_file(place: Place, tmp_path: Path, small_pieces: int) -> None:
    write(tmp_path / "f", 30 * MIB)
    await place.transfer.upload_file(place.folder, "f", tmp_path / "f")
    async with asyncio.TaskGroup() as group:
        first = group.create_task(place.transfer.download_file(place.folder, "f", tmp_path / "g"))
        await until(_exists(tmp_path, ".mooring-*.part"))
        with pytest.raises(Conflict, match="Another download"):
            await place.transfer.download_file(place.folder, "f", tmp_path / "g")
    assert first.result().size == 30 * MIB
    assert (tmp_path / "g").read_bytes() == (tmp_path / "f").read_bytes()


def _exists(folder: Path, pattern: str) -> Any:
    async def look() -> bool:
        return bool(list(folder.glob(pattern)))

    return look


# --- this side of it --------------------------------------------------------------------------------------------------


def test_links_that_lead_out_are_left_out(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    write(tmp_path / "secret", 5)
    write(tree / "a/file", 3)
    (tree / "out").symlink_to(tmp_path / "secret")
    (tree / "a/up").symlink_to("../../secret")
    (tree / "in").symlink_to("a/file")
    (tree / "loop").symlink_to("loop")
    (tree / "broken").symlink_to("nowhere")
    (tree / "dir").symlink_to("a")
    os.mkfifo(tree / "fifo")
    scan = scan_tree(tree)
    assert {file.relpath: file.size for file in scan.files} == {"a/file": 3, "in": 3}
    assert {Path(remark.path).name for remark in scan.skipped} == {"out", "up", "loop", "broken", "dir", "fifo"}


@pytest.mark.asyncio
async def test_a_link_that_is_swapped_in_after_the_scan_is_not_followed(place: Place, tmp_path: Path) -> None:
    write(tmp_path / "secret", 5)
    write(tmp_path / "tree/file", 5)
    scan = scan_tree(tmp_path / "tree")
    (tmp_path / "tree/file").unlink()
    (tmp_path / "tree/file").symlink_to(tmp_path / "secret")
    report = await place.transfer.upload_scan(place.folder, scan)
    assert report.files == 0
    assert [type(failure.error) for failure in report.failures] == [UsageError]
    assert "leads out" in str(report.failures[0].error)


@pytest.mark.parametrize("name", [b"new\nline", b"not\xffutf8", b"bell\x07", b"back\\slash"])
@pytest.mark.asyncio
async def test_names_that_no_folder_takes_are_refused_before_anything_is_sent(
    place: Place, tmp_path: Path, name: bytes
) -> None:
    (tmp_path / "tree").mkdir()
    write(tmp_path / "tree/good", 3)
    Path(os.fsdecode(os.fsencode(tmp_path / "tree") + b"/" + name)).write_bytes(b"x")
    with pytest.raises(InvalidPath, match=r"cannot be uploaded") as caught:
        await place.transfer.upload_tree(place.folder, tmp_path / "tree")
    assert caught.value.hint is not None
    assert "Rename" in caught.value.hint
    str(caught.value).encode()  # can be printed
    assert (await place.manager.files(place.folder)).items == []


@pytest.mark.asyncio
async def test_a_file_that_changes_while_it_is_sent_is_refused(place: Place, tmp_path: Path) -> None:
    write(tmp_path / "f", 30 * MIB)

    def shrink(count: int) -> None:
        if count > 0:
            os.truncate(tmp_path / "f", 1000)

    with pytest.raises(IntegrityError, match=r"changed|shorter"):
        await place.transfer.upload_file(place.folder, "f", tmp_path / "f", progress=shrink)


class Hostile(Detoured):
    """A server whose listing has names that no directory should hold."""

    async def files(
        self, folder: str, path: str = ".", *, cursor: str | None = None, limit: int | None = None
    ) -> ListAnswer:
        page = await super().files(folder, path, cursor=cursor, limit=limit)
        bad = ["..", ".", "", "../up", "a/b", "/etc", "nul\0", "new\nline", "back\\slash"]
        items = [Entry(name=name, type=EntryType.FILE, stat=EntryStat(mode=0o100644, size=1)) for name in bad]
        return page.model_copy(update={"items": [*page.items, *items]})


@pytest.mark.asyncio
async def test_hostile_names_of_the_server_stay_outside(place: Place, tmp_path: Path) -> None:
    await place.transfer.upload_file(place.folder, "good", io.BytesIO(b"good"))
    token = place.manager._headers["Authorization"].removeprefix("Bearer ")
    async with Hostile(place.manager.base_url, token) as hostile, TransferClient(hostile) as transfer:
        hostile.client_url = place.stand.client_url
        report = await transfer.download_tree(place.folder, "", tmp_path / "in/out")
    assert (report.files, report.failures, len(report.skipped)) == (1, [], 9)
    assert [str(p.relative_to(tmp_path / "in")) for p in (tmp_path / "in").rglob("*")] == ["out", "out/good"]


@pytest.mark.asyncio
async def test_a_link_in_the_target_does_not_lead_out(place: Place, tmp_path: Path) -> None:
    for name in ("sub/file", "file"):
        await place.transfer.upload_file(place.folder, name, io.BytesIO(b"new"))
    outside, target = tmp_path / "outside", tmp_path / "target"
    write(outside / "file", 4)
    target.mkdir()
    (target / "sub").symlink_to(outside)
    (target / "file").symlink_to(outside / "file")
    before = (outside / "file").read_bytes()
    report = await place.transfer.download_tree(place.folder, "", target)
    # Making `sub` and writing `sub/file` both stop at the link; `file` replaces the link, not what it points to.
    assert {failure.path for failure in report.failures} == {"sub", "sub/file"}
    assert (outside / "file").read_bytes() == before
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert not (target / "file").is_symlink()
    assert (target / "file").read_bytes() == b"new"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tiny"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.asyncio
async def test_a_full_disk_is_said_and_leaves_nothing(place: Place, tmp_path: Path, tiny_disk: Path) -> None:
    write(tmp_path / "f", 8 * MIB)
    await place.transfer.upload_file(place.folder, "f", tmp_path / "f")
    with pytest.raises(NoSpace, match="full"):
        await place.transfer.download_file(place.folder, "f", tiny_disk / "g")
    assert list(tiny_disk.iterdir()) == []
