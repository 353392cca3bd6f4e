"""`S3Pool`: one client per endpoint and credential, for the life of a process."""

from __future__ import annotations

import hashlib
from typing import Self

from ..core.wire import S3Credential
from .client import S3Client
from .endpoint import Endpoint


def identity_of(credential: S3Credential) -> str:
    """What tells two credentials apart, without holding a secret: 32 hex digits over all their parts."""
    token = credential.session_token.reveal() if credential.session_token else ""
    text = "\0".join((credential.access_key, credential.secret_key.reveal(), token))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class S3Pool:
    """Use as an async context manager, or `close` at the end."""

    def __init__(self) -> None:
        self._clients: dict[tuple[Endpoint, str], S3Client] = {}

    async def client(self, endpoint: Endpoint, credential: S3Credential) -> S3Client:
        """The client for this pair, made at first use (no I/O happens here). Do not close it."""
        place = (endpoint, identity_of(credential))
        client = self._clients.get(place)
        if client is None:
            client = self._clients[place] = S3Client(endpoint, credential)
        return client

    async def discard(self, endpoint: Endpoint, credential: S3Credential) -> None:
        """Closes the client of a credential that is gone (revoked, rotated). Calls under way on it fail."""
        client = self._clients.pop((endpoint, identity_of(credential)), None)
        if client is not None:
            await client.close()

    async def close(self) -> None:
        clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            await client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
