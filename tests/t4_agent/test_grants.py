"""Grants: only this agent, only this session, only once."""

from __future__ import annotations

import asyncio
import base64
import json

import pytest

from agent_plugin.grants import GrantVerifier
from storage_proxy.core.crypto import SealingKey
from storage_proxy.core.errors import IntegrityError, MooringError, TokenExpired, TokenInvalid
from storage_proxy.core.tokens import Purpose, SigningKey

from .node import AGENT_ID, Node


@pytest.fixture
def verifier(node: Node) -> GrantVerifier:
    return GrantVerifier(AGENT_ID, [node.place / "grant.pub"], node.sealing_key)


def test_a_good_grant(node: Node, verifier: GrantVerifier) -> None:
    request = node.request("bucket", "data")
    grant = verifier.verify(node.grant(request, "session-1"))
    assert (grant.session, grant.request) == ("session-1", request)
    assert verifier.open(grant) == node.credential


def test_for_another_agent(node: Node, verifier: GrantVerifier) -> None:
    with pytest.raises(TokenInvalid, match="InvalidAudience"):
        verifier.verify(node.grant(node.request("bucket"), audience="agent:other"))


def test_expired(node: Node, verifier: GrantVerifier) -> None:
    with pytest.raises(TokenExpired):
        verifier.verify(node.grant(node.request("bucket"), lifetime=-60))


def test_of_another_purpose(node: Node, verifier: GrantVerifier) -> None:
    with pytest.raises(TokenInvalid, match="not for grant"):
        verifier.verify(node.grant(node.request("bucket"), purpose=Purpose.API))


def test_of_another_manager(node: Node, verifier: GrantVerifier) -> None:
    stranger = SigningKey.ed25519_load_or_create(node.place / "stranger.pem")
    with pytest.raises(TokenInvalid, match="not known here"):
        verifier.verify(node.grant(node.request("bucket"), key=stranger))


def test_tampered(node: Node, verifier: GrantVerifier) -> None:
    head, body, signature = node.grant(node.request("bucket")).split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    claims["mount"]["location"]["bucket"] = "somebody-elses"
    forged = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    with pytest.raises(TokenInvalid):
        verifier.verify(f"{head}.{forged}.{signature}")
    for nonsense in ("", "a.b.c", head, f"{head}.{body}."):
        with pytest.raises(TokenInvalid):
            verifier.verify(nonsense)


def test_content_that_is_no_mount(node: Node, verifier: GrantVerifier) -> None:
    request = node.request("bucket").model_copy(update={"vfid": "user:../../etc"})
    with pytest.raises(TokenInvalid, match="no valid mount"):
        verifier.verify(node.grant(request))
    with pytest.raises(TokenInvalid, match="no valid mount"):
        verifier.verify(node.grant(node.request("bucket"), "../session"))


def test_sealed_to_another_agent(node: Node, verifier: GrantVerifier) -> None:
    other = SealingKey.generate()
    with pytest.raises(IntegrityError):
        verifier.open(verifier.verify(node.grant(node.request("bucket", receiver=other.public))))


def test_a_credential_moved_to_another_folder(node: Node, verifier: GrantVerifier) -> None:
    with pytest.raises(IntegrityError):
        verifier.open(verifier.verify(node.grant(node.request("bucket", context="another-credential"))))


def test_a_renewed_manager_key_is_read(node: Node, verifier: GrantVerifier) -> None:
    (node.place / "grant.pem").unlink()
    node.signing_key = SigningKey.ed25519_load_or_create(node.place / "grant.pem")
    assert verifier.verify(node.grant(node.request("bucket"), "s1")).session == "s1"


@pytest.mark.root
@pytest.mark.asyncio
async def test_refused_over_the_api_and_nothing_happens(node: Node, folder: str) -> None:
    request = node.request(folder, "data")
    stranger = SigningKey.ed25519_load_or_create(node.place / "stranger.pem")
    async with node.agent() as agent:
        for grant in (
            node.grant(request, audience="agent:other"),
            node.grant(request, lifetime=-60),
            node.grant(request, key=stranger),
            node.grant(request)[:-4] + "AAAA",
        ):
            with pytest.raises(MooringError) as caught:
                await agent.attach(grant)
            assert caught.value.status in (400, 401)
        assert await agent.attachments() == []
        assert node.residue() == {}


@pytest.mark.root
@pytest.mark.asyncio
async def test_one_grant_at_once_from_many_callers_is_one_attachment(node: Node, folder: str) -> None:
    async with node.agent() as agent:
        grant = node.grant(node.request(folder, "data"))
        specs = await asyncio.gather(*(agent.attach(grant) for _ in range(8)))
        assert len({spec.source for spec in specs}) == 1
        assert len(await agent.attachments()) == 1
