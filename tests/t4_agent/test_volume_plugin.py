"""Container volumes: the protocol as Docker speaks it, and real Podman on it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import signal
import socket as sockets
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from agent_plugin.containers.volume_book import VolumeBook, VolumeRecord
from agent_plugin.containers.volume_options import VolumeOptions
from agent_plugin.kernel import entries_at, top_at
from storage_proxy.core.errors import ConfigError, NoSpace
from storage_proxy.core.wire import S3Credential
from storage_proxy.s3 import S3Client
from tests.fakes.fault_proxy import ALWAYS, Fault, FaultProxy

from .node import AgentProcess, Node, until, until_async
from .plugin_client import Engine, PluginError
from .podman import Podman, missing_programs, podman_in, podman_trouble

pytestmark = [pytest.mark.root, pytest.mark.asyncio]


def write_key(path: Path, credential: S3Credential, mode: int = 0o600) -> Path:
    path.write_text(f"{credential.access_key}\n{credential.secret_key.reveal()}\n")
    path.chmod(mode)
    return path


def plugin(node: Node, bucket: str, **changes: Any) -> dict[str, Any]:
    """A section with one S3 server and two keys: `all` for the whole bucket, `readers` for reading `data/`."""
    key = write_key(node.place / "volumes.key", node.credential)
    return {
        "socket": str(node.place / "plugin.sock"),
        "volumes": {"minio": {"endpoint": node.endpoint, "bucket": bucket, "credential": "all"}},
        "credentials": {
            "all": {"file": str(key), "allow": [f"minio/{bucket}"]},
            "readers": {"file": str(key), "allow": [f"minio/{bucket}/data"], "read-only": True},
        },
        **changes,
    }


async def gone(node: Node) -> None:
    """Nothing is left. On a busy machine an engine is answered before the mount process has ended."""
    await until(lambda: node.residue() == {}, "nothing is left")


@pytest.fixture
def engine(node: Node) -> Engine:
    return Engine(node.place / "plugin.sock")


# --- the protocol -----------------------------------------------------------------------------------------------------


async def test_an_engine_finds_out_what_this_is(node: Node, folder: str, engine: Engine) -> None:
    async with node.agent(volume_plugin=plugin(node, folder)):
        assert await engine.call("Plugin.Activate") == {"Implements": ["VolumeDriver"]}
        assert await engine.call("VolumeDriver.Capabilities") == {"Capabilities": {"Scope": "local"}}
        for content_type in ("application/json", "application/vnd.docker.plugins.v1.1+json", "text/plain"):
            assert await engine.call("VolumeDriver.List", {}, **{"Content-Type": content_type}) == {"Volumes": []}
        with pytest.raises(PluginError) as caught:
            await engine.call("VolumeDriver.Fly", {})
        assert caught.value.status == 404, "so an engine knows that the call does not exist"
        with pytest.raises(PluginError, match="There is no volume 'none' here"):
            await engine.get("none")


async def test_a_volume_from_create_to_remove(node: Node, folder: str, engine: Engine) -> None:
    """As Docker does it: an id of its own for each container."""
    async with node.agent(volume_plugin=plugin(node, folder)) as agent:
        await engine.create("models", prefix="data", uid="1000", gid="1000", umask="0027")
        await engine.create("models", prefix="data/", uid="1000", gid="1000", umask="027")  # the same
        with pytest.raises(PluginError, match="There is a volume models with other options"):
            await engine.create("models", prefix="other")
        assert (await engine.get("models"))["Mountpoint"] == ""
        assert (await engine.call("VolumeDriver.Path", {"Name": "models"}))["Mountpoint"] == ""

        place = await engine.mount("models", "one")
        assert (place / "hello.txt").read_text() == "hello from data/"
        assert (place / "hello.txt").stat().st_uid == 1000
        assert place.stat().st_mode & 0o777 == 0o750
        top = top_at(place)
        assert top is not None
        assert top.is_shared, "else a container with rslave would never see a repaired mount"
        assert {await engine.mount("models", "two"), await engine.mount("models", "one")} == {place}
        shown = await engine.get("models")
        assert shown["Mountpoint"] == str(place)
        assert shown["Status"]["references"] == 2
        assert (shown["Status"]["state"], shown["Status"]["place"]) == ("live", f"s3://{folder}/data/")
        assert (await engine.call("VolumeDriver.Path", {"Name": "models"}))["Mountpoint"] == str(place)
        (listed,) = (await engine.call("VolumeDriver.List", {}))["Volumes"]
        assert (listed["Name"], listed["Mountpoint"]) == ("models", str(place))
        (mount,) = await agent.mounts()
        assert mount.sessions[0].startswith("vol-models-")

        await engine.unmount("models", "one")
        assert (place / "hello.txt").exists(), "the other container still has it"
        with pytest.raises(PluginError, match=re.escape("Volume models is mounted (1 reference(s)). Remove its")):
            await engine.remove("models")
        await engine.unmount("models", "never-was")
        await engine.unmount("models", "two")
        await engine.unmount("models", "two")
        await gone(node)
        await engine.remove("models")
        await engine.unmount("models", "two")
        with pytest.raises(PluginError, match="no volume 'models'"):
            await engine.remove("models")


async def test_the_same_place_is_one_mount_for_volumes_and_another_for_other_modes(
    node: Node, folder: str, engine: Engine
) -> None:
    async with node.agent(volume_plugin=plugin(node, folder)) as agent:
        await engine.create("one", prefix="data")
        await engine.create("two", prefix="data")
        await engine.create("three", prefix="data", mode="ro", credential="readers")
        places = {await engine.mount(name, "id") for name in ("one", "two", "three")}
        assert len(places) == 3
        assert sorted(mount.mode.value for mount in await agent.mounts()) == ["ro", "rw"]
        with pytest.raises(OSError, match="Read-only"):
            (await engine.mount("three", "id") / "no").touch()
        for name in ("one", "two", "three"):
            await engine.unmount(name, "id")
        await gone(node)


WRONG_OPTIONS: list[tuple[dict[str, str], str]] = [
    ({"colour": "red"}, "There is no option 'colour'. Options are volume, bucket, prefix,"),
    ({"o": "allow_root"}, "There is no option 'o': mount options are the operator's"),
    ({"secret_key": "hush"}, "The option 'secret_key' is refused: whoever may inspect the volume would read"),
    ({"passwd_file": "/etc/hush"}, "The option 'passwd_file' is refused"),
    ({"AWS_ACCESS_KEY_ID": "hush"}, "The option 'AWS_ACCESS_KEY_ID' is refused"),
    ({"mode": "rwx-hush"}, "mode: "),
    ({"uid": "-1"}, "uid: write a number"),
    ({"uid": "4294967295"}, "uid: write a number"),
    ({"umask": "0999"}, "umask: write it in octal"),
    ({"bucket": "Not_A_Bucket"}, "is not a valid bucket name"),
    ({"prefix": "../other"}, "has an empty, '.' or '..' part"),
    ({"volume": "elsewhere"}, "No volume 'elsewhere' is configured. Take one of: minio."),
    ({"credential": "root"}, "No credential 'root' is configured. Take one of: all, readers."),
    ({"bucket": "payroll"}, "Credential all may not be used for s3://payroll/ on volume minio."),
    ({"credential": "readers", "prefix": "other", "mode": "ro"}, "Credential readers may not be used for"),
    ({"credential": "readers", "prefix": "datamine", "mode": "ro"}, "Credential readers may not be used for"),
    (
        {"credential": "readers", "prefix": "data"},
        "Credential readers is for reading only. Add the option mode=ro.",
    ),
]


async def test_wrong_options_and_names(node: Node, folder: str, engine: Engine) -> None:
    async with node.agent(volume_plugin=plugin(node, folder)):
        for options, text in WRONG_OPTIONS:
            with pytest.raises(PluginError, match=re.escape(text)) as caught:
                await engine.create("v", **options)
            assert caught.value.status == 500
            assert "hush" not in str(caught.value)
        for name in ("", "../../etc", "a/b", ".hidden", "x" * 200, "a b"):
            with pytest.raises(PluginError, match="is not a name for a volume"):
                await engine.create(name)
            with pytest.raises(PluginError, match="There is no volume"):
                await engine.mount(name, "id")
            await engine.unmount(name, "id")
        assert await engine.call("VolumeDriver.List", {}) == {"Volumes": []}


@pytest.mark.semantics(5)
async def test_nothing_shows_the_key(node: Node, folder: str, engine: Engine) -> None:
    async with node.agent(volume_plugin=plugin(node, folder)):
        await engine.create("v", prefix="data")
        await engine.mount("v", "id")
        shown = json.dumps([await engine.get("v"), await engine.call("VolumeDriver.List", {})])
        kept = (node.place / "state" / "volumes.json").read_text()
        for secret in (node.credential.secret_key.reveal(), node.credential.access_key):
            assert secret not in shown + kept
        assert (node.place / "state" / "volumes.json").stat().st_mode & 0o777 == 0o600
        await engine.unmount("v", "id")


@pytest.mark.expects_log("has mode 0644")
async def test_a_key_file_that_others_may_read_is_refused(node: Node, folder: str, engine: Engine) -> None:
    async with node.agent(volume_plugin=plugin(node, folder)):
        write_key(node.place / "volumes.key", node.credential, 0o644)
        with pytest.raises(PluginError, match="has mode 0644"):
            await engine.create("v")


@pytest.mark.expects_log("does not accept this credential")
async def test_a_wrong_key_is_said_at_mount(node: Node, folder: str, engine: Engine) -> None:
    wrong = S3Credential(access_key="NOBODY", secret_key=node.credential.secret_key)
    async with node.agent(volume_plugin=plugin(node, folder)):
        write_key(node.place / "volumes.key", wrong)
        await engine.create("v", prefix="data")
        with pytest.raises(PluginError, match="does not accept this credential"):
            await engine.mount("v", "id")
        with pytest.raises(PluginError):
            await engine.mount("v", "other")
        await engine.remove("v")
        await gone(node)


@pytest.mark.expects_log("retry_scheduled")
@pytest.mark.expects_log("was not mounted within")
@pytest.mark.expects_log("did not answer within")
async def test_a_silent_server_is_told_before_the_engine_loses_patience(
    node: Node, folder: str, engine: Engine
) -> None:
    """Podman waits for 5 s and would then show only that it waited. Nothing is left; the next try succeeds."""
    async with FaultProxy(node.endpoint) as proxy:
        section = plugin(node, folder, **{"answer-within": 1.5})
        section["volumes"]["minio"]["endpoint"] = proxy.url
        async with node.agent(volume_plugin=section, mount_deadline=3.0):
            await engine.create("v", prefix="data")
            proxy.add(Fault(hang=True, times=ALWAYS))
            begun = time.monotonic()
            with pytest.raises(PluginError, match=r"Volume v was not mounted within 1.5 s. Check that its S3 server"):
                await engine.mount("v", "id")
            assert time.monotonic() - begun < 4
            proxy.clear()
            await until_async(lambda: _mounts(engine, "v", "id"), "the volume is mounted")
            await engine.unmount("v", "id")
            await gone(node)


async def _mounts(engine: Engine, name: str, reference: str) -> bool:
    try:
        await engine.mount(name, reference)
    except PluginError:
        return False
    return True


async def test_only_configured_users_are_served(node: Node, folder: str, engine: Engine) -> None:
    """The kernel says who is connected, also when the socket lets everybody in."""
    place = node.place / "plugin.sock"
    async with node.agent(volume_plugin=plugin(node, folder)):
        assert place.stat().st_mode & 0o777 == 0o600
        node.place.chmod(0o711)
        place.chmod(0o666)
        assert "User 1000 may not use this agent. Add the uid to [volume-plugin] allowed-uids." in await ask_as(
            1000, place
        )
    async with node.agent(volume_plugin=plugin(node, folder, **{"allowed-uids": [1000]})):
        node.place.chmod(0o711)
        place.chmod(0o666)
        assert '"Implements"' in await ask_as(1000, place)


_ASK = """
import os, socket, sys
os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
sock.sendall(b"POST /Plugin.Activate HTTP/1.1\\r\\nHost: a\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n")
while data := sock.recv(65536):
    print(data.decode())
"""


async def ask_as(uid: int, place: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-c", _ASK, str(place), str(uid)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return output.decode()


async def test_nonsense_is_answered_as_the_protocol_says(node: Node, folder: str, engine: Engine) -> None:
    async with node.agent(volume_plugin=plugin(node, folder)):
        for body in (b"", b"{", b"[]", b"null", b'"v"', b'{"Name": 7}', b"\xff\xfe", b"[" * 9999):
            for call in ("Create", "Get", "Mount", "Path", "Remove", "Unmount"):
                with pytest.raises(PluginError, match=r"is not valid|must be a JSON object"):
                    await engine.send(f"VolumeDriver.{call}", body)
        with pytest.raises(PluginError, match="is not valid"):
            await engine.call("VolumeDriver.Create", {"Name": "v", "Opts": {"uid": 1}})
        assert await engine.call("VolumeDriver.List", {}) == {"Volumes": []}


async def test_an_engine_that_hangs_up(node: Node, folder: str, engine: Engine) -> None:
    """Without a word, in the middle of a request or of a mount: nothing is left, and the plugin goes on."""
    async with node.agent(volume_plugin=plugin(node, folder)):
        await engine.create("v", prefix="data")
        body = json.dumps({"Name": "v", "ID": "id"}).encode()
        head = b"POST /VolumeDriver.Mount HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
        for data in (b"POST /Vol", head + body[:5], head + body):
            with sockets.socket(sockets.AF_UNIX) as sock:
                sock.connect(str(node.place / "plugin.sock"))
                sock.sendall(data)
                await asyncio.sleep(0)
        await gone(node)
        place = await engine.mount("v", "id")
        assert (place / "hello.txt").exists()
        await engine.unmount("v", "id")


async def test_twenty_containers_start_at_once(node: Node, folder: str, engine: Engine) -> None:
    async with node.agent(volume_plugin=plugin(node, folder)) as agent:
        await engine.create("v", prefix="data")
        places = await asyncio.gather(*(engine.mount("v", f"id-{number}") for number in range(20)))
        assert len(set(places)) == 1
        assert len(await agent.mounts()) == 1
        assert len(entries_at(places[0])) == 1
        await asyncio.gather(*(engine.unmount("v", f"id-{number}") for number in range(20)))
        await gone(node)


async def test_what_an_operator_detaches_stays_detached(node: Node, folder: str, engine: Engine) -> None:
    async with node.agent(volume_plugin=plugin(node, folder), reconcile_interval=1.0) as agent:
        await engine.create("v", prefix="data")
        await engine.mount("v", "id")
        (item,) = await agent.attachments()
        await agent.detach_session(item.session_id)
        await until_async(lambda: _referred(engine, "v", 0), "no engine holds it any more")
        assert (await engine.get("v"))["Mountpoint"] == ""
        await engine.unmount("v", "id")
        assert (await engine.mount("v", "id") / "hello.txt").exists()
        await engine.unmount("v", "id")


async def _referred(engine: Engine, name: str, times: int) -> bool:
    return bool((await engine.get(name))["Status"]["references"] == times)


# --- a new start ------------------------------------------------------------------------------------------------------


@pytest.mark.semantics(20)
async def test_volumes_and_references_outlive_the_agent(node: Node, folder: str, engine: Engine) -> None:
    """Killed and started anew: the engine does not mount again what it believes to be mounted."""
    process = AgentProcess(node, volume_plugin=plugin(node, folder), stop_mounts_on_exit=False)
    try:
        client = await process.start()
        await client.close()
        await engine.create("kept", prefix="data")
        await engine.create("idle", prefix="other")
        place = await engine.mount("kept", "id")
        await process.kill()
        client = await process.start()
        assert (place / "hello.txt").read_text() == "hello from data/"
        assert (await engine.get("kept"))["Mountpoint"] == str(place)
        assert await engine.mount("kept", "second") == place
        await engine.unmount("kept", "id")
        assert (place / "hello.txt").exists()
        await engine.unmount("kept", "second")
        for name in ("kept", "idle"):
            await engine.remove(name)
        await gone(node)
        await client.close()
        assert await process.terminate() == 0
    finally:
        await process.close()


def _references(node: Node) -> list[str]:
    """As the book on disk has them, for a volume that is alone."""
    (volume,) = json.loads((node.place / "state" / "volumes.json").read_text())["volumes"]
    found: list[str] = volume["references"]
    return found


async def test_an_agent_killed_at_any_moment_of_a_mount(node: Node, folder: str, engine: Engine) -> None:
    """Afterwards a volume is mounted if and only if its engine was, or could have been, told so."""
    moments = {
        "staged": lambda: bool(node.staged()),
        "in the pool": lambda: any("/pool/" in entry.mount_point for entry in node.mounts()),
        "bound": lambda: any("/ses/" in entry.mount_point for entry in node.mounts()),
        "in the book": lambda: bool(_references(node)),
    }
    process = AgentProcess(node, volume_plugin=plugin(node, folder), stop_mounts_on_exit=False)
    try:
        client = await process.start()
        await engine.create("v", prefix="data")
        for name, reached in moments.items():
            asked = asyncio.ensure_future(engine.mount("v", "id"))
            await until(reached, name)
            await process.kill()
            await asyncio.wait([asked])
            told = asked.exception() is None
            await client.close()
            client = await process.start()
            if _references(node):
                place = Path((await engine.get("v"))["Mountpoint"])
                assert (place / "hello.txt").read_text() == "hello from data/"
                await engine.unmount("v", "id")
            else:
                assert not told
            await gone(node)
        await engine.remove("v")
        await client.close()
        assert await process.terminate() == 0
    finally:
        await process.close()


async def test_an_agent_killed_while_it_unmounts(node: Node, folder: str, engine: Engine) -> None:
    """The engine does not ask again: what it gave back goes all the same."""
    process = AgentProcess(node, volume_plugin=plugin(node, folder), stop_mounts_on_exit=False)
    try:
        client = await process.start()
        await engine.create("v", prefix="data")
        await engine.mount("v", "id")
        asked = asyncio.ensure_future(engine.unmount("v", "id"))
        await until(lambda: not _references(node), "the book has forgotten it")
        await process.kill()
        await asyncio.wait([asked])
        _ = asked.exception()
        await client.close()
        client = await process.start()
        await gone(node)
        await client.close()
        assert await process.terminate() == 0
    finally:
        await process.close()


async def test_what_an_engine_holds_is_mounted_again(node: Node, folder: str, engine: Engine) -> None:
    """The mounts went with the agent, the containers did not: the path comes back without a word of the engine."""
    async with node.agent(volume_plugin=plugin(node, folder)):
        await engine.create("v", prefix="data")
        place = await engine.mount("v", "id")
    await gone(node)
    async with node.agent(volume_plugin=plugin(node, folder)):
        await until(lambda: bool(entries_at(place)), "it is mounted again")
        assert (place / "hello.txt").exists()
        await engine.unmount("v", "id")
        await gone(node)


@pytest.mark.expects_log("retry_scheduled")
@pytest.mark.expects_log("a volume in use is not as it should be")
async def test_a_server_that_is_away_at_the_start(node: Node, folder: str, engine: Engine) -> None:
    async with FaultProxy(node.endpoint) as proxy:
        section = plugin(node, folder)
        section["volumes"]["minio"]["endpoint"] = proxy.url
        async with node.agent(volume_plugin=section):
            await engine.create("v", prefix="data")
            place = await engine.mount("v", "id")
        proxy.add(Fault(status=503, code="ServiceUnavailable", times=ALWAYS))
        async with node.agent(volume_plugin=section, mount_deadline=1.0, reconcile_interval=1.0) as agent:
            await until_async(lambda: _in_trouble(engine, "v"), "the trouble is shown")
            assert [text for text in (await agent.status()).warnings if text.startswith("Volume v: ")]
            proxy.clear()
            await until(lambda: bool(entries_at(place)), "it is mounted again")
            await until_async(lambda: _well(engine, "v"), "and well")
            await engine.unmount("v", "id")
            await gone(node)


async def test_an_attachment_that_no_engine_was_told_of_is_released(node: Node, folder: str, engine: Engine) -> None:
    """What an agent leaves that is killed after it mounted and before it answered."""
    async with node.agent(volume_plugin=plugin(node, folder), stop_mounts_on_exit=False):
        await engine.create("v", prefix="data")
        place = await engine.mount("v", "id")
    book = await VolumeBook.open(node.place / "state" / "volumes.json")
    await book.forget("v", "id")
    await book.close()
    assert (place / "hello.txt").exists()
    async with node.agent(volume_plugin=plugin(node, folder), stop_mounts_on_exit=False):
        await gone(node)
        assert (await engine.get("v"))["Mountpoint"] == ""


@pytest.mark.expects_log("a volume in use is not as it should be")
async def test_a_replaced_credential_file_is_used_without_stopping_containers(
    node: Node, folder: str, engine: Engine
) -> None:
    async with node.agent(volume_plugin=plugin(node, folder), reconcile_interval=1.0) as agent:
        await engine.create("v", prefix="data")
        place = await engine.mount("v", "id")
        (before,) = node.processes()
        wrong = S3Credential(access_key="NOBODY", secret_key=node.credential.secret_key)
        write_key(node.place / "volumes.key", wrong)
        await until_async(lambda: _in_trouble(engine, "v"), "the wrong key is shown")
        assert "does not accept this credential" in (await engine.get("v"))["Status"]["error"]
        assert (place / "hello.txt").exists(), "the mount goes on with the old one"
        assert node.processes() == [before]
        write_key(node.place / "volumes.key", node.credential)
        await another(node, before)
        await until_async(lambda: _well(engine, "v"), "well again")
        assert (place / "hello.txt").read_text() == "hello from data/"
        (mount,) = await agent.mounts()
        assert mount.sessions[0].startswith("vol-v-")
        await engine.unmount("v", "id")
        await gone(node)


async def _in_trouble(engine: Engine, name: str) -> bool:
    return "error" in (await engine.get(name))["Status"]


async def _well(engine: Engine, name: str) -> bool:
    return not await _in_trouble(engine, name)


def record(name: str, *references: str) -> VolumeRecord:
    return VolumeRecord(
        name=name, options=VolumeOptions.parse({"prefix": name}), created=1.0, references=frozenset(references)
    )


async def test_references_count_for_one_boot(tmp_path: Path) -> None:
    book = await VolumeBook.open(tmp_path / "book", boot_id="first")
    await book.put(record("v"))
    await book.refer("v", "one")
    await book.refer("v", "one")
    await book.close()
    same = await VolumeBook.open(tmp_path / "book", boot_id="first")
    assert same.all() == [record("v", "one")]
    await same.close()
    after = await VolumeBook.open(tmp_path / "book", boot_id="second")
    assert after.all() == [record("v")], "no container survives a boot of the host"
    await after.close()


async def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = await VolumeBook.open(tmp_path / "book")
    await book.put(record("v"))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(NoSpace):
            await book.put(record("w"))
        with pytest.raises(NoSpace):
            await book.refer("v", "one")
    assert book.all() == [record("v")]
    await book.refer("v", "two")
    await book.close()
    assert [path.name for path in tmp_path.iterdir()] == ["book"]
    again = await VolumeBook.open(tmp_path / "book")
    assert again.all() == [record("v", "two")]
    await again.close()


@pytest.mark.parametrize("content", ["", "{}", '{"version": 1, "boot', '{"version": 1, "boot_id": "x", "volumes": 7}'])
async def test_a_damaged_book_stops_the_start(tmp_path: Path, content: str) -> None:
    (tmp_path / "book").write_text(content)
    with pytest.raises(ConfigError, match="is damaged"):
        await VolumeBook.open(tmp_path / "book")
    assert (tmp_path / "book").read_text() == content


# --- Podman -----------------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def engine_podman(node: Node) -> AsyncIterator[Podman]:
    """Podman that knows the plugin by the name `mooring`."""
    if reason := missing_programs():
        pytest.skip(reason)
    (node.place / "podman").mkdir()
    settings = f'[engine.volume_plugins]\nmooring = "{node.place / "plugin.sock"}"\n'
    async with podman_in(node.place / "podman", settings) as made:
        if reason := await podman_trouble(made):
            pytest.skip(reason)
        yield made


async def create(podman: Podman, name: str, *options: str) -> tuple[int, str]:
    given = [text for option in options for text in ("--opt", option)]
    return await podman("volume", "create", "--driver", "mooring", *given, name)


async def in_container(podman: Podman, volume: str, script: str, user: str = "1000:1000") -> tuple[int, str]:
    """Runs a shell script in a container of its own with a volume."""
    image = await podman.image()
    return await podman("run", "--rm", "--user", user, "--volume", volume, image, "/bin/sh", "-c", script)


async def start(podman: Podman, volume: str, script: str = "sleep 600") -> str:
    """Starts a container that stays; its name."""
    name = f"t4-{secrets.token_hex(4)}"
    image = await podman.image()
    code, output = await podman("run", "--detach", "--name", name, "--volume", volume, image, "/bin/sh", "-c", script)
    assert code == 0, output
    return name


@pytest.mark.containers
async def test_podman_from_create_to_remove(node: Node, folder: str, engine_podman: Podman, s3: S3Client) -> None:
    podman = engine_podman
    async with node.agent(volume_plugin=plugin(node, folder)) as agent:
        code, output = await create(podman, "models", "prefix=data", "uid=1000", "gid=1000")
        assert (code, output.strip()) == (0, "models")
        code, output = await podman("volume", "ls", "--format", "{{.Driver}} {{.Name}}")
        assert output.split() == ["mooring", "models"]

        # Two containers at a time share one mount; Podman asks for it once.
        first = await start(podman, "models:/data:rslave")
        code, output = await in_container(
            podman, "models:/data:rslave", "cat /data/hello.txt && echo result > '/data/a b.txt'"
        )
        assert (code, output) == (0, "hello from data/")
        assert len(await agent.mounts()) == 1
        code, output = await podman.execute(first, "cat '/data/a b.txt'")
        assert (code, output) == (0, "result\n")
        async with await s3.get(folder, "data/a b.txt") as stream:
            assert await stream.read() == b"result\n"

        code, output = await podman("volume", "inspect", "models")
        (inspected,) = json.loads(output)
        (item,) = await agent.attachments()
        assert inspected["Mountpoint"] == item.source
        assert inspected["Options"] == {"prefix": "data", "uid": "1000", "gid": "1000"}
        assert node.credential.secret_key.reveal() not in output
        code, output = await podman("volume", "rm", "models")
        assert code != 0, "in use"

        await podman.remove(first)
        await gone(node)
        code, output = await podman("volume", "rm", "models")
        assert code == 0, output
        assert json.loads((node.place / "state" / "volumes.json").read_text())["volumes"] == []


@pytest.mark.containers
@pytest.mark.semantics(7)
async def test_podman_with_a_read_only_volume(node: Node, folder: str, engine_podman: Podman) -> None:
    """Also when nobody says `ro` to Podman, and as root of the container."""
    async with node.agent(volume_plugin=plugin(node, folder)):
        code, output = await create(engine_podman, "readers", "prefix=data", "credential=readers", "mode=ro")
        assert code == 0, output
        for user in ("1000:1000", "0:0"):
            code, output = await in_container(
                engine_podman, "readers:/data:rslave", "cat /data/hello.txt; touch /data/no", user
            )
            assert code != 0
            assert output.startswith("hello from data/")
            assert "Read-only" in output
        await gone(node)


@pytest.mark.containers
async def test_podman_shows_what_is_wrong(node: Node, folder: str, engine_podman: Podman) -> None:
    async with node.agent(volume_plugin=plugin(node, folder)):
        for option, text in (
            ("colour=red", "There is no option 'colour'. Options are volume, bucket, prefix, credential, mode, uid,"),
            ("secret_key=hush", "whoever may inspect the volume would read the key in it. Ask the operator to"),
            ("bucket=payroll", "Credential all may not be used for s3://payroll/ on volume minio."),
        ):
            code, output = await create(engine_podman, "v", option)
            assert code != 0
            assert text in output
            assert (await engine_podman("volume", "ls", "--quiet"))[1] == ""
        assert (await create(engine_podman, "v", "prefix=nothing/there"))[0] == 0
        code, output = await in_container(engine_podman, "v:/data", "true")
        assert code != 0
        assert f"There is no directory 'nothing/there/' in bucket '{folder}'. Upload a file into it first" in output
        await gone(node)


@pytest.mark.containers
@pytest.mark.expects_log("retry_scheduled")
@pytest.mark.expects_log("was not mounted within")
async def test_podman_shows_our_reason_and_not_its_own_patience(node: Node, folder: str, engine_podman: Podman) -> None:
    async with FaultProxy(node.endpoint) as proxy:
        section = plugin(node, folder)  # answer-within as it is by default
        section["volumes"]["minio"]["endpoint"] = proxy.url
        async with node.agent(volume_plugin=section, mount_deadline=6.0):
            assert (await create(engine_podman, "v", "prefix=data"))[0] == 0
            proxy.add(Fault(hang=True, times=ALWAYS))
            code, output = await in_container(engine_podman, "v:/data", "true")
            assert code != 0
            assert "Volume v was not mounted within 4 s. Check that its S3 server answers" in output


_READER = "while :; do cat /data/hello.txt >/dev/null 2>&1 && echo y || echo n; sleep 0.05; done >/tmp/seen"


@pytest.mark.containers
@pytest.mark.semantics(12)
async def test_podman_containers_recover_from_a_crash(node: Node, folder: str, engine_podman: Podman) -> None:
    """kill -9 of the mount process under two readers: both go on without a restart, also after one of the agent."""
    podman = engine_podman
    process = AgentProcess(node, volume_plugin=plugin(node, folder), stop_mounts_on_exit=False)
    try:
        client = await process.start()
        code, output = await create(podman, "v", "prefix=data", "uid=1000", "gid=1000")
        assert code == 0, output
        names = [await start(podman, "v:/data:rslave", _READER) for _ in range(2)]
        for crash in (1, 2):
            if crash == 2:
                await client.close()
                await process.kill()
                client = await process.start()
            for name in names:
                await until_reads(podman, name)
            (pid,) = node.processes()
            os.kill(pid, signal.SIGKILL)
            await another(node, pid)
            for name in names:
                await until_reads(podman, name)
        (item,) = await client.attachments()
        assert item.source is not None
        assert len(entries_at(item.source)) == 3, "two stacked on the first"
        for name in names:
            await podman.remove(name)
        code, output = await podman("volume", "rm", "v")
        assert code == 0, output
        await gone(node)
        await client.close()
        assert await process.terminate() == 0
    finally:
        await process.close()


async def another(node: Node, pid: int) -> None:
    """Until another mount process than this one runs."""
    await until(lambda: bool(set(node.processes()) - {pid}), "another mount process", 30.0)


async def until_reads(podman: Podman, name: str) -> None:
    """Until the last three reads of the loop in the container went well."""

    async def reads() -> bool:
        code, output = await podman.execute(name, "/bin/busybox tail -n 3 /tmp/seen")
        return code == 0 and output.split() == ["y", "y", "y"]

    await until_async(reads, f"container {name} reads", 30.0)
