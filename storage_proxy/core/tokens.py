"""Signed tokens, one purpose each (JWT, RFC 7519).

Every token fixes `aud`, `purpose`, `exp`, `iat`, `jti` and the key id; each is checked, none is optional. HS256 serves
where the same process signs and verifies (client tokens of the proxy, API tokens of the manager extension); EdDSA where
the verifier must not be able to sign (grants: made by the manager extension, verified by agents).
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from .errors import ConfigError, TokenExpired, TokenInvalid
from .secrets import Secret, check_private, write_private

LEEWAY_SECONDS = 30


class Purpose(StrEnum):
    UPLOAD = "upload"
    DOWNLOAD = "download"
    API = "api"  # a person's or a program's access to the manager extension
    GRANT = "grant"  # one agent may attach one binding for one session


@dataclass(frozen=True, slots=True)
class Claims:
    """A verified token. `data` holds the claims beyond the registered ones."""

    purpose: Purpose
    subject: str
    token_id: str
    expires_at: datetime
    data: Mapping[str, Any]  # Any: claims are JSON; each caller validates its own with a model


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key with its id. `verify_only` keys (Ed25519 public keys) cannot sign."""

    key_id: str
    algorithm: str
    _sign: Any  # Any: PyJWT takes bytes or a key object, by algorithm
    _verify: Any

    @classmethod
    def hs256(cls, secret: Secret, key_id: str = "1") -> Self:
        raw = secret.reveal().encode()
        if len(raw) < 32:
            raise ConfigError("A token secret must have at least 32 bytes.", hint="Generate one: openssl rand -hex 32")
        return cls(key_id, "HS256", raw, raw)

    @classmethod
    def ed25519_load_or_create(cls, path: Path) -> Self:
        """A private key in a 0600 PEM file; the public half is written beside it as `<name>.pub`."""
        if not path.exists():
            pem = Ed25519PrivateKey.generate().private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            write_private(path, pem)
        check_private(path)
        try:
            private = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except ValueError:
            raise ConfigError(f"Key file {path} is damaged.", hint="Restore it from your backup.") from None
        if not isinstance(private, Ed25519PrivateKey):
            raise ConfigError(f"Key file {path} holds no Ed25519 key.")
        public = private.public_key()
        public_path = path.with_suffix(".pub")
        pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        if not public_path.exists() or public_path.read_bytes() != pem:
            public_path.write_bytes(pem)
        return cls(_key_id(public), "EdDSA", private, public)

    @classmethod
    def ed25519_public(cls, path: Path) -> Self:
        try:
            public = serialization.load_pem_public_key(path.read_bytes())
        except (OSError, ValueError) as err:
            raise ConfigError(f"Public key file {path} cannot be read ({err}).") from None
        if not isinstance(public, Ed25519PublicKey):
            raise ConfigError(f"Public key file {path} holds no Ed25519 key.")
        return cls(_key_id(public), "EdDSA", None, public)

    @property
    def verify_only(self) -> bool:
        return self._sign is None

    def sign(self, claims: dict[str, Any]) -> str:
        return jwt.encode(claims, self._sign, algorithm=self.algorithm, headers={"kid": self.key_id})

    def verify(self, token: str, audience: str) -> dict[str, Any]:
        claims: dict[str, Any] = jwt.decode(
            token,
            self._verify,
            algorithms=[self.algorithm],  # never the one that the token names
            audience=audience,
            leeway=LEEWAY_SECONDS,
            options={"require": ["exp", "iat", "aud", "jti", "sub"]},
        )
        return claims


def _key_id(public: Ed25519PublicKey) -> str:
    raw = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return raw[:6].hex()


class TokenSigner:
    """Signs and verifies the tokens of one audience. The first key signs; all verify, so keys rotate without a gap."""

    def __init__(self, audience: str, keys: Sequence[SigningKey]) -> None:
        if not keys:
            raise ConfigError(f"No token key for {audience}.")
        self._audience = audience
        self._keys = {key.key_id: key for key in keys}
        self._primary = keys[0]

    def issue(
        self,
        purpose: Purpose,
        subject: str,
        lifetime: timedelta,
        data: Mapping[str, Any],
        *,
        audience: str | None = None,
    ) -> str:
        now = datetime.now(UTC)
        claims = {
            **data,
            "aud": audience or self._audience,
            "purpose": purpose.value,
            "sub": subject,
            "jti": uuid.uuid4().hex,
            "iat": now,
            "exp": now + lifetime,
        }
        return self._primary.sign(claims)

    def verify(self, token: str, purpose: Purpose) -> Claims:
        """Raises `TokenExpired` or `TokenInvalid`. The message never repeats the token."""
        try:
            key = self._keys.get(str(jwt.get_unverified_header(token).get("kid")))
            if key is None:
                raise TokenInvalid("The token was signed with a key that is not known here.", hint="Ask for a new one.")
            claims = key.verify(token, self._audience)
        except jwt.ExpiredSignatureError:
            raise TokenExpired("The token has expired.", hint="Ask for a new one.") from None
        except jwt.InvalidTokenError as err:
            raise TokenInvalid(
                f"The token is not valid here ({type(err).__name__}).", hint="Ask for a new one."
            ) from None
        if claims.pop("purpose", None) != purpose.value:
            raise TokenInvalid(f"The token is not for {purpose.value}.", hint="Ask for one with that purpose.")
        expires = datetime.fromtimestamp(int(claims.pop("exp")), UTC)
        registered = {name: claims.pop(name) for name in ("aud", "iat", "jti", "sub")}
        return Claims(purpose, str(registered["sub"]), str(registered["jti"]), expires, claims)
