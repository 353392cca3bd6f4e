"""The manager extension as a whole, in this process, for tests: real SQL, real HTTP, a storage proxy of choice."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from manager_ext.api import AUDIENCE, Services, TokenAuth, build_app
from manager_ext.config import ManagerConfig
from manager_ext.main import GRANT_AUDIENCE, MIGRATIONS, build_services
from manager_ext.models import VERSION_TABLE
from manager_ext.services import KeyFile, Proxies, ProxyPort, StorageProxy
from manager_ext.tokens import issue_token
from storage_proxy.client import ManagerClient
from storage_proxy.core.crypto import SealingKey
from storage_proxy.core.secrets import Secret
from storage_proxy.core.tokens import Purpose, SigningKey, TokenSigner
from storage_proxy.core.wire import MountRequest, S3Credential
from storage_proxy.db import Database, upgrade

ALICE, BOB, ADMIN = (str(uuid.UUID(int=number)) for number in (0xA11CE, 0xB0B, 0xAD))
PROJECT = str(uuid.UUID(int=0x9601EC7))
AGENT_ID = "node-1"
CLIENT_URL = "http://127.0.0.1:6021"


@dataclass
class Stack:
    """`answers` collects every body that the service gave, for the search for secrets."""

    url: str
    db: Database
    services: Services
    signer: TokenSigner
    grant_public: SigningKey
    agent_key: SealingKey
    key_file: Path
    answers: list[str] = field(default_factory=list)

    def token(self, user: str = ALICE, role: str = "user", projects: tuple[str, ...] = (), **options: Any) -> str:
        return issue_token(self.signer, user=user, role=role, projects=projects, **options)

    def client(self, user: str = ALICE, role: str = "user", projects: tuple[str, ...] = ()) -> ManagerClient:
        return ManagerClient(self.url, self.token(user, role, projects))

    async def call(
        self, method: str, path: str, body: object = None, *, token: str | None = None, **headers: str
    ) -> tuple[int, Any]:
        """Raw HTTP, for what the client would not send. Returns (status, JSON)."""
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                method,
                aiohttp.client.URL(self.url + path, encoded=True),
                data=None if body is None else json.dumps(body).encode(),
                headers=headers,
            ) as answer,
        ):
            text = await answer.text()
            self.answers.append(text + repr(dict(answer.headers)))
            return answer.status, json.loads(text) if text else None

    async def register_agent(self) -> None:
        async with self.client(AGENT_ID, "agent") as agent:
            await agent.register_agent(AGENT_ID, self.agent_key.public)

    def open_grant(self, grant: str, agent_id: str = AGENT_ID) -> tuple[str, MountRequest, S3Credential]:
        """What the agent sees: (session id, permission, keys)."""
        claims = TokenSigner(f"agent:{agent_id}", [self.grant_public]).verify(grant, Purpose.GRANT)
        permitted = MountRequest.model_validate(claims.data["mount"])
        opened = self.agent_key.open(permitted.sealed_credential, permitted.credential_id)
        return claims.subject, permitted, S3Credential.from_sealed(opened)


def database_files(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'manager.db'}"


@asynccontextmanager
async def running(
    tmp_path: Path, port: ProxyPort, database_url: str, *, settings: dict[str, Any] | None = None
) -> AsyncIterator[Stack]:
    """Serves the extension on a free port."""
    (tmp_path / "proxy.secret").write_text("x" * 32)
    config = ManagerConfig.model_validate(
        {
            "manager": {"state-dir": tmp_path / "state"},
            "proxy": {
                "local": {
                    "manager-url": "http://127.0.0.1:1",
                    "client-url": CLIENT_URL,
                    "secret-file": tmp_path / "proxy.secret",
                }
            },
            **(settings or {}),
        }
    )
    config.manager.state_dir.mkdir(exist_ok=True)
    db = Database(database_url)
    try:
        await upgrade(db, MIGRATIONS, VERSION_TABLE)
        signer = TokenSigner(AUDIENCE, [SigningKey.hs256(Secret("t" * 32))])
        grant_key = SigningKey.ed25519_load_or_create(config.grant_key_file)
        services = build_services(
            config,
            db,
            Proxies({"local": StorageProxy("local", port, CLIENT_URL)}),
            KeyFile(config.key_file, create=True),
            TokenSigner(GRANT_AUDIENCE, [grant_key]),
        )
        runner = web.AppRunner(
            build_app(services, TokenAuth(signer)), access_log=None, handler_cancellation=True, shutdown_timeout=1
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield Stack(
                url=f"http://127.0.0.1:{runner.addresses[0][1]}",
                db=db,
                services=services,
                signer=signer,
                grant_public=SigningKey.ed25519_public(config.grant_key_file.with_suffix(".pub")),
                agent_key=SealingKey.generate(),
                key_file=config.key_file,
            )
        finally:
            await runner.cleanup()
    finally:
        await db.close()
