"""The manager extension as an operator meets it: settings, commands, a process that starts and stops."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from manager_ext.config import ManagerConfig
from manager_ext.main import make_state_dir
from storage_proxy.cli import main as command
from storage_proxy.client import ManagerClient
from storage_proxy.core.config import load_config, reference, sample
from storage_proxy.core.errors import ConfigError, ServiceUnavailable
from storage_proxy.core.tokens import SigningKey


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_config(tmp_path: Path, **changes: str) -> Path:
    secret = tmp_path / "proxy.secret"
    secret.write_text("p" * 40)
    secret.chmod(0o600)
    values = {"port": str(free_port()), "manager_url": "http://127.0.0.1:1", "extra": "", **changes}
    path = tmp_path / "manager.toml"
    path.write_text(
        f"""
        [manager]
        state-dir = "{tmp_path / "state"}"
        [api]
        port = {values["port"]}
        [proxy.local]
        manager-url = "{values["manager_url"]}"
        client-url = "https://storage.example.com"
        secret-file = "{secret}"
        {values["extra"]}
        """
    )
    path.chmod(0o600)
    return path


def test_defaults_live_in_the_state_directory(tmp_path: Path) -> None:
    config = load_config(ManagerConfig, write_config(tmp_path), environ={})
    state = tmp_path / "state"
    assert (config.api_secret_file, config.grant_key_file) == (state / "api.secret", state / "grant.pem")
    assert (config.database_url, config.key_file) == (f"sqlite:///{state / 'manager.db'}", state / "keys.json")
    assert (config.grants.lifetime, config.api.host) == (300, "127.0.0.1")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"manager_url": "http://storage.example.com:6022"}, "https"),
        ({"manager_url": "storage.example.com"}, "https://HOST"),
        ({"extra": "[grants]\nlifetime = '2h'"}, "grants.lifetime"),
        ({"extra": "[grants]\nlifetime = 'soon'"}, "as in 1h"),
        ({"extra": "[grants]\nlifetime = true"}, "grants.lifetime"),
        ({"extra": "[grant]\nlifetime = '5m'"}, "grant: unknown key"),
        ({"extra": "[binding]\nallowed-endpoints = ['s3.example.com']"}, "binding"),
        ({"extra": "[proxy.'a b']\nmanager-url='http://127.0.0.1:1'\nclient-url='http://x'\nsecret-file='x'"}, "a b"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(ManagerConfig, write_config(tmp_path, **changes), environ={})


def test_a_configuration_needs_a_proxy(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text("")
    with pytest.raises(ConfigError, match="proxy"):
        load_config(ManagerConfig, path, environ={})


def test_the_sample_loads_with_every_line_in_use(tmp_path: Path) -> None:
    text = sample(ManagerConfig, title="t").replace("# url =", "url =")
    lines = [re.sub(r"^# (?=[a-z-]+ = |\[)", "", line) for line in text.splitlines()]
    path = tmp_path / "m.toml"
    path.write_text("\n".join(lines))
    path.chmod(0o600)
    config = load_config(ManagerConfig, path, environ={})
    assert config.grants.lifetime == 300
    assert config.database_url.startswith("postgresql")


def test_every_setting_is_described() -> None:
    assert "manager-url" in sample(ManagerConfig, title="t")
    for line in reference(ManagerConfig).splitlines():
        assert not line.endswith("|  |"), line


def test_a_state_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="state-dir"):
        make_state_dir(tmp_path / "file" / "state")


def run(*args: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        command(list(args))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_tokens_and_keys_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_config(tmp_path))
    code, out, _ = run(
        "manager", "token", "issue", "--config", path, "--user", "3d9f0f0e-7f3a-4b58-9c79-0d0e6b8f6a11", capsys=capsys
    )
    assert (code, out.count(".")) == (0, 2)
    secret = tmp_path / "state" / "api.secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    code, _, err = run("manager", "token", "issue", "--config", path, "--user", "me", capsys=capsys)
    assert code == 2
    assert "UUID" in err
    code, _, err = run("manager", "keys", "rotate", "--config", path, capsys=capsys)
    assert code == 3
    assert "keys.json" in err


class Daemon:
    """`mooring manager serve` as a child process."""

    def __init__(self, config: Path) -> None:
        self._config = config
        self.process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Daemon:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "storage_proxy",
            "manager",
            "serve",
            "--config",
            str(self._config),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")},
        )
        return self

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
        out, _ = await asyncio.wait_for(self.process.communicate(), 15)
        assert self.process.returncode is not None
        return self.process.returncode, out.decode()

    async def __aexit__(self, *_: Any) -> None:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


@pytest.mark.asyncio
async def test_the_process_serves_and_stops(tmp_path: Path) -> None:
    port = free_port()
    config = write_config(tmp_path, port=str(port))
    async with Daemon(config) as daemon, ManagerClient(f"http://127.0.0.1:{port}", "none") as client:
        async with asyncio.timeout(20):
            while True:
                try:
                    await client.call("GET", "/readyz")
                    break
                except ServiceUnavailable:
                    await asyncio.sleep(0.05)
        health = await client.call("GET", "/health")
        assert b'"degraded"' in health, "the storage proxy of this configuration does not run"
        code, log = await daemon.stop()
    assert code == 0, log
    assert "Traceback" not in log
    state = tmp_path / "state"
    for name in ("api.secret", "grant.pem", "keys.json"):
        assert (state / name).stat().st_mode & 0o777 == 0o600
        assert (state / name).read_text().strip() not in log
    SigningKey.ed25519_public(state / "grant.pub")


@pytest.mark.asyncio
async def test_a_taken_port_is_one_sentence_and_an_exit_code(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        async with Daemon(write_config(tmp_path, port=str(taken.getsockname()[1]))) as daemon:
            assert daemon.process is not None
            out, _ = await asyncio.wait_for(daemon.process.communicate(), 20)
    assert daemon.process.returncode == 9
    assert b"is taken" in out
    assert b"Traceback" not in out
