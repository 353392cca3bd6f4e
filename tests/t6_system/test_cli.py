"""The `mooring` command without a stack: its errors, exit codes, plug-ins, configuration files, completion, doctor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from storage_proxy import __version__
from storage_proxy.cli.remote import Remote, looks_remote
from storage_proxy.cli.session import FolderMount
from storage_proxy.core.errors import InvalidPath, UsageError
from tests.conftest import S3Server

from .commands import PROGRAM, environment, mooring, ok


@pytest.fixture
def plugin(tmp_path: Path) -> dict[str, str]:
    """An environment with a foreign package whose commands misbehave, and one that does not even load."""
    place = tmp_path / "site"
    info = place / "foreign-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mooring.commands]\nbroken = foreign_broken:register\nforeign = foreign_ok:register\n"
    )
    (place / "foreign_broken.py").write_text("import does_not_exist\n")
    (place / "foreign_ok.py").write_text(
        """
import asyncio, sys
from storage_proxy.core.errors import NoSpace

def bug(secret: str = "x"):
    raise KeyError("token=abcdef0123456789")

async def group():
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(full())
        tasks.create_task(asyncio.sleep(30))

async def full():
    raise NoSpace("The disk is full of \\x1b[31mred.", hint="Free it.")

async def wait():
    print("waiting", flush=True)
    try:
        await asyncio.sleep(30)
    finally:
        print("cleaned up", flush=True)

def lines():
    for number in range(100_000):
        sys.stdout.write(f"line {number}\\n")

def register(app):
    for command in (bug, group, wait, lines):
        app.command()(command)
"""
    )
    return {"PYTHONPATH": str(place), "TMPDIR": str(tmp_path)}


def test_version_and_help() -> None:
    assert ok("--version").out == f"mooring {__version__}\n"
    for args in (("--help",), ("folder", "--help"), ("folder", "put", "-h"), ("session", "run", "--help")):
        done = ok(*args)
        assert "Usage: mooring" in done.out
        assert done.err == ""


def test_every_command_has_help_and_the_stated_ones_have_json() -> None:
    import typer
    from typer.main import get_command

    from storage_proxy.cli import build_app

    warnings: list[str] = []
    seen: dict[str, set[str]] = {}

    def walk(command: object, path: str) -> None:
        for name, sub in getattr(command, "commands", {}).items():
            walk(sub, f"{path} {name}")
        if not hasattr(command, "commands"):
            seen[path] = {option for item in command.params for option in item.opts}  # type: ignore[attr-defined]
            assert command.help or command.callback.__doc__, path  # type: ignore[attr-defined]

    app = build_app(warn=warnings.append)
    assert isinstance(app, typer.Typer)
    walk(get_command(app), "mooring")
    assert warnings == []
    no_json = {"serve", "sample", "reference", "issue", "rotate", "mount", "umount"}
    lacking = [path for path, options in seen.items() if path.split()[-1] not in no_json and "--json" not in options]
    assert lacking == []
    for path in ("folder put", "folder get", "folder rm", "folder delete"):
        assert {"--dry-run", "--yes"} <= seen[f"mooring {path}"], path


def test_help_starts_fast() -> None:
    before = os.times()
    ok("--help")
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 1.0  # about 0.3 s where nothing else runs; this only catches an import of everything


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("nothing",), 2, "No such command 'nothing'."),
        (("folder", "ls", "--wrong"), 2, "No such option: --wrong"),
        (("folder", "create"), 2, "Missing argument"),
        (("folder", "ls", "data:x"), 9, "No stack runs on"),
        (("config", "check", "proxy", "/nonexistent.toml"), 3, "/nonexistent.toml does not exist"),
        (("config", "sample", "nothing"), 2, "There is no configuration called 'nothing'"),
        (("folder", "ls", "--manager-url", "http://127.0.0.1:1"), 2, "--manager-url needs an API token"),
        (("doctor", "--endpoint", "http://127.0.0.1:1"), 2, "belong together"),
    ],
)
def test_errors_are_one_sentence_or_one_object(tmp_path: Path, args: tuple[str, ...], code: int, words: str) -> None:
    env = {"MOORING_STATE": str(tmp_path / "none")}
    done = mooring(*args, env=env)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("error: ")
    assert words in done.err
    assert done.err.count("\n") == 1
    done = mooring(*args, "--json", env=env)
    assert done.err == ""
    if words not in str(done.json()):  # `config sample` has no --json: that is what it then says
        assert "--json" in done.json()["msg"]
    assert done.json()["exit_code"] == done.code


def test_an_option_of_the_inner_command_is_not_ours(tmp_path: Path) -> None:
    done = mooring("session", "run", "-f", "x", "--", "cat", "--json", env={"MOORING_STATE": str(tmp_path / "none")})
    assert done.code == 9
    assert done.err.startswith("error: No stack runs")


def test_a_service_that_is_not_there_is_named(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("abc\n")
    token.chmod(0o644)
    args = ("folder", "ls", "--manager-url", "http://127.0.0.1:1", "--token-file", str(token))
    loose = mooring(*args)
    assert loose.code == 3
    assert f"chmod 600 {token}" in loose.err
    token.chmod(0o600)
    refused = mooring(*args)
    assert refused.code == 9
    assert "http://127.0.0.1:1: the connection was refused" in refused.err
    assert "abc" not in refused.err.replace(str(token), "")


# --- plug-ins and the ways to end -------------------------------------------------------------------------------------


def test_a_broken_plugin_is_a_warning(plugin: dict[str, str]) -> None:
    done = ok("--help", env=plugin)
    assert "warning: The commands of plug-in 'broken' (foreign_broken:register) did not load" in done.err
    assert "No module named 'does_not_exist'" in done.err
    assert "lines" in done.out


def test_a_bug_is_a_sentence_and_a_traceback_without_secrets(plugin: dict[str, str], tmp_path: Path) -> None:
    done = mooring("bug", env=plugin)
    assert done.code == 1
    sentence = done.err.splitlines()[-1]
    assert sentence.startswith("error: An unexpected KeyError happened in 'mooring bug'. The traceback is in ")
    (written,) = tmp_path.glob("mooring-*.traceback")
    assert str(written) in sentence
    assert written.stat().st_mode & 0o777 == 0o600
    text = written.read_text()
    assert "Traceback" in text
    assert "abcdef0123456789" not in text
    debug = mooring("bug", env={**plugin, "MOORING_DEBUG": "1"})
    assert debug.code == 1
    assert "Traceback" in debug.err


def test_an_error_inside_a_task_group_keeps_its_face(plugin: dict[str, str]) -> None:
    done = mooring("group", env=plugin)
    assert done.code == 7
    assert done.err.splitlines()[-1] == "error: The disk is full of \\x1b[31mred. Free it."


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_clean_up_first(plugin: dict[str, str], number: int, code: int) -> None:
    with subprocess.Popen(
        [*PROGRAM, "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(plugin)
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert out == "cleaned up\n"
    assert "Traceback" not in err


def test_waiting_for_standard_input_can_be_interrupted(tmp_path: Path) -> None:
    """Ctrl-C while a pipe gives nothing: no thread holds the program back."""
    script = (
        "import asyncio, sys\n"
        "from storage_proxy.client.transfer import TransferClient\n"
        "from storage_proxy.cli.output import run_async\n"
        "print('ready', flush=True)\n"
        "run_async(TransferClient(None).upload_file('f', 'name', sys.stdin.buffer))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        begin = time.monotonic()
        while process.poll() is None and time.monotonic() - begin < 15:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                continue
        assert process.poll() is not None
        process.communicate()


def test_a_reader_that_goes_away_is_no_error(plugin: dict[str, str]) -> None:
    with subprocess.Popen(
        [*PROGRAM, "lines"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(plugin)
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 128 + signal.SIGPIPE
    assert [line for line in err.splitlines() if "plug-in" not in line] == []


def test_completion(tmp_path: Path) -> None:
    env = {"_MOORING_COMPLETE": "complete_bash", "COMP_WORDS": "mooring fol", "COMP_CWORD": "1"}
    assert ok(env=env).out.split() == ["folder"]
    env = {"_MOORING_COMPLETE": "complete_bash", "COMP_WORDS": "mooring config sample ma", "COMP_CWORD": "3"}
    assert ok(env=env).out.split() == ["manager"]
    done = ok(
        "--install-completion", "bash", env={"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    )
    assert "completion installed" in done.out


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(entry_points(group="mooring.configs").names))
def test_a_sample_is_a_good_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / "sample.toml"
    file.write_text(ok("config", "sample", name).out)
    file.chmod(0o600)
    done = mooring("config", "check", name, str(file))
    # A sample leaves the choice of secrets to its reader and names files that are not here; its keys must all be known.
    assert done.out == f"{file}: ok\n" or done.code == 3, done
    assert "unknown key" not in done.err
    assert "valid TOML" not in done.err
    file.write_text(file.read_text() + "\n[nonsense]\nx = 1\n")
    wrong = mooring("config", "check", name, str(file))
    assert wrong.code == 3
    assert "nonsense: unknown key" in wrong.err
    assert "| key | default | meaning |" in ok("config", "reference", name).out


# --- words on the command line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "folder", "path", "is_directory"),
    [
        ("data", "data", "", True),
        ("data:", "data", "", True),
        ("data:/", "data", "", True),
        ("data:/a b/ü+%#?", "data", "a b/ü+%#?", False),
        ("data:/dir/", "data", "dir", True),
        ("a:b:/x", "a:b", "x", False),
        ("data:/x:/y", "data", "x:/y", False),
    ],
)
def test_places(text: str, folder: str, path: str, is_directory: bool) -> None:
    assert Remote.parse(text) == Remote(folder, path, is_directory)


@pytest.mark.parametrize("text", ["", ":", ":/x", "data:x", "a/b", "./x"])
def test_what_is_no_place(text: str) -> None:
    with pytest.raises(UsageError):
        Remote.parse(text)


@pytest.mark.parametrize("text", ["data:/../x", "data://x", "data:/a//b", "data:/a/./b", "data:/a\\b", "data:/a\nb"])
def test_hostile_places(text: str) -> None:
    with pytest.raises(InvalidPath):
        Remote.parse(text)


def test_local_and_remote_are_told_apart() -> None:
    assert [looks_remote(text) for text in ("data:/x", "data:", "./data:/x", "/a:/b", "C:x", "plain")] == [
        True, True, False, False, False, False
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "mount"),
    [
        ("data", FolderMount("data", "rw", "/home/work/data")),
        ("data:ro", FolderMount("data", "ro", "/home/work/data")),
        ("data:rw:/mnt/x", FolderMount("data", "rw", "/mnt/x")),
        ("data:/mnt/x/", FolderMount("data", "rw", "/mnt/x")),
        ("a:b:ro:/x", FolderMount("a:b", "ro", "/x")),
    ],
)
def test_folders_of_a_session(text: str, mount: FolderMount) -> None:
    assert FolderMount.parse(text) == mount


# --- doctor -----------------------------------------------------------------------------------------------------------


def key_file(path: Path, access_key: str, secret_key: str) -> str:
    path.write_text(f"{access_key}\n{secret_key}\n")
    path.chmod(0o600)
    return str(path)


def test_doctor_looks_at_an_object_store(s3_server: S3Server, tmp_path: Path) -> None:
    secret = s3_server.admin.secret_key.reveal()
    keys = key_file(tmp_path / "keys", s3_server.admin.access_key, secret)
    env = {"MOORING_STATE": str(tmp_path / "none")}
    where = ("doctor", "--json", "--endpoint", s3_server.endpoint.url, "--access-key-file")
    good = mooring(*where, keys, "--bucket", s3_server.limited_bucket, env=env)
    found = {item["check"]: item for item in good.json()["findings"]}
    assert found["object store"]["status"] == found["core profile"]["status"] == found["clock"]["status"] == "ok"
    assert "conditional-put" in found["extras"]["message"]
    assert {"fuse device", "s3fs", "right to mount", "open files", "podman", "mounts"} <= set(found)
    assert secret not in good.out + good.err

    missing = mooring(*where, keys, "--bucket", "no-such-bucket", env=env)
    assert (missing.code, missing.json()["ok"]) == (5, False)
    wrong = mooring(*where, key_file(tmp_path / "w", s3_server.admin.access_key, "wrong" * 8), env=env)
    assert wrong.code == 8
    failed = [item for item in wrong.json()["findings"] if item["status"] == "fail"]
    assert [item["check"] for item in failed] == ["object store"]
    assert failed[0]["remedy"]


def test_doctor_does_not_wait_for_an_endpoint_that_is_down(tmp_path: Path) -> None:
    keys = key_file(tmp_path / "keys", "A" * 16, "s" * 32)
    begin = time.monotonic()
    done = mooring(
        "doctor", "--endpoint", "http://127.0.0.1:1", "--access-key-file", keys,
        env={"MOORING_STATE": str(tmp_path / "none")},
    )  # fmt: skip
    assert done.code == 8
    assert time.monotonic() - begin < 30
    assert "FAIL\tobject store" in done.out


def test_doctor_fails_for_a_named_stack_that_does_not_run(tmp_path: Path) -> None:
    done = mooring("doctor", "--state", str(tmp_path / "none"))
    assert done.code == 9
    assert "mooring up --state" in done.out
