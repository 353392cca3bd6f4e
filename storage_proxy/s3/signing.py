"""SigV4 signatures, by botocore's own signer, for requests that we send through aiohttp and for presigned URLs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from ..core.wire import S3Credential
from .endpoint import Endpoint

UNSIGNED = "UNSIGNED-PAYLOAD"
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


class _HeaderAuth(S3SigV4Auth):  # type: ignore[misc]  # botocore is untyped
    """botocore hashes the body unless it decides otherwise; here the caller has decided (see `Signer.body_hash`)."""

    def payload(self, request: AWSRequest) -> str:
        return str(request.context["payload_hash"])


class Signer:
    """Signs for one endpoint and credential. Cheap (0.1 ms a signature), no I/O, safe to share between tasks."""

    def __init__(self, endpoint: Endpoint, credential: S3Credential) -> None:
        token = credential.session_token.reveal() if credential.session_token else None
        self._credentials = Credentials(credential.access_key, credential.secret_key.reveal(), token)
        self._endpoint = endpoint
        # Over TLS the channel guards the body, and on loopback there is no wire. Elsewhere the body's hash is signed,
        # which costs one more SHA-256 of every byte (see docs of `transfer`).
        self._unsigned_bodies = endpoint.secure or endpoint.is_loopback

    def body_hash(self, body: bytes | memoryview, known_sha256: str | None = None) -> str:
        """What goes into x-amz-content-sha256. A hash that is known anyway is sent, so the server checks the bytes."""
        if known_sha256 is not None:
            return known_sha256
        if not body:
            return EMPTY_SHA256
        return UNSIGNED if self._unsigned_bodies else hashlib.sha256(body).hexdigest()

    def sign(
        self, method: str, url: str, headers: Mapping[str, str], payload_hash: str, service: str = "s3"
    ) -> dict[str, str]:
        """`headers` with Authorization, X-Amz-Date and the rest added. `url` must be fully encoded."""
        request = AWSRequest(method=method, url=url, headers=dict(headers))
        request.context["payload_hash"] = payload_hash
        _HeaderAuth(self._credentials, service, self._endpoint.region).add_auth(request)
        return dict(request.headers.items())

    def presign(self, method: str, url: str, expires: int) -> str:
        """The URL with a signature in its query, valid for `expires` seconds. Whoever holds it has the access."""
        request = AWSRequest(method=method, url=url)
        S3SigV4QueryAuth(self._credentials, "s3", self._endpoint.region, expires=expires).add_auth(request)
        return str(request.url)
