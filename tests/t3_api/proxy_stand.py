"""A real storage proxy on free ports, before the real S3 server of the test run; its fixtures are in `conftest.py`."""

from __future__ import annotations

import asyncio
import io
import json
import secrets
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import yarl
from aiohttp import web
from sqlalchemy import update

from storage_proxy.config import ProxyConfig
from storage_proxy.core.wire import S3Credential
from storage_proxy.main import Proxy, open_proxy
from storage_proxy.s3 import S3Client
from storage_proxy.state import Upload

HEADER = "X-BackendAI-Storage-Auth-Token"


def proxy_config(
    state_dir: Path,
    *,
    endpoint: str,
    bucket: str,
    credential: S3Credential,
    volume: Mapping[str, Any] | None = None,
    section: Mapping[str, Any] | None = None,
    database_url: str | None = None,
    redis_url: str | None = None,
) -> tuple[ProxyConfig, list[str]]:
    """A configuration with ports that the system picks, and its two manager secrets."""
    manager_secrets = [secrets.token_urlsafe(24), secrets.token_urlsafe(24)]
    data: dict[str, Any] = {
        "storage-proxy": {"secret": secrets.token_urlsafe(32), "state-dir": str(state_dir), **(section or {})},
        "client-api": {"port": 0},
        "manager-api": {"port": 0, "secrets": manager_secrets},
        "internal-api": {"port": 0},
        "volume": {
            "minio": {
                "backend": "minio",
                "endpoint": endpoint,
                "bucket": bucket,
                "options": {
                    "minio-access-key": credential.access_key,
                    "minio-secret-key": credential.secret_key.reveal(),
                },
                **(volume or {}),
            }
        },
    }
    if database_url:
        data["database"] = {"url": database_url}
    if redis_url:
        data["redis"] = {"url": redis_url}
    return ProxyConfig.model_validate(data), manager_secrets


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class ProxyStand:
    """A running proxy with the means to call it."""

    proxy: Proxy
    config: ProxyConfig
    secret: str
    other_secret: str
    manager_url: str
    client_url: str
    internal_url: str
    http: aiohttp.ClientSession
    s3: S3Client
    bucket: str
    scope: str = field(default_factory=lambda: f"user:{uuid.uuid4()}")

    def vfid(self) -> str:
        return f"{self.scope}/{uuid.uuid4().hex}"

    async def call(
        self, method: str, path: str, body: object = None, *, secret: str | None = "", **kwargs: Any
    ) -> Answer:
        """A manager's request; `secret` "" sends the right one, None sends none."""
        headers = dict(kwargs.pop("headers", {}))
        if secret is not None:
            headers[HEADER] = secret or self.secret
        async with self.http.request(method, self.manager_url + path, json=body, headers=headers, **kwargs) as got:
            return Answer(got.status, got.headers, await got.read())

    async def ok(self, method: str, path: str, /, **body: object) -> Any:
        answer = await self.call(method, path, body)
        assert answer.status < 300, (answer.status, answer.body)
        return answer.json() if answer.body else None

    async def client(self, method: str, path: str, token: str, query: str = "", **kwargs: Any) -> Answer:
        url = f"{self.client_url}{path}?token={token}{query}"
        async with self.http.request(method, url, allow_redirects=False, **kwargs) as got:
            return Answer(got.status, got.headers, await got.read())

    async def folder(self) -> str:
        vfid = self.vfid()
        await self.ok("POST", "/folder/create", volume="minio", vfid=vfid, options={})
        return vfid

    async def bind(self, bucket: str, credential: S3Credential, prefix: str = "", *, read_only: bool = False) -> str:
        vfid = self.vfid()
        binding = {
            "bucket": bucket,
            "prefix": prefix,
            "read_only": read_only,
            "credential": {"access_key": credential.access_key, "secret_key": credential.secret_key.reveal()},
        }
        await self.ok("POST", "/folder/create", volume="minio", vfid=vfid, options={"binding": binding})
        return vfid

    async def upload_token(self, vfid: str, path: str, size: int) -> str:
        answer = await self.ok("POST", "/folder/file/upload", volume="minio", vfid=vfid, relpath=path, size=size)
        return str(answer["token"])

    async def download_token(self, vfid: str, path: str) -> str:
        answer = await self.ok("POST", "/folder/file/download", volume="minio", vfid=vfid, relpath=path)
        return str(answer["token"])

    async def put(self, vfid: str, path: str, data: bytes) -> None:
        token = await self.upload_token(vfid, path, len(data))
        answer = await self.patch(token, 0, data)
        assert answer.status == 204, answer.body

    async def patch(self, token: str, offset: int, data: Any, **headers: str) -> Answer:
        body = io.BytesIO(data) if isinstance(data, bytes) else data  # aiohttp warns of large bytes
        return await self.client(
            "PATCH", "/upload", token, data=body, headers={"Upload-Offset": str(offset), **headers}
        )

    async def put_part(self, url: str, data: bytes) -> str:
        """The ETag of a part sent to a presigned link."""
        async with self.http.put(yarl.URL(url, encoded=True), data=io.BytesIO(data)) as answer:
            assert answer.status == 200
            return answer.headers["ETag"]

    async def get(self, vfid: str, path: str) -> bytes:
        answer = await self.client("GET", "/download", await self.download_token(vfid, path))
        assert answer.status == 200, answer.body
        return answer.body

    async def names(self, vfid: str, path: str = ".", **more: object) -> list[str]:
        answer = await self.ok("POST", "/folder/file/list", volume="minio", vfid=vfid, relpath=path, **more)
        return sorted(item["name"] for item in answer["items"])

    async def change_uploads(self, **values: object) -> None:
        async with self.proxy.database.session() as session:
            await session.execute(update(Upload).values(**values))

    async def expire_uploads(self) -> None:
        await self.change_uploads(expires_at=datetime.now(UTC) - timedelta(seconds=1))

    async def forget_progress(self) -> None:
        """What the row looks like when the writing process was killed."""
        past = datetime.now(UTC) - timedelta(seconds=1)
        await self.change_uploads(offset=0, done=False, lease="0" * 32, lease_until=past)

    def prefix(self, vfid: str) -> str:
        scope, _, folder = vfid.partition("/")
        return f"{uuid.UUID(scope.partition(':')[2]).hex}/{folder[:2]}/{folder[2:4]}/{folder[4:]}/"


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 10) -> None:
    """Polls until `condition` holds; TimeoutError after `seconds`."""
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110  # what is waited for happens elsewhere, often in another process
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(
    config: ProxyConfig, manager_secrets: list[str], s3: S3Client, bucket: str
) -> AsyncIterator[ProxyStand]:
    """Runs the proxy in this loop, with the same runner settings as the real server but on ports 0."""
    async with open_proxy(config) as proxy:
        runners, urls = [], []
        try:
            for listener in proxy.listeners:
                runner = web.AppRunner(listener.app, access_log=None, handler_cancellation=True, shutdown_timeout=2)
                await runner.setup()
                runners.append(runner)
                await web.TCPSite(runner, "127.0.0.1", 0).start()
                urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as http:
                yield ProxyStand(proxy, config, *manager_secrets, *urls, http, s3, bucket)
        finally:
            for runner in runners:
                await runner.cleanup()
