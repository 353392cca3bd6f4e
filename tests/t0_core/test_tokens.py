"""Tokens: one purpose, one audience, one time."""

from datetime import timedelta
from pathlib import Path

import jwt
import pytest

from storage_proxy.core.errors import ConfigError, TokenExpired, TokenInvalid
from storage_proxy.core.secrets import Secret
from storage_proxy.core.tokens import LEEWAY_SECONDS, Purpose, SigningKey, TokenSigner

SECRET = Secret("0123456789abcdef0123456789abcdef")


@pytest.fixture
def signer() -> TokenSigner:
    return TokenSigner("mooring-client", [SigningKey.hs256(SECRET)])


def test_a_token_round_trips(signer: TokenSigner) -> None:
    token = signer.issue(Purpose.UPLOAD, "somebody", timedelta(minutes=5), {"relpath": "a/b", "size": 3})
    claims = signer.verify(token, Purpose.UPLOAD)
    assert (claims.subject, dict(claims.data)) == ("somebody", {"relpath": "a/b", "size": 3})
    assert claims.token_id


def test_other_purposes_and_audiences_are_refused(signer: TokenSigner) -> None:
    token = signer.issue(Purpose.UPLOAD, "s", timedelta(minutes=5), {})
    with pytest.raises(TokenInvalid):
        signer.verify(token, Purpose.DOWNLOAD)
    with pytest.raises(TokenInvalid):
        TokenSigner("mooring-manager", [SigningKey.hs256(SECRET)]).verify(token, Purpose.UPLOAD)


def test_an_expired_token_is_refused_after_the_leeway(signer: TokenSigner) -> None:
    token = signer.issue(Purpose.UPLOAD, "s", timedelta(seconds=-LEEWAY_SECONDS - 5), {})
    with pytest.raises(TokenExpired):
        signer.verify(token, Purpose.UPLOAD)


def test_forged_tokens_are_refused(signer: TokenSigner) -> None:
    good = signer.issue(Purpose.UPLOAD, "s", timedelta(minutes=5), {})
    claims = jwt.decode(good, options={"verify_signature": False})
    unsigned = jwt.encode(claims, None, algorithm="none", headers={"kid": "1"})
    other_key = jwt.encode(claims, "x" * 40, algorithm="HS256", headers={"kid": "1"})
    other_kid = jwt.encode(claims, SECRET.reveal(), algorithm="HS256", headers={"kid": "2"})
    incomplete = jwt.encode({"aud": "mooring-client"}, SECRET.reveal(), algorithm="HS256", headers={"kid": "1"})
    for token in (unsigned, other_key, other_kid, incomplete, "", "a.b.c", good[:-4], good.upper()):
        with pytest.raises(TokenInvalid) as caught:
            signer.verify(token, Purpose.UPLOAD)
        assert not token or token not in str(caught.value)


def test_keys_rotate_without_a_gap(signer: TokenSigner) -> None:
    old = signer.issue(Purpose.API, "s", timedelta(minutes=5), {})
    keys = [SigningKey.hs256(Secret("n" * 40), "2"), SigningKey.hs256(SECRET, "1")]
    rotated = TokenSigner("mooring-client", keys)
    assert rotated.verify(old, Purpose.API).subject == "s"
    new = rotated.issue(Purpose.API, "s", timedelta(minutes=5), {})
    with pytest.raises(TokenInvalid):
        signer.verify(new, Purpose.API)


def test_an_agent_verifies_but_cannot_sign(tmp_path: Path) -> None:
    private = SigningKey.ed25519_load_or_create(tmp_path / "grant.pem")
    public = SigningKey.ed25519_public(tmp_path / "grant.pub")
    assert public.verify_only
    assert public.key_id == private.key_id
    manager = TokenSigner("mooring-manager", [private])
    grant = manager.issue(Purpose.GRANT, "session", timedelta(minutes=5), {}, audience="agent:a1")
    assert TokenSigner("agent:a1", [public]).verify(grant, Purpose.GRANT).subject == "session"
    with pytest.raises(TokenInvalid):
        TokenSigner("agent:a2", [public]).verify(grant, Purpose.GRANT)
    # The public key must not serve as an HMAC secret (the classic confusion of algorithms).
    claims = jwt.decode(grant, options={"verify_signature": False})
    body = (tmp_path / "grant.pub").read_bytes()
    with pytest.raises(jwt.InvalidKeyError):
        jwt.encode(claims, body, algorithm="HS256")


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ConfigError, match="32 bytes"):
        SigningKey.hs256(Secret("short"))
