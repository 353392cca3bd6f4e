"""Bad input and faults of `mooring up`: a quick end, one sentence with the remedy, the right exit code, no residue."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from storage_proxy.core.secrets import write_private
from storage_proxy.core.wire import S3Credential
from storage_proxy.s3 import S3Client
from tests.conftest import S3Server

from .stacks import SMALL, Up, free_base, until
from .test_up import check_result

FAULT_DEADLINE = 15.0

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
]


def key_file(path: Path, credential: S3Credential, *, secret: str | None = None, mode: int = 0o600) -> Path:
    text = json.dumps({"access_key": credential.access_key, "secret_key": secret or credential.secret_key.reveal()})
    write_private(path, text.encode())
    path.chmod(mode)
    return path


def fails(
    state: Path,
    *args: str,
    code: int,
    words: Sequence[str],
    env: dict[str, str] | None = None,
    before: Sequence[str] = (),
    program: Sequence[str] = (sys.executable, "-m", "storage_proxy"),
    base: int | None = None,
    scratch: Path | None = None,
) -> None:
    """Runs `up --once` and checks the promises that hold for every fault."""
    with Up(state, "--once", *args, env=env, before=before, program=program, base=base, scratch=scratch) as up:
        assert up.wait(60) == code, up.everything
        assert time.monotonic() - up.began < FAULT_DEADLINE, up.err
        errors = [line for line in up.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, up.err
        for word in words:
            assert word in errors[0]
        assert "Traceback" not in up.err
        assert "starting" not in up.err
        if up.state.run_dir.exists():
            up.assert_nothing_left()


@pytest.fixture(scope="module")
def operator_bucket(s3_server: S3Server) -> str:
    name = f"operator-{secrets.token_hex(4)}"

    async def make() -> None:
        async with S3Client(s3_server.endpoint, s3_server.admin) as client:
            await client.create_bucket(name)

    asyncio.run(make())
    return name


def given(s3_server: S3Server, bucket: str, keys: Path) -> list[str]:
    return ["--endpoint", s3_server.endpoint.url, "--access-key-file", str(keys), "--bucket", bucket]


def test_a_wrong_secret(tmp_path: Path, s3_server: S3Server, operator_bucket: str) -> None:
    keys = key_file(tmp_path / "keys", s3_server.admin, secret="not-the-secret-key-of-this-server")
    fails(tmp_path / "s", *given(s3_server, operator_bucket, keys), code=8, words=["secret"])


def test_a_missing_bucket(tmp_path: Path, s3_server: S3Server) -> None:
    keys = key_file(tmp_path / "keys", s3_server.admin)
    fails(tmp_path / "s", *given(s3_server, "no-such-bucket", keys), code=5, words=["no-such-bucket"])


def test_a_key_that_may_not_write(tmp_path: Path, s3_server: S3Server) -> None:
    keys = key_file(tmp_path / "keys", s3_server.limited)
    fails(tmp_path / "s", *given(s3_server, s3_server.limited_bucket, keys), code=8, words=[s3_server.limited_bucket])


def test_an_endpoint_that_is_down(tmp_path: Path, s3_server: S3Server) -> None:
    keys = key_file(tmp_path / "keys", s3_server.admin)
    args = ["--endpoint", "http://127.0.0.1:9", "--access-key-file", str(keys)]
    fails(tmp_path / "s", *args, code=8, words=["127.0.0.1:9"])


def test_an_endpoint_that_never_answers(tmp_path: Path, s3_server: S3Server) -> None:
    keys = key_file(tmp_path / "keys", s3_server.admin)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        args = ["--endpoint", f"http://127.0.0.1:{silent.getsockname()[1]}", "--access-key-file", str(keys)]
        fails(tmp_path / "s", *args, code=8, words=["127.0.0.1"])


def test_a_clock_that_is_wrong_by_an_hour(tmp_path: Path, s3_server: S3Server, operator_bucket: str) -> None:
    """The real server refuses; only this process believes that it is later."""
    late = (
        "import datetime, botocore.auth\n"
        "now = botocore.auth.get_current_datetime\n"
        "botocore.auth.get_current_datetime = lambda *a, **k: now(*a, **k) + datetime.timedelta(hours=1)\n"
        "from storage_proxy.cli import main\n"
        "main()\n"
    )
    keys = key_file(tmp_path / "keys", s3_server.admin)
    fails(
        tmp_path / "s",
        *given(s3_server, operator_bucket, keys),
        code=8,
        words=["clock"],
        program=(sys.executable, "-c", late),
    )


def test_keys_that_others_may_read(tmp_path: Path, s3_server: S3Server, operator_bucket: str) -> None:
    keys = key_file(tmp_path / "keys", s3_server.admin, mode=0o644)
    fails(tmp_path / "s", *given(s3_server, operator_bucket, keys), code=3, words=["mode 0644", "chmod 600"])


def test_an_endpoint_without_keys_and_one_in_clear(tmp_path: Path, s3_server: S3Server) -> None:
    fails(tmp_path / "s", "--endpoint", s3_server.endpoint.url, code=2, words=["--access-key-file"])
    keys = key_file(tmp_path / "keys", s3_server.admin)
    args = ["--endpoint", "http://s3.example.com", "--access-key-file", str(keys)]
    fails(tmp_path / "s", *args, code=2, words=["clear", "--allow-plain-http"])


def test_a_state_directory_that_cannot_be_written(tmp_path: Path) -> None:
    place = tmp_path / "ro"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "test", str(place)], check=True)
    try:
        fails(place / "s", code=3, words=["Read-only file system", "--state DIR"], scratch=tmp_path)
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(tmp_path: Path) -> None:
    place = tmp_path / "tiny"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "test", str(place)], check=True)
    try:
        fails(place / "s", code=7, words=["free", "--state DIR"], scratch=tmp_path)
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_too_small_for_the_job(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "test", str(place)], check=True)
    try:
        fails(place / "s", code=7, words=["the stack with its job needs"], scratch=tmp_path)
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_during_the_job(tmp_path: Path) -> None:
    """Whoever meets it first, the full disk is named as the cause."""
    place = tmp_path / "filling"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=220m", "test", str(place)], check=True)
    try:
        with Up(place / "s", "--once", env=SMALL, scratch=tmp_path) as up:
            up.ready()
            with (place / "fill").open("wb") as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1024 * 1024))
            begin = time.monotonic()
            assert up.wait() == 7, up.everything
            assert time.monotonic() - begin < 2 * FAULT_DEADLINE
            assert "is full" in up.err
            assert "Traceback" not in up.err
            up.assert_nothing_left()
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    base = free_base()
    with socket.socket() as other:
        other.bind(("127.0.0.1", base + 2))
        other.listen()
        fails(tmp_path / "s", code=9, words=[f"127.0.0.1:{base + 2}", "manager API", "--port-base"], base=base)


def test_no_fuse_device(tmp_path: Path) -> None:
    hide = 'mount --bind /dev/null /dev/fuse; exec "$@"'
    before = ["unshare", "--mount", "--propagation", "private", "sh", "-c", hide, "sh"]
    fails(tmp_path / "s", code=10, words=["/dev/fuse", "modprobe fuse"], before=before)


def test_no_right_to_mount(tmp_path: Path) -> None:
    before = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]
    fails(tmp_path / "s", code=10, words=["may not mount", "CAP_SYS_ADMIN"], before=before)


def test_s3fs_is_not_installed(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("unshare", "mount", "podman", "runc", "busybox", "sh", "redis-server"):
        if found := shutil.which(name):
            (programs / name).symlink_to(found)
    fails(tmp_path / "s", code=10, words=["s3fs", "apt-get install s3fs"], env={"PATH": str(programs)})


def test_urls_that_lead_nowhere(tmp_path: Path) -> None:
    fails(tmp_path / "s", "--redis-url", "redis://127.0.0.1:9/0", code=9, words=["Redis"])
    fails(tmp_path / "s", "--database-url", "postgresql://127.0.0.1:9/x", code=9, words=["database"])
    fails(tmp_path / "s", "--database-url", "mysql://127.0.0.1/x", code=3, words=["mysql"])


def test_an_error_in_json(tmp_path: Path) -> None:
    with Up(tmp_path / "s", "--once", "--json", "--redis-url", "redis://127.0.0.1:9/0") as up:
        assert up.wait(30) == 9
        problem = json.loads(up.out)
        assert problem["exit_code"] == 9
        assert problem["error_code"] == "storage-proxy_request_unreachable"
        assert up.err == ""


# --- what still works -------------------------------------------------------------------------------------------------


def test_without_the_right_to_mount_the_rest_runs(tmp_path: Path) -> None:
    before = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]
    with Up(tmp_path / "s", "--json", env=SMALL, before=before) as up:
        up.ready()
        ready, job = until(lambda: len(up.events()) == 2 and up.events(), 90, "the job ends")
        assert "may not mount" in str(ready["warnings"])
        assert "agent" not in up.pids()
        assert (job["ok"], job["runtime"]) == (False, "none")
        assert up.stop() == 10
        up.assert_nothing_left()


def test_the_operators_own_s3_postgres_and_redis(
    tmp_path: Path, s3_server: S3Server, operator_bucket: str, postgres_url: str
) -> None:
    """The same whole job on services that are there already; the stack starts only its own three processes."""
    keys = key_file(tmp_path / "keys", s3_server.admin)
    write_private(tmp_path / "db", postgres_url.encode())
    with _Redis(tmp_path) as redis_url:
        args = [*given(s3_server, operator_bucket, keys), "--database-url", f"@{tmp_path / 'db'}"]
        with Up(tmp_path / "s", "--once", "--json", *args, "--redis-url", redis_url, env=SMALL) as up:
            result = up.result()
            check_result(result)
            assert result["read_only_credential"] == "the operator's own key"
            stack = result["stack"]
            assert isinstance(stack, dict)
            assert stack["database"] == "postgresql"
            assert [part["name"] for part in stack["processes"] if part["pid"]] == ["proxy", "manager", "agent"]
            up.assert_nothing_left()

    async def left() -> list[str]:
        async with S3Client(s3_server.endpoint, s3_server.admin) as client:
            return [item.key async for page in client.list(operator_bucket) for item in page.objects]

    assert asyncio.run(left()) == []


class _Redis:
    """Somebody else's Redis."""

    def __init__(self, tmp_path: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._dir = tmp_path

    def __enter__(self) -> str:
        from storage_proxy.embedded.redis import find_redis_server

        argv = [str(find_redis_server()), "--port", str(self._port), "--bind", "127.0.0.1", "--save", ""]
        self._process = subprocess.Popen(argv, cwd=self._dir, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), 1).close()
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.02)
            else:
                return f"redis://127.0.0.1:{self._port}/0"

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)
