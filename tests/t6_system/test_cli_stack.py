"""The commands on a running stack: folders, files, credentials, sessions, doctor."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage_proxy.embedded.endpoints import Endpoints
from storage_proxy.embedded.residue import mounts_below

from .commands import PROGRAM, Done, environment, mooring, ok
from .stacks import Up, until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
]

MIB = 1024 * 1024


class Stack:
    """A running stack and the commands on it."""

    def __init__(self, up: Up, endpoints: Endpoints) -> None:
        self.up, self.endpoints = up, endpoints
        self.env = {"MOORING_STATE": str(up.state.path)}

    def run(self, *args: str, text: str | None = None) -> Done:
        return mooring(*args, text=text, env=self.env)

    def ok(self, *args: str, text: str | None = None) -> Done:
        return ok(*args, text=text, env=self.env)

    def json(self, *args: str, text: str | None = None) -> Any:
        return self.ok(*args, "--json", text=text).json()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Up(tmp_path_factory.mktemp("cli") / "s", "--no-job") as up:
        yield Stack(up, up.ready())
        assert up.stop() == 0
        up.assert_nothing_left()


def test_the_nodes_of_a_stack(stack: Stack) -> None:
    """The agent tells Redis, the proxy reads it, the command asks the proxy."""

    def heard() -> bool:
        return [node["state"] for node in stack.json("node", "ls")["nodes"]] == ["running"]

    until(heard, 30, "the agent has reported")
    (node,) = stack.json("node", "ls")["nodes"]
    assert node["agent_id"] == stack.endpoints.agent.id
    listed = stack.ok("node", "ls").out.split("\t")
    assert listed[:2] == [node["agent_id"], "running"]
    shown = stack.json("node", "show", node["agent_id"])
    assert (shown["node"]["pid"], shown["stale"], shown["mounts"]) == (node["pid"], False, [])
    wrong = stack.run("node", "show", "elsewhere")
    assert (wrong.code, "Nothing is known of an agent 'elsewhere'" in wrong.err) == (5, True)


def make_tree(root: Path) -> dict[str, bytes]:
    names = ["a b.txt", "ünï/日本.txt", "plus+%41#?.txt", "deep/er/x.bin"]
    files = {name: random.Random(name).randbytes(1000 + index) for index, name in enumerate(names)}
    files |= {"empty": b"", "big.bin": random.Random(9).randbytes(17 * MIB)}
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return files


def test_a_folder_from_creation_to_deletion(stack: Stack, tmp_path: Path) -> None:
    files = make_tree(tmp_path / "tree")
    (tmp_path / "tree/leak").symlink_to("/etc/passwd")
    made = stack.json("folder", "create", "life")
    assert (made["kind"], made["volume"], made["read_only"]) == ("managed", "minio", False)
    assert stack.run("folder", "create", "life").code == 6
    assert "life" in [folder["name"] for folder in stack.json("folder", "ls")]

    plan = stack.json("folder", "put", str(tmp_path / "tree"), "life:/in/", "--dry-run")
    assert (plan["dry_run"], plan["files"]) == (True, len(files))
    assert [Path(item["path"]).name for item in plan["skipped"]] == ["leak"]
    assert stack.json("folder", "ls", "life") == []
    sent = stack.json("folder", "put", str(tmp_path / "tree"), "life:/in/")
    assert sent["sha256"] == {f"in/tree/{name}": hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert (sent["bytes"], sent["failures"]) == (sum(map(len, files.values())), [])
    stack.ok("folder", "put", f"{tmp_path}/tree/", "life:/flat", "--direct")  # contents only, past the proxy

    listed = {item["path"]: item["size"] for item in stack.json("folder", "ls", "-R", "life:/in/tree")}
    assert {path: size for path, size in listed.items() if path in files} == {n: len(d) for n, d in files.items()}
    usage = stack.json("folder", "usage", "life")
    assert (usage["file_count"], usage["used_bytes"]) == (2 * len(files), 2 * sent["bytes"])
    assert usage["as_of"]

    stack.ok("folder", "get", "life:/in/tree", str(tmp_path / "back"))
    stack.ok("folder", "get", "life:/flat/", str(tmp_path / "flat"), "--direct")
    for name, data in files.items():
        assert (tmp_path / "back/tree" / name).read_bytes() == data
        assert (tmp_path / "flat" / name).read_bytes() == data

    assert stack.run("folder", "rm", "life:/in", "--yes").code == 6  # a directory, without --recursive
    assert stack.run("folder", "rm", "life:/in", "--recursive").code == 2  # nobody can be asked
    assert stack.json("folder", "rm", "life:/in", "-r", "--dry-run")["files"] == len(files)
    stack.ok("folder", "rm", "life:/in", "-r", "--yes")
    stack.ok("folder", "rm", "life:/flat/a b.txt", "--yes")
    assert stack.run("folder", "rm", "life:/flat/a b.txt", "--yes").code == 5
    assert stack.json("folder", "delete", "life", "--dry-run")["files"] == len(files) - 1
    assert stack.run("folder", "delete", "life").code == 2
    stack.ok("folder", "delete", "life", "--yes")
    assert stack.run("folder", "show", "life").code == 5


def test_single_files_and_standard_input(stack: Stack, tmp_path: Path) -> None:
    stack.ok("folder", "create", "single")
    (tmp_path / "one.txt").write_text("one")
    stack.ok("folder", "put", str(tmp_path / "one.txt"), "single:/other name.txt")
    stack.ok("folder", "put", str(tmp_path / "one.txt"), "single:/dir/")
    stack.ok("folder", "put", str(tmp_path / "one.txt"), "single:/dir")  # it is a directory by now
    stack.ok("folder", "put", "-", "single:/from stdin", text="typed")
    names = {item["path"] for item in stack.json("folder", "ls", "-R", "single")}
    assert names == {"other name.txt", "dir", "dir/one.txt", "from stdin"}
    stack.ok("folder", "get", "single:/from stdin", str(tmp_path / "back"))
    assert (tmp_path / "back").read_text() == "typed"
    stack.ok("folder", "mkdir", "single:/p/q", "--parents")
    assert stack.run("folder", "mkdir", "single:/p/q").code == 6
    assert stack.run("folder", "get", "single:/nothing", str(tmp_path)).code == 5
    assert stack.run("folder", "put", str(tmp_path / "one.txt"), "single:/../x").code == 2
    assert stack.run("folder", "put", str(tmp_path / "nothing"), "single").code == 5
    clash = stack.run("folder", "put", str(tmp_path / "one.txt"), str(tmp_path / "one.txt"), "single")
    assert clash.code == 2
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "new\nline").write_text("x")
    bad = stack.run("folder", "put", str(tmp_path / "bad"), "single")
    assert bad.code == 2
    assert "'" + str(tmp_path / "bad") + r"/new\nline'" in bad.err
    assert bad.err.count("\n") == 1


def test_elsewhere_is_named_by_url_and_token(stack: Stack, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(stack.endpoints.manager.token.reveal() + "\n")
    token.chmod(0o600)
    ok("folder", "ls", "--manager-url", stack.endpoints.manager.url, "--token-file", str(token))
    token.write_text("wrong\n")
    done = mooring("folder", "ls", "--manager-url", stack.endpoints.manager.url, "--token-file", str(token))
    assert done.code == 4
    secret = tmp_path / "secret"
    secret.write_text(stack.endpoints.proxy.secret.reveal() + "\n")
    secret.chmod(0o600)
    url = stack.endpoints.proxy.manager_url
    shown = json.loads(ok("volume", "ls", "--proxy-url", url, "--secret-file", str(secret), "--json").out)
    assert [volume["name"] for volume in shown] == ["minio"]
    assert stack.run("volume", "show", "nope").code == 5


def test_credentials_and_a_bound_folder(stack: Stack, tmp_path: Path) -> None:
    s3 = stack.endpoints.s3
    secret = s3.secret_key.reveal()
    stack.ok("folder", "create", "source")
    (tmp_path / "x").write_text("bound")
    stack.ok("folder", "put", str(tmp_path / "x"), "source:/x")
    vfid = stack.json("folder", "show", "source")["vfid"]
    scope, _, hex_ = vfid.partition("/")
    prefix = f"{scope.partition(':')[2].replace('-', '')}/{hex_[:2]}/{hex_[2:4]}/{hex_[4:]}"

    added = stack.ok("credential", "add", "keys", "--access-key", s3.access_key, text=secret + "\n")
    assert secret not in added.out + added.err
    (listed,) = stack.json("credential", "ls")
    assert listed["name"] == "keys"
    assert secret not in json.dumps(listed)
    args = ("--bucket", s3.bucket, "--prefix", prefix, "--read-only", "--credential", "keys")
    bound = stack.json("folder", "bind", "fixed", *args)
    assert (bound["kind"], bound["read_only"], bound["prefix"]) == ("bound", True, prefix + "/")
    assert [item["path"] for item in stack.json("folder", "ls", "fixed")] == ["x"]
    refused = stack.run("folder", "put", str(tmp_path / "x"), "fixed:/y")
    assert refused.code == 4
    assert "read-only" in refused.err
    assert stack.run("credential", "rm", "keys", "--yes").code == 6  # a folder is bound with it
    assert stack.run("folder", "bind", "b2", "--bucket", s3.bucket).code == 2
    wrong = ("folder", "bind", "b3", "--bucket", "no-such-bucket", "--credential", "keys")
    assert stack.run(*wrong).code == 5
    stack.ok("folder", "delete", "fixed", "--yes")
    assert [item["path"] for item in stack.json("folder", "ls", "source")] == ["x"]  # its objects stayed
    stack.ok("credential", "rm", "keys", "--yes")
    assert stack.run("credential", "rm", "keys", "--yes").code == 5


def test_a_session_runs_and_leaves_nothing(stack: Stack, tmp_path: Path) -> None:
    stack.ok("folder", "create", "work")
    (tmp_path / "in.txt").write_text("input")
    stack.ok("folder", "put", str(tmp_path / "in.txt"), "work")
    script = "id -u; cat in.txt > out.txt; sync; cat /dev/stdin; exit 7"
    args = ("session", "run", "--folder", "work:rw:/w", "--workdir", "/w", "--uid", "1234", "--", "sh", "-c", script)
    done = stack.run(*args, text="typed")
    assert (done.code, done.out) == (7, "1234\ntyped"), done
    stack.ok("folder", "get", "work:/out.txt", str(tmp_path / "out.txt"))
    assert (tmp_path / "out.txt").read_text() == "input"
    read_only = stack.run("session", "run", "--json", "-f", "work:ro", "--", "touch", "/home/work/work/no")
    assert read_only.code != 0
    assert "Read-only" in read_only.json()["stderr"]
    assert read_only.json()["exit_code"] == read_only.code
    assert stack.json("session", "ls") == []
    assert stack.run("session", "run", "-f", "nothing", "--", "true").code == 5
    assert stack.run("session", "run", "-f", "work:rw:/../etc", "--", "true").code == 2
    assert stack.json("session", "end", "never-was")["detached"] == 0
    stack.ok("folder", "delete", "work", "--yes")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_session_is_ended(stack: Stack, number: int) -> None:
    name = f"cut-{int(number)}"
    stack.ok("folder", "create", name)
    argv = [*PROGRAM, "session", "run", "-f", name, "--", "sh", "-c", "echo running; sleep 60"]
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(stack.env),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        assert len(stack.json("session", "ls")) == 1
        process.send_signal(number)
        _, err = process.communicate(timeout=40)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert stack.json("session", "ls") == []
    stack.ok("mounts", "gc")
    assert not [mount for mount in mounts_below(stack.up.state.runtime_dir) if mount.is_fuse]
    stack.ok("folder", "delete", name, "--yes")  # refused while a session holds it


def test_doctor_on_the_stack(stack: Stack) -> None:
    done = stack.run("doctor", "--json")
    found = {item["check"]: item for item in done.json()["findings"]}
    assert done.code == 0, done
    names = {"stack", "disk", "storage proxy", "manager extension", "client API", "agent", "redis", "core profile"}
    assert names <= set(found)
    assert found["database of the proxy"]["status"] == found["database of the manager"]["status"] == "ok"
    secrets = [stack.endpoints.s3.secret_key, stack.endpoints.proxy.secret, stack.endpoints.manager.token]
    assert not [secret for secret in secrets if secret.reveal() in done.out + done.err]


def test_doctor_sees_that_a_mount_is_served(stack: Stack) -> None:
    stack.ok("folder", "create", "dead")
    argv = [*PROGRAM, "session", "run", "-f", "dead", "--", "sh", "-c", "echo running; cat"]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(stack.env)
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        served = [item for item in stack.json("doctor")["findings"] if item["check"] == "mounts"]
        assert served[0]["status"] == "ok"
        assert "served by a process" in served[0]["message"]
        process.communicate("", timeout=40)
    assert process.returncode == 0
    until(lambda: stack.json("session", "ls") == [], 10, "no session")
    stack.ok("folder", "delete", "dead", "--yes")


def test_doctor_names_a_dead_mount_without_touching_it(stack: Stack, tmp_path: Path) -> None:
    s3 = stack.endpoints.s3
    keys, place = tmp_path / "keys", tmp_path / "mnt"
    keys.write_text(f"{s3.access_key}:{s3.secret_key.reveal()}\n")
    keys.chmod(0o600)
    place.mkdir()
    options = f"url={s3.url},use_path_request_style,passwd_file={keys}"
    process = subprocess.Popen(["s3fs", "-f", s3.bucket, str(place), "-o", options], stderr=subprocess.DEVNULL)
    try:
        until(lambda: mounts_below(place), 20, "the mount")
        process.kill()
        process.wait(10)
        done = stack.run("doctor", "--json")
        dead = [item for item in done.json()["findings"] if item["check"] == "mounts"]
        assert (done.code, dead[0]["status"]) == (10, "fail")
        assert f"{place} is dead" in dead[0]["message"]
        assert str(place) in dead[0]["remedy"]
    finally:
        process.kill()
        process.wait(10)
        subprocess.run(["umount", "--lazy", str(place)], check=False)
