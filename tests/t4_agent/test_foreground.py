"""`mooring mount` and `mooring umount` as a person runs them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent_plugin.foreground import find_credential, parse_place
from agent_plugin.kernel import entries_at
from storage_proxy.core.errors import InvalidIdentifier, InvalidPath, MooringError, UsageError
from storage_proxy.core.wire import S3Credential
from storage_proxy.s3 import S3Client

from .node import Node, until

pytestmark = pytest.mark.root


def environment(credential: S3Credential) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "AWS_ACCESS_KEY_ID": credential.access_key,
        "AWS_SECRET_ACCESS_KEY": credential.secret_key.reveal(),
    }


async def mooring(*arguments: str, env: dict[str, str]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "storage_proxy", *arguments),
        env=env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def ended(process: asyncio.subprocess.Process) -> tuple[int, str, str]:
    async with asyncio.timeout(30):
        output, errors = await process.communicate()
    return process.returncode or 0, output.decode(), errors.decode()


async def run(*arguments: str, env: dict[str, str]) -> tuple[int, str, str]:
    return await ended(await mooring(*arguments, env=env))


@pytest.fixture
def place(node: Node) -> Path:
    path = node.place / "dir"
    path.mkdir()
    return path


@asynccontextmanager
async def mounted(node: Node, url: str, place: Path, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A running `mooring mount` that has said that it is mounted."""
    process = await mooring(
        "mount", url, str(place), "--endpoint", node.endpoint, *options, env=environment(node.credential)
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            line = (await process.stdout.readline()).decode()
        if "mounted" not in line:
            raise AssertionError(f"{line} {await ended(process)}")
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def rooms() -> list[Path]:
    """Private directories that a mount command makes."""
    return [path for parent in ("/run", "/tmp") for path in Path(parent).glob("mooring-mount-*")]


@pytest.mark.asyncio
async def test_mounts_and_ctrl_c_unmounts(node: Node, folder: str, place: Path, s3: S3Client) -> None:
    before = rooms()
    async with mounted(node, f"s3://{folder}/data", place, "--uid", "1000", "--gid", "1000") as process:
        assert (place / "hello.txt").read_text() == "hello from data/"
        (place / "new.txt").write_text("x")
        assert place.stat().st_uid == 1000
        keys = [path for room in rooms() if room not in before for path in room.iterdir() if path.name == "key"]
        assert keys == [], "the key file is wiped as soon as it was read"
        process.send_signal(signal.SIGINT)
        code, _, errors = await ended(process)
        assert (code, errors) == (0, "")
    assert entries_at(place) == []
    assert rooms() == before
    assert (await s3.head(folder, "data/new.txt")).size == 1


@pytest.mark.asyncio
async def test_read_only(node: Node, folder: str, place: Path) -> None:
    async with mounted(node, f"s3://{folder}", place, "--read-only") as process:
        with pytest.raises(OSError, match="Read-only"):
            (place / "data" / "no").touch()
        process.terminate()
        assert (await ended(process))[0] == 0
    assert entries_at(place) == []


@pytest.mark.asyncio
async def test_umount_ends_the_other_command(node: Node, folder: str, place: Path) -> None:
    async with mounted(node, f"s3://{folder}", place, "--json") as process:
        code, output, errors = await run("umount", str(place), "--json", env=environment(node.credential))
        assert (code, json.loads(output), errors) == (0, {"unmounted": 1}, "")
        assert (await ended(process))[0] == 0
    assert entries_at(place) == []


@pytest.mark.asyncio
async def test_umount_of_a_mount_in_use_and_of_a_dead_one(node: Node, folder: str, place: Path) -> None:
    env = environment(node.credential)
    before = rooms()
    async with mounted(node, f"s3://{folder}/data", place) as process:
        with (place / "hello.txt").open() as held:
            code, _, errors = await run("umount", str(place), env=env)
            assert code == 6
            assert "still use" in errors
            assert held.read() == "hello from data/"
        assert entries_at(place)
        process.kill()
    await until(lambda: entries_at(place) == [], "the kernel tells the mount process to end with the command")
    killed = [room for room in rooms() if room not in before]
    assert len(killed) == 2
    async with mounted(node, f"s3://{folder}/data", place) as process:
        os.kill(process.pid, signal.SIGSTOP)  # it would clean up itself
        assert not any(room.exists() for room in killed), "the next command removes what a killed one left"
        (pid,) = [
            int(text)
            for text in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if b"s3fs" in Path(f"/proc/{text}/cmdline").read_bytes()
        ]
        os.kill(pid, signal.SIGKILL)
        code, _, errors = await run("umount", str(place), env=env)
        assert (code, errors) == (0, "")
        os.kill(process.pid, signal.SIGCONT)
    assert entries_at(place) == []
    code, _, errors = await run("umount", str(place), env=env)
    assert code == 5
    assert "Nothing that Mooring could unmount" in errors


@pytest.mark.asyncio
async def test_a_death_ends_the_command_with_its_cause(node: Node, folder: str, place: Path) -> None:
    async with mounted(node, f"s3://{folder}/data", place) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for text in children:
            if b"s3fs" in Path(f"/proc/{text}/cmdline").read_bytes():
                os.kill(int(text), signal.SIGKILL)
        code, _, errors = await ended(process)
        assert code == 10
        assert errors.startswith("error: The s3fs process")
    assert entries_at(place) == []


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("url", "changes", "code", "says"),
    [
        ("s3://BUCKET/data", {"AWS_SECRET_ACCESS_KEY": "wrong"}, 8, "does not accept this credential"),
        ("s3://no-such-bucket", {}, 5, "bucket does not exist"),
        ("s3://BUCKET/none", {}, 5, "no directory"),
        ("s3://BUCKET", {"AWS_ACCESS_KEY_ID": ""}, 2, "no credential"),
        ("s3://BUCKET/../etc", {}, 2, "'..' part"),
        ("http://BUCKET", {}, 2, "not an S3 location"),
        ("s3://BUCKET", {"AWS_SESSION_TOKEN": "t"}, 2, "temporary credentials"),
    ],
)
async def test_what_goes_wrong_is_one_sentence_and_an_exit_code(
    node: Node, folder: str, place: Path, url: str, changes: dict[str, str], code: int, says: str
) -> None:
    before = rooms()
    begun = time.monotonic()
    arguments = ("mount", url.replace("BUCKET", folder), str(place), "--endpoint", node.endpoint)
    got, output, errors = await run(*arguments, env=environment(node.credential) | changes)
    assert time.monotonic() - begun < 15.0
    assert got == code, errors
    assert says in errors
    assert output == ""
    assert errors.count("\n") == 1
    assert entries_at(place) == []
    assert rooms() == before


@pytest.mark.asyncio
async def test_no_program_and_no_server(node: Node, folder: str, place: Path) -> None:
    env = environment(node.credential)
    code, _, errors = await run("mount", f"s3://{folder}", str(place), "--endpoint", "http://127.0.0.1:9", env=env)
    assert code == 8
    assert "cannot connect" in errors
    missing = str(place / "none")
    code, _, errors = await run("mount", f"s3://{folder}", missing, "--endpoint", node.endpoint, env=env)
    assert (code, "does not exist" in errors) == (5, True)
    (place / "file").touch()
    code, _, errors = await run("mount", f"s3://{folder}", str(place), "--endpoint", node.endpoint, env=env)
    assert (code, "not empty" in errors) == (6, True)
    code, _, errors = await run(
        "mount", f"s3://{folder}", str(place), "--endpoint", node.endpoint, "--driver", "x", env=env
    )
    assert code != 0


@pytest.mark.asyncio
async def test_without_the_right_to_mount(node: Node, folder: str, place: Path) -> None:
    """As root without capabilities, as in an ordinary container."""
    process = await asyncio.create_subprocess_exec(
        *("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable, "-m", "storage_proxy"),
        *("mount", f"s3://{folder}", str(place), "--endpoint", node.endpoint),
        env=environment(node.credential),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    code, _, errors = await ended(process)
    assert code == 10
    assert "CAP_SYS_ADMIN" in errors


def test_places() -> None:
    place = parse_place("s3://bucket/a b/%2e", endpoint="https://host", region="eu-1")
    assert (place.bucket, place.prefix, place.region) == ("bucket", "a b/%2e/", "eu-1")
    assert parse_place("s3://bucket/", endpoint="https://host", region="r").prefix == ""
    for url, error in (
        ("bucket/x", UsageError),
        ("s3://", UsageError),
        ("s3://Bad_Bucket", InvalidIdentifier),
        ("s3://bucket/a//b", InvalidPath),
    ):
        with pytest.raises(error):
            parse_place(url, endpoint="https://host", region="r")
    with pytest.raises(UsageError):
        parse_place("s3://bucket", endpoint="host:9000", region="r")


def test_credential_files(tmp_path: Path) -> None:
    path = tmp_path / "key"
    for text in ("AK\nSK\n", '{"access_key": "AK", "secret_key": "SK"}'):
        path.write_text(text)
        path.chmod(0o600)
        found = find_credential(path, {})
        assert (found.access_key, found.secret_key.reveal()) == ("AK", "SK")
    for text, mode in (("AK\n", 0o600), ("{", 0o600), ("AK\nSK", 0o644)):
        path.write_text(text)
        path.chmod(mode)
        with pytest.raises(MooringError):
            find_credential(path, {})
