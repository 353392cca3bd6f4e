"""Secrets at rest (column values) and in flight (sealed to one receiver).

At rest, AES-256-GCM with a self-describing value, so that keys can be rotated while old values are still read:

    mk1.<key id>.<base64url of 12-byte nonce + ciphertext + 16-byte tag>

The associated data is the place of the value (`table.column:row`), so a value copied to another row does not open. In
flight, a credential is sealed to the X25519 key of the one process that may use it (an agent), so neither an API answer
nor whoever relays it holds the secret:

    ms1.<base64url of 32-byte ephemeral public key + nonce + ciphertext + tag>

with key = HKDF-SHA256(shared secret, info = "mooring-seal-1" + both public keys).
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .errors import ConfigError, IntegrityError, UsageError
from .secrets import Secret, check_private, read_secret, write_private

_NONCE = 12
_AT_REST = "mk1"
_SEALED = "ms1"


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unb64(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


@dataclass(frozen=True, slots=True)
class Keyring:
    """Encryption keys by id; values are written with `primary` and read with any."""

    primary: str
    keys: Mapping[str, bytes] = field(repr=False)

    @classmethod
    def generate(cls) -> Self:
        key_id = os.urandom(4).hex()
        return cls(key_id, {key_id: os.urandom(32)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads `{"primary": id, "keys": {id: base64url of 32 bytes}}` from a 0600 file."""
        check_private(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            keys = {str(key_id): _unb64(raw) for key_id, raw in data["keys"].items()}
            primary = str(data["primary"])
        except (ValueError, KeyError, AttributeError, TypeError, binascii.Error) as err:
            raise ConfigError(f"Key file {path} is damaged.", hint="Restore it from your backup.") from err
        if primary not in keys or any(len(key) != 32 for key in keys.values()):
            raise ConfigError(f"Key file {path} lacks its primary key.", hint="Restore it from your backup.")
        return cls(primary, keys)

    @classmethod
    def load_or_create(cls, path: Path) -> Self:
        if not path.exists():
            cls.generate().save(path)
        return cls.load(path)

    def save(self, path: Path) -> None:
        keys = {key_id: _b64(key) for key_id, key in self.keys.items()}
        write_private(path, json.dumps({"primary": self.primary, "keys": keys}, indent=1).encode())

    def rotated(self) -> Keyring:
        """A ring with a new primary key that still reads what this one wrote."""
        new = Keyring.generate()
        return Keyring(new.primary, {**self.keys, **new.keys})

    def pruned(self) -> Keyring:
        """A ring with only the primary key. Values that were not encrypted again are lost: rotate them first."""
        return Keyring(self.primary, {self.primary: self.keys[self.primary]})

    def encrypt(self, secret: Secret, place: str) -> str:
        nonce = os.urandom(_NONCE)
        data = AESGCM(self.keys[self.primary]).encrypt(nonce, secret.reveal().encode(), _aad(self.primary, place))
        return f"{_AT_REST}.{self.primary}.{_b64(nonce + data)}"

    def decrypt(self, value: str, place: str) -> Secret:
        """Raises `IntegrityError` for a value that was changed or moved, `ConfigError` for an unknown key."""
        try:
            version, key_id, raw = value.split(".")
            if version != _AT_REST:
                raise ValueError(version)
            data = _unb64(raw)
        except (ValueError, binascii.Error):
            raise IntegrityError(f"The encrypted value of {place} is not readable.") from None
        if key_id not in self.keys:
            raise ConfigError(
                f"The value of {place} was encrypted with key {key_id}, which the key file does not hold.",
                hint="Put that key back into the key file.",
            )
        try:
            plain = AESGCM(self.keys[key_id]).decrypt(data[:_NONCE], data[_NONCE:], _aad(key_id, place))
        except InvalidTag:
            raise IntegrityError(f"The encrypted value of {place} was changed or moved.") from None
        return Secret(plain.decode())

    def is_current(self, value: str) -> bool:
        """True if `value` was written with the primary key (so rotation may skip it)."""
        return value.startswith(f"{_AT_REST}.{self.primary}.")


def _aad(key_id: str, place: str) -> bytes:
    return f"{_AT_REST}.{key_id}:{place}".encode()


class SealingKey:
    """The X25519 key pair of a receiver; only its holder opens what was sealed to `public`."""

    __slots__ = ("_private", "public")

    def __init__(self, private: X25519PrivateKey) -> None:
        self._private = private
        self.public = _b64(_public_bytes(private.public_key()))

    @classmethod
    def generate(cls) -> Self:
        return cls(X25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls, path: Path) -> Self:
        """Keeps the private key in a 0600 file, as base64url of its 32 bytes."""
        if not path.exists():
            raw = X25519PrivateKey.generate().private_bytes(
                serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
            )
            write_private(path, _b64(raw).encode() + b"\n")
        try:
            return cls(X25519PrivateKey.from_private_bytes(_unb64(read_secret(path).reveal())))
        except (ValueError, binascii.Error):
            raise ConfigError(f"Key file {path} is damaged.", hint="Delete it; a new one is made at start.") from None

    def open(self, sealed: str, context: str) -> Secret:
        """Raises `IntegrityError` if it was sealed to another key, for another context, or changed."""
        try:
            version, raw = sealed.split(".")
            if version != _SEALED:
                raise ValueError(version)
            data = _unb64(raw)
            ephemeral = X25519PublicKey.from_public_bytes(data[:32])
            shared = self._private.exchange(ephemeral)
            key = _seal_key(shared, data[:32], _public_bytes(self._private.public_key()))
            nonce, body = data[32 : 32 + _NONCE], data[32 + _NONCE :]
            return Secret(AESGCM(key).decrypt(nonce, body, context.encode()).decode())
        except (ValueError, binascii.Error, InvalidTag):
            raise IntegrityError(
                "A sealed credential does not open with this key.",
                hint="The agent's key may have changed: restart the agent so that it registers again.",
            ) from None


def seal(secret: Secret, receiver: str, context: str) -> str:
    """Seals `secret` to the public key `receiver`; `context` must be the same at `SealingKey.open`."""
    try:
        public = X25519PublicKey.from_public_bytes(_unb64(receiver))
    except (ValueError, binascii.Error):
        raise UsageError("The receiver's public key is not 32 bytes of base64url.") from None
    ephemeral = X25519PrivateKey.generate()
    mine = _public_bytes(ephemeral.public_key())
    key = _seal_key(ephemeral.exchange(public), mine, _public_bytes(public))
    nonce = os.urandom(_NONCE)
    return f"{_SEALED}.{_b64(mine + nonce + AESGCM(key).encrypt(nonce, secret.reveal().encode(), context.encode()))}"


def _seal_key(shared: bytes, ephemeral: bytes, receiver: bytes) -> bytes:
    info = b"mooring-seal-1" + ephemeral + receiver
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(shared)


def _public_bytes(key: X25519PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
