"""Looks for the secrets of a running stack wherever they must not be, again and again while it runs."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import redis

from storage_proxy.embedded.endpoints import Endpoints, find_endpoints
from storage_proxy.embedded.state import StateDirectory

MIN_LENGTH = 16


class SecretWatch:
    """A thread from `__enter__` to `__exit__`. `found` names each place where a secret was seen; `looks` counts."""

    def __init__(self, state: StateDirectory) -> None:
        self.state = state
        self.found: set[str] = set()
        self.secrets: dict[str, str] = {}
        self.looks = {"processes": 0, "redis keys": 0, "answers": 0, "log bytes": 0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="secret watch")

    def __enter__(self) -> SecretWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        self.search_logs()

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            self._collect()
            self._search_processes()
            try:
                endpoints = find_endpoints(self.state.path)
            except Exception:  # not up yet, or not any more
                continue
            try:
                self._search_redis(endpoints)
                asyncio.run(self._search_answers(endpoints))
            except (redis.RedisError, aiohttp.ClientError, OSError, TimeoutError):
                continue  # it stops just now

    # --- what is secret -----------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Every generated value: the secrets directory, endpoints.json, and the credentials made for the mounts."""
        for path in _files(self.state.secrets_dir):
            if path.suffix != ".pub":
                self._learn(path)
        for path in (self.state.endpoints_file, self.state.config_dir / "agent.token"):
            self._learn(path)
        for path in _files(self.state.agent_runtime_dir / "creds"):
            for line in _text(path).splitlines():
                self._add(f"mount credential {path.name}", line.rpartition(":")[2])

    def _learn(self, path: Path) -> None:
        text = _text(path)
        try:
            values = list(_secret_values(json.loads(text)))
        except ValueError:
            values = [line for line in text.splitlines() if not line.startswith("-----")]
        for value in values:
            self._add(path.name, value)

    def _add(self, name: str, value: str) -> None:
        value = value.strip()
        if len(value) >= MIN_LENGTH:
            self.secrets[value] = name

    # --- where it must not be -----------------------------------------------------------------------------------------

    def look_at(self, text: str, place: str) -> None:
        for value, name in list(self.secrets.items()):
            if value in text:
                self.found.add(f"{name} in {place}")

    def _search_processes(self) -> None:
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                for name in ("cmdline", "environ"):
                    text = _text(Path("/proc") / entry / name)
                    self.look_at(text, f"{name} of {_text(Path('/proc') / entry / 'comm').strip()}")
                self.looks["processes"] += 1

    def _search_redis(self, endpoints: Endpoints) -> None:
        client = redis.Redis.from_url(endpoints.redis_url.reveal(), decode_responses=True, socket_timeout=5)
        try:
            for key in client.scan_iter(count=1000):
                self.looks["redis keys"] += 1
                kind = client.type(key)
                value = client.hgetall(key) if kind == "hash" else client.get(key) if kind == "string" else kind
                self.look_at(f"{key} {value}", f"Redis key {key}")
        finally:
            client.close()

    async def _search_answers(self, endpoints: Endpoints) -> None:
        manager = {"Authorization": f"Bearer {endpoints.manager.token.reveal()}"}
        admin = {"Authorization": f"Bearer {endpoints.manager.admin_token.reveal()}"}
        proxy = {"X-BackendAI-Storage-Auth-Token": endpoints.proxy.secret.reveal()}
        timeout = aiohttp.ClientTimeout(total=5)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            for path in ("folders", "credentials", "agents", "sessions"):
                for headers in (manager, admin):
                    await self._ask(session, f"{endpoints.manager.url}/v1/{path}", headers)
            for path in ("", "status", "volumes"):
                await self._ask(session, f"{endpoints.proxy.manager_url}/{path}", proxy)
            for path in ("health", "readyz", "metrics"):
                await self._ask(session, f"{endpoints.proxy.internal_url}/{path}", {})
            await self._ask(session, f"{endpoints.manager.url}/health", {})
        connector = aiohttp.UnixConnector(str(endpoints.agent.socket))
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            for path in ("status", "identity", "attachments", "mounts"):
                await self._ask(session, f"http://agent/v1/{path}", {})

    async def _ask(self, session: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> None:
        async with session.get(url, headers=headers) as answer:
            self.looks["answers"] += 1
            self.look_at(f"{dict(answer.headers)} {await answer.text()}", f"the answer of {url}")

    def search_logs(self) -> None:
        for path in _files(self.state.logs_dir):
            text = _text(path)
            self.looks["log bytes"] += len(text)
            self.look_at(text, f"log {path.name}")


def _secret_values(value: object, name: str = "") -> Iterator[str]:
    """Strings of a JSON file whose name says that they are secret (or that are in a key file)."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _secret_values(item, "key" if name == "keys" else key)
    elif isinstance(value, list):
        for item in value:
            yield from _secret_values(item, name)
    elif isinstance(value, str) and name in ("key", "secret", "secret_key", "token", "admin_token"):
        yield value
    elif isinstance(value, str) and name == "redis_url":
        yield value.partition("://:")[2].partition("@")[0]


def _files(folder: Path) -> list[Path]:
    return [Path(base) / name for base, _, names in os.walk(folder) for name in names]


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""
