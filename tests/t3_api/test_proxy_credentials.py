"""Keys for mounts: limited to one folder, sealed to one agent, shared by its sessions, revoked with the last one."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select, update

from storage_proxy.core.crypto import SealingKey
from storage_proxy.core.errors import IntegrityError, S3AccessDenied, S3BadCredential
from storage_proxy.core.wire import S3Credential
from storage_proxy.s3 import S3Client
from storage_proxy.s3.scoped import ScopedIssuer
from storage_proxy.state import CredentialState, CredentialUse, MountCredential
from tests.conftest import S3Server

from .proxy_stand import ProxyStand, until

pytestmark = pytest.mark.asyncio


async def issue(
    stand: ProxyStand, vfid: str, agent: SealingKey, session: str = "s1", mode: str = "rw"
) -> tuple[dict[str, Any], S3Credential]:
    answer = await stand.call(
        "POST",
        "/folder/mount-credential",
        {"volume": "minio", "vfid": vfid, "mode": mode, "recipient_key": agent.public, "session_id": session},
    )
    assert answer.status == 200, answer.body
    body = answer.json()
    key = S3Credential.from_sealed(agent.open(body["sealed_credential"], body["credential_id"]))
    assert key.secret_key.reveal().encode() not in answer.body
    return body, key


async def refused(stand: ProxyStand, key: S3Credential, vfid: str) -> bool:
    async with S3Client(stand.s3.endpoint, key) as client:
        try:
            await client.list_page(stand.bucket, stand.prefix(vfid))
        except (S3BadCredential, S3AccessDenied):
            return True
        return False


async def revoke(stand: ProxyStand, ref: str) -> None:
    await stand.ok("POST", "/folder/mount-credential/revoke", volume="minio", revoke_ref=ref)


async def test_a_key_is_limited_to_its_folder_and_mode(stand: ProxyStand) -> None:
    vfid, neighbour, agent = await stand.folder(), await stand.folder(), SealingKey.generate()
    body, key = await issue(stand, vfid, agent)
    assert body["location"]["prefix"] == stand.prefix(vfid)
    assert body["read_only"] is False
    assert datetime.fromisoformat(body["expires_at"]) > datetime.now(UTC) + timedelta(days=6)
    with pytest.raises(IntegrityError):
        SealingKey.generate().open(body["sealed_credential"], body["credential_id"])
    async with S3Client(stand.s3.endpoint, key) as client:
        await client.put(stand.bucket, stand.prefix(vfid) + "f", b"mine")
        with pytest.raises(S3AccessDenied):
            await client.put(stand.bucket, stand.prefix(neighbour) + "f", b"theirs")
    reading, key = await issue(stand, vfid, agent, "s2", "ro")
    assert reading["read_only"] is True
    assert reading["credential_id"] != body["credential_id"]
    async with S3Client(stand.s3.endpoint, key) as client:
        async with await client.get(stand.bucket, stand.prefix(vfid) + "f") as stream:
            assert await stream.read() == b"mine"
        with pytest.raises(S3AccessDenied):
            await client.put(stand.bucket, stand.prefix(vfid) + "f", b"changed")
    await revoke(stand, body["revoke_ref"])
    await revoke(stand, reading["revoke_ref"])


async def test_sessions_of_one_agent_share_a_key_until_the_last_one_goes(stand: ProxyStand) -> None:
    vfid, agent = await stand.folder(), SealingKey.generate()
    issued = await asyncio.gather(*(issue(stand, vfid, agent, f"s{number}") for number in range(4)))
    assert len({body["credential_id"] for body, _ in issued}) == 1
    again, key = await issue(stand, vfid, agent, "s0")
    assert again["revoke_ref"] == issued[0][0]["revoke_ref"]
    other, _ = await issue(stand, vfid, SealingKey.generate(), "s9")
    assert other["credential_id"] != again["credential_id"]
    for body, _ in issued[:3]:
        await revoke(stand, body["revoke_ref"])
        await revoke(stand, body["revoke_ref"])
    assert not await refused(stand, key, vfid)
    await revoke(stand, issued[3][0]["revoke_ref"])
    await until(lambda: refused(stand, key, vfid))
    await revoke(stand, other["revoke_ref"])
    async with stand.proxy.database.session() as session:
        assert (await session.execute(select(MountCredential))).scalars().all() == []
        assert (await session.execute(select(CredentialUse))).scalars().all() == []


async def test_nothing_secret_is_stored_in_clear(stand: ProxyStand) -> None:
    body, key = await issue(stand, await stand.folder(), SealingKey.generate())
    files = [path for path in stand.config.storage_proxy.state_dir.iterdir() if path.is_file()]
    assert files
    assert not any(key.secret_key.reveal().encode() in path.read_bytes() for path in files)
    await revoke(stand, body["revoke_ref"])


async def test_deleting_a_folder_revokes_its_keys(stand: ProxyStand) -> None:
    vfid = await stand.folder()
    body, key = await issue(stand, vfid, SealingKey.generate())
    await stand.ok("POST", "/folder/delete", volume="minio", vfid=vfid)
    await until(lambda: refused(stand, key, vfid))
    await revoke(stand, body["revoke_ref"])


async def test_the_sweep_ends_what_expired_and_what_a_dead_process_was_making(
    stand: ProxyStand, s3_server: S3Server
) -> None:
    vfid, credentials = await stand.folder(), stand.proxy.services.credentials
    _, expired = await issue(stand, vfid, SealingKey.generate())
    _, orphan = await issue(stand, vfid, SealingKey.generate())
    past = datetime.now(UTC) - timedelta(minutes=10)
    async with stand.proxy.database.session() as session:
        mine = MountCredential.access_key == expired.access_key
        await session.execute(update(MountCredential).where(mine).values(expires_at=past))
        other = MountCredential.access_key == orphan.access_key
        crashed = {"state": CredentialState.ISSUING, "revoke_ref": None, "created_at": past}
        await session.execute(update(MountCredential).where(other).values(**crashed))
    assert await credentials.sweep() == 2
    await until(lambda: refused(stand, expired, vfid))
    await until(lambda: refused(stand, orphan, vfid))
    async with ScopedIssuer(s3_server.endpoint, s3_server.admin) as issuer:
        assert await issuer.identities() == []


async def test_refusals(stand: ProxyStand, s3_server: S3Server, s3: S3Client) -> None:
    await s3.put(s3_server.limited_bucket, "bound/x", b"")
    bound = await stand.bind(s3_server.limited_bucket, s3_server.limited, "bound")
    agent = SealingKey.generate()
    good: dict[str, Any] = {
        "volume": "minio",
        "vfid": await stand.folder(),
        "mode": "rw",
        "recipient_key": agent.public,
        "session_id": "s",
    }
    cases = [
        ({"vfid": bound}, 400),
        ({"vfid": stand.vfid()}, 404),
        ({"mode": "rwx"}, 400),
        ({"recipient_key": "A" * 42 + "!"}, 400),
        ({"recipient_key": "short"}, 400),
        ({"session_id": "../x"}, 400),
    ]
    for change, status in cases:
        answer = await stand.call("POST", "/folder/mount-credential", {**good, **change})
        assert answer.status == status, (change, answer.body)
    async with stand.proxy.database.session() as session:
        assert (await session.execute(select(MountCredential))).scalars().all() == []
