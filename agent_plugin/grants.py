"""Grants: who may have what mounted here.

A grant is a token signed by a manager extension (Ed25519) for the audience `agent:<id of this agent>`. Its subject is
the session, its claim `mount` a `MountRequest`, and the credential in that is sealed to this agent's X25519 key: nobody
between the two can read it, and no other agent can use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from storage_proxy.core.config import parse_request
from storage_proxy.core.crypto import SealingKey
from storage_proxy.core.errors import IntegrityError, MooringError, TokenExpired, TokenInvalid
from storage_proxy.core.ids import SessionID, VFolderID, parse_session_id
from storage_proxy.core.tokens import Purpose, SigningKey, TokenSigner
from storage_proxy.core.wire import MountRequest, S3Credential


@dataclass(frozen=True, slots=True)
class Grant:
    """A verified grant."""

    token_id: str
    session: SessionID
    request: MountRequest
    expires_at: datetime

    @property
    def vfid(self) -> VFolderID:
        return VFolderID.parse(self.request.vfid)


class GrantVerifier:
    """Verifies grants for one agent. Public key files are read again when a grant names a key that is not known yet.
    Without files every grant is refused."""

    def __init__(self, agent_id: str, key_files: Sequence[Path], sealing_key: SealingKey) -> None:
        self._audience = f"agent:{agent_id}"
        self._files = list(key_files)
        self._sealing_key = sealing_key
        self._signer = self._load()

    def _load(self) -> TokenSigner | None:
        if not self._files:
            return None
        return TokenSigner(self._audience, [SigningKey.ed25519_public(path) for path in self._files])

    def verify(self, token: str) -> Grant:
        """Raises `TokenExpired`, or `TokenInvalid` for every other fault: key, signature, audience, purpose,
        content.
        """
        if self._signer is None:
            raise TokenInvalid("This agent takes no grants.", hint="Write [grants] into its configuration.")
        try:
            claims = self._signer.verify(token, Purpose.GRANT)
        except TokenExpired:
            raise
        except TokenInvalid:
            self._signer = self._load() or self._signer  # the manager's key may have been renewed
            claims = self._signer.verify(token, Purpose.GRANT)
        try:
            session = parse_session_id(claims.subject)
            request = parse_request(MountRequest, claims.data.get("mount"))
        except MooringError as err:
            raise TokenInvalid(f"The grant holds no valid mount: {err.message}", hint="Ask for a new one.") from None
        return Grant(claims.token_id, session, request, claims.expires_at)

    def open(self, grant: Grant) -> S3Credential:
        """The credential of a grant. Raises `IntegrityError` if it was not sealed to this agent for this folder,
        `TokenExpired` if it is over.
        """
        request = grant.request
        opened = self._sealing_key.open(request.sealed_credential, request.credential_id)
        try:
            credential = S3Credential.from_sealed(opened)
        except ValueError:
            raise IntegrityError("The sealed credential of the grant holds no S3 credential.") from None
        if credential.expires_at is not None and credential.expires_at <= datetime.now(UTC):
            raise TokenExpired("The credential in the grant has expired.", hint="Ask for a new grant.")
        return credential
