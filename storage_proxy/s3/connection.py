"""`Connection`: signed HTTP to one endpoint with one credential. Pooled, retried, with deadlines and our own errors.

Objects, parts and listings go this way; operations with XML bodies go through aiobotocore (see `client`). Per request
this costs a third of botocore's CPU, and bodies stream both ways without being copied into its buffers.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TypeVar

import aiohttp
import stamina
from yarl import URL

from ..core.errors import ConfigError, MooringError, S3Unavailable
from ..core.wire import S3Credential
from .endpoint import Endpoint, encode_query
from .errors import of_code, parse_error_body, translate
from .signing import EMPTY_SHA256, Signer

T = TypeVar("T")

READ_BUFFER = 1024 * 1024
WRITE_CHUNK = 256 * 1024
_ERROR_BODY_LIMIT = 64 * 1024


class Connection:
    """Made by `S3Client`. Safe to share between tasks; `close` once."""

    def __init__(self, endpoint: Endpoint, credential: S3Credential) -> None:
        self.endpoint = endpoint
        self.signer = Signer(endpoint, credential)
        self._session: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        """Made at first use, because aiohttp wants a running loop."""
        if self._session is None:
            tls: ssl.SSLContext | bool = True
            if self.endpoint.ca_file is not None:
                tls = load_ca(self.endpoint)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self.endpoint.max_connections, ssl=tls, ttl_dns_cache=30),
                # Stored bytes are handed out as they are, whatever Content-Encoding the object carries.
                auto_decompress=False,
                read_bufsize=READ_BUFFER,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent", "Content-Type"),
            )
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    async def send(
        self,
        operation: str,
        method: str,
        bucket: str,
        key: str = "",
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: memoryview | None = None,
        sha256: str | None = None,
    ) -> aiohttp.ClientResponse:
        """One signed request, once. Returns a response with status below 300 whose body is still to be read.

        Raises what `errors.translate` makes of everything else. No deadline of its own: see `bounded`.
        """
        url = self.endpoint.object_url(bucket, key, encode_query(dict(query or {})))
        wanted = dict(headers or {})
        data: AsyncIterator[memoryview] | None = None
        payload_hash = EMPTY_SHA256
        if body is not None:
            wanted["Content-Length"] = str(len(body))
            payload_hash = self.signer.body_hash(body, sha256)
            data = _slices(body) if body else None
        signed = self.signer.sign(method, url, wanted, payload_hash)
        return await self._exchange(operation, method, url, signed, data, bucket, key)

    async def query(self, service: str, action: str, params: Mapping[str, str]) -> bytes:
        """One call of the query protocol of IAM and STS (a signed form, an XML answer), once."""
        url = self.endpoint.object_url()
        form = encode_query({"Action": action, **params}).encode()
        headers = {"Content-Type": "application/x-www-form-urlencoded; charset=utf-8", "Content-Length": str(len(form))}
        signed = self.signer.sign("POST", url, headers, hashlib.sha256(form).hexdigest(), service)
        async with await self._exchange(action, "POST", url, signed, _slices(memoryview(form))) as response:
            return await response.content.read()

    async def plain_get(self, url: str) -> tuple[int, bytes]:
        """Status and the first 64 KiB of a URL as anybody would fetch it: unsigned, for presigned URLs."""
        try:
            async with asyncio.timeout(self.endpoint.deadline):
                async with self._open().get(URL(url, encoded=True), allow_redirects=False) as response:
                    return response.status, await response.content.read(_ERROR_BODY_LIMIT)
        except (aiohttp.ClientError, OSError) as err:
            raise self.translated(err, "GET") from err

    async def _exchange(
        self,
        operation: str,
        method: str,
        url: str,
        headers: Mapping[str, str],
        data: AsyncIterator[memoryview] | None,
        bucket: str = "",
        key: str = "",
    ) -> aiohttp.ClientResponse:
        try:
            response = await self._open().request(
                method,
                URL(url, encoded=True),
                headers={"Accept-Encoding": "identity", **headers},
                data=data,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=self.endpoint.connect_timeout, sock_read=self.endpoint.read_timeout
                ),
            )
        except Exception as err:
            raise self.translated(err, operation, bucket, key) from err
        if response.status >= 300:
            raise await self._refused(response, operation, bucket, key)
        return response

    async def _refused(self, response: aiohttp.ClientResponse, operation: str, bucket: str, key: str) -> MooringError:
        try:
            body = await response.content.read(_ERROR_BODY_LIMIT)
            code, message, request_id = parse_error_body(body)
        except (aiohttp.ClientError, OSError, TimeoutError):
            code = message = request_id = ""
        finally:
            response.close()
        return of_code(
            # MinIO names the reason of a refused HEAD, which can have no body, in a header.
            code or response.headers.get("x-minio-error-code", ""),
            status=response.status,
            message=message,
            operation=operation,
            bucket=bucket,
            key=key,
            request_id=request_id or response.headers.get("x-amz-request-id", ""),
        )

    def translated(self, err: Exception, operation: str, bucket: str = "", key: str = "") -> MooringError:
        return translate(err, operation=operation, endpoint=self.endpoint.url, bucket=bucket, key=key)

    async def bounded(
        self,
        operation: str,
        call: Callable[[], Awaitable[T]],
        *,
        bucket: str = "",
        key: str = "",
        body_size: int = 0,
        deadline: float | None = None,
        attempts: int | None = None,
    ) -> T:
        """`call`, repeated on S3Unavailable only, within one deadline for all attempts together.

        The deadline is the endpoint's plus what `body_size` bytes need at its minimum rate.
        """
        limit = (self.endpoint.deadline if deadline is None else deadline) + body_size / self.endpoint.minimum_rate
        last: MooringError | None = None
        try:
            async with asyncio.timeout(limit):
                async for attempt in stamina.retry_context(
                    on=S3Unavailable,
                    attempts=attempts or self.endpoint.attempts,
                    timeout=None,
                    wait_initial=0.1,
                    wait_max=2.0,
                    wait_jitter=0.2,
                ):
                    with attempt:
                        try:
                            return await call()
                        except S3Unavailable as err:
                            last = err
                            raise
                        except (MooringError, asyncio.CancelledError):
                            raise
                        except Exception as err:
                            last = self.translated(err, operation, bucket, key)
                            raise last from err
        except TimeoutError:
            raise S3Unavailable(
                f"S3 {operation}: no success from {self.endpoint.url} within {limit:.0f} s"
                f"{f' (last: {last.message})' if last else ''}.",
                hint="Check that the S3 server runs and is reachable; the request may be repeated.",
                detail={"operation": operation, "endpoint": self.endpoint.url, "cause": "deadline"},
            ) from None
        raise AssertionError("unreachable: the retry context returns or raises")


def load_ca(endpoint: Endpoint) -> ssl.SSLContext:
    """TLS 1.2 or later, trusting only the endpoint's own authority file. Raises ConfigError if it cannot be read."""
    try:
        context = ssl.create_default_context(cafile=str(endpoint.ca_file))
    except (OSError, ssl.SSLError):
        raise ConfigError(
            f"The certificate authority file {endpoint.ca_file} cannot be read.", hint="Give a PEM file as ca-file."
        ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


async def _slices(body: memoryview) -> AsyncIterator[memoryview]:
    """Small enough that the transport does not copy and shift a large rest after each partial send."""
    for start in range(0, len(body), WRITE_CHUNK):
        yield body[start : start + WRITE_CHUNK]
