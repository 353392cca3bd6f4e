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
    stand: ProxyStand, vfid: str, agent: SealingKey, session: str = "s1", mode: str = "rw", **more: str
) -> tuple[dict[str, Any], S3Credential]:
    body = {"volume": "minio", "vfid": vfid, "mode": mode, "recipient_key": agent.public, "session_id": session}
    answer = await stand.call("POST", "/folder/mount-credential", {**body, **more})
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


async def shift(stand: ProxyStand, credential_id: str, **ago: timedelta) -> None:
    """Moves the times of a credential into the past."""
    async with stand.proxy.database.session() as session:
        row = await session.get_one(MountCredential, credential_id)
        for name, span in ago.items():
            setattr(row, name, getattr(row, name) - span)


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


async def test_the_credential_says_when_it_ends(stand: ProxyStand) -> None:
    """Also a key that the S3 server itself would let live: the proxy revokes it at that time."""
    body, key = await issue(stand, await stand.folder(), SealingKey.generate())
    assert body["method"] == "iam"
    assert key.expires_at == datetime.fromisoformat(body["expires_at"])
    await revoke(stand, body["revoke_ref"])


async def test_a_renewed_credential_keeps_its_id_and_its_sessions(stand: ProxyStand) -> None:
    vfid, agent = await stand.folder(), SealingKey.generate()
    body, first = await issue(stand, vfid, agent, "s1")
    await issue(stand, vfid, agent, "s2")
    renewing = {"credential_id": body["credential_id"]}
    same, key = await issue(stand, vfid, agent, "s1", **renewing)
    assert (same, key) == ({**body, "sealed_credential": same["sealed_credential"]}, first), "it is young"

    await shift(stand, body["credential_id"], created_at=timedelta(days=5), expires_at=timedelta(days=5))
    renewed = await asyncio.gather(*(issue(stand, vfid, agent, session, **renewing) for session in ("s1", "s2")))
    assert {answer["credential_id"] for answer, _ in renewed} == {body["credential_id"]}
    assert len({key.access_key for _, key in renewed} | {first.access_key}) == 2, "one new key for all"
    second = renewed[0][1]
    assert second.expires_at is not None
    assert second.expires_at > datetime.now(UTC) + timedelta(days=6)
    assert not await refused(stand, second, vfid)
    assert not await refused(stand, first, vfid), "files may be open on the mount that began with it"

    async with stand.proxy.database.session() as session:
        retired = (await session.scalars(select(MountCredential).where(MountCredential.former_of.is_not(None)))).one()
    assert (retired.state, retired.secret_key) == (CredentialState.RETIRED, None)
    await shift(stand, retired.id, expires_at=timedelta(days=3))
    assert await stand.proxy.services.credentials.sweep() == 1
    await until(lambda: refused(stand, first, vfid))
    assert not await refused(stand, second, vfid)
    await revoke(stand, body["revoke_ref"])
    assert not await refused(stand, second, vfid), "the other session has it still"
    await revoke(stand, renewed[1][0]["revoke_ref"])
    await until(lambda: refused(stand, second, vfid))


async def test_the_last_session_ends_the_former_keys_too(stand: ProxyStand, s3_server: S3Server) -> None:
    vfid, agent = await stand.folder(), SealingKey.generate()
    body, first = await issue(stand, vfid, agent)
    for _ in range(2):
        await shift(stand, body["credential_id"], created_at=timedelta(days=5), expires_at=timedelta(days=5))
        _, last = await issue(stand, vfid, agent, credential_id=body["credential_id"])
    await revoke(stand, body["revoke_ref"])
    for key in (first, last):
        await until(lambda key=key: refused(stand, key, vfid))  # type: ignore[misc]
    async with stand.proxy.database.session() as session:
        assert (await session.scalars(select(MountCredential))).all() == []
    async with ScopedIssuer(s3_server.endpoint, s3_server.admin) as issuer:
        assert await issuer.identities() == []


async def test_an_ended_credential_comes_back_under_its_id(stand: ProxyStand) -> None:
    """What an agent needs that could not ask in time."""
    vfid, agent = await stand.folder(), SealingKey.generate()
    body, first = await issue(stand, vfid, agent)
    await shift(stand, body["credential_id"], created_at=timedelta(days=8), expires_at=timedelta(days=8))
    assert await stand.proxy.services.credentials.sweep() == 1
    await until(lambda: refused(stand, first, vfid))
    again, key = await issue(stand, vfid, agent, credential_id=body["credential_id"])
    assert (again["credential_id"], again["revoke_ref"]) == (body["credential_id"], body["revoke_ref"])
    assert not await refused(stand, key, vfid)
    await revoke(stand, again["revoke_ref"])


async def test_a_renewal_reaches_no_other_folder_mode_or_agent(stand: ProxyStand) -> None:
    vfid, agent = await stand.folder(), SealingKey.generate()
    body, _ = await issue(stand, vfid, agent)
    good = {"volume": "minio", "vfid": vfid, "mode": "rw", "recipient_key": agent.public, "session_id": "s1"}
    changes = [
        ({"vfid": await stand.folder()}, 404),
        ({"mode": "ro"}, 404),
        ({"recipient_key": SealingKey.generate().public}, 404),
        ({"credential_id": "../x"}, 400),
    ]
    for change, status in changes:
        asked = {**good, "credential_id": body["credential_id"], **change}
        answer = await stand.call("POST", "/folder/mount-credential", asked)
        assert answer.status == status, (change, answer.body)
    await revoke(stand, body["revoke_ref"])


async def test_a_renewal_that_the_server_refuses_leaves_the_old_key(stand: ProxyStand, s3_server: S3Server) -> None:
    vfid, agent = await stand.folder(), SealingKey.generate()
    body, first = await issue(stand, vfid, agent)
    await shift(stand, body["credential_id"], created_at=timedelta(days=5), expires_at=timedelta(days=5))
    credentials = stand.proxy.services.credentials
    issuer = credentials._issuers["minio"]
    credentials._issuers["minio"] = ScopedIssuer(s3_server.endpoint, s3_server.limited)  # may make no users
    asked = {"vfid": vfid, "mode": "rw", "recipient_key": agent.public, "session_id": "s1"}
    asked |= {"volume": "minio", "credential_id": body["credential_id"]}
    answer = await stand.call("POST", "/folder/mount-credential", asked)
    assert answer.status == 400, answer.body
    await credentials._issuers["minio"].close()
    credentials._issuers["minio"] = issuer
    assert not await refused(stand, first, vfid)
    async with stand.proxy.database.session() as session:
        assert [row.access_key for row in (await session.scalars(select(MountCredential))).all()] == [first.access_key]
    await revoke(stand, body["revoke_ref"])


async def test_a_key_that_somebody_removed_is_replaced(stand: ProxyStand, s3_server: S3Server) -> None:
    """An agent asks when S3 refuses what it has, however young that is."""
    vfid, agent = await stand.folder(), SealingKey.generate()
    body, first = await issue(stand, vfid, agent)
    async with ScopedIssuer(s3_server.endpoint, s3_server.admin) as issuer:
        for identity in await issuer.identities():
            await issuer.revoke(identity)
        await until(lambda: refused(stand, first, vfid))
        again, second = await issue(stand, vfid, agent, credential_id=body["credential_id"])
        assert again["credential_id"] == body["credential_id"]
        assert not await refused(stand, second, vfid)
        await revoke(stand, again["revoke_ref"])
        assert await issuer.identities() == []
