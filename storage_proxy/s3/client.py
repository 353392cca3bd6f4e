"""`S3Client`: one endpoint, one credential, every operation that Mooring uses.

Made by `S3Pool` once per endpoint and credential, never per call. Every method ends within a deadline (see `Endpoint`),
repeats temporary failures a bounded number of times and raises classes of `core.errors` with the S3 cause in `detail`.
All methods may be cancelled; those that are not idempotent say so.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from functools import lru_cache
from itertools import islice
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession

from ..core.errors import (
    AlreadyExists,
    FileNotFound,
    InvalidRequest,
    MooringError,
    S3AccessDenied,
    S3BadCredential,
    S3Error,
    UploadNotFound,
)
from ..core.wire import S3Credential
from .connection import Connection, load_ca
from .endpoint import Endpoint, encode_query
from .listing import ListParser
from .objects import DeleteFailure, ListPage, MultipartUpload, ObjectInfo, PartInfo

T = TypeVar("T")

DELETE_BATCH = 1000
COPY_LIMIT = (
    5 * 1024**3
)  # CopyObject takes at most 5 GiB: https://docs.aws.amazon.com/AmazonS3/latest/API/API_CopyObject.html
COPY_PART = 512 * 1024**2
COPY_PARALLEL = 4
SLOW_DEADLINE = 300.0  # seconds; server-side copies and completions answer only when the server has done all its work
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


class ObjectStream:
    """The body of one GET, an async context manager: leaving early drops the connection, reading it all returns it.

    `content_length` is the number of bytes that `chunks` will yield; `content_range` is (first, last, whole size), or
    None for a whole object. `info.size` is always the size of the whole object.
    """

    def __init__(self, connection: Connection, response: aiohttp.ClientResponse, bucket: str, key: str) -> None:
        self._connection = connection
        self._response = response
        self._bucket = bucket
        self.content_length = int(response.headers.get("Content-Length", 0))
        self.content_range = _content_range(response.headers.get("Content-Range"))
        whole = self.content_range[2] if self.content_range else self.content_length
        self.info = ObjectInfo.from_headers(key, response.headers, whole)

    async def chunks(self, size: int = 1024 * 1024) -> AsyncGenerator[bytes, None]:
        """Pieces of at most `size` bytes as they arrive. S3Unavailable when the body stops short or falls silent."""
        content = self._response.content
        got = 0
        try:
            while chunk := await content.read(size):
                got += len(chunk)
                yield chunk
        except (aiohttp.ClientError, OSError, TimeoutError) as err:
            raise self._connection.translated(err, "GET", self._bucket, self.info.key) from err
        if got != self.content_length:
            raise self._connection.translated(
                aiohttp.ClientPayloadError("short body"), "GET", self._bucket, self.info.key
            )

    def is_range(self, start: int, end: int | None) -> bool:
        """True if this is the answer to a request for bytes `start` to `end`, cut at the end of the object."""
        if self.content_range is None:
            return False
        first, last, whole = self.content_range
        wanted = whole - 1 if end is None else min(end, whole - 1)
        return (first, last) == (start, wanted) and self.content_length == last - first + 1

    async def read(self) -> bytes:
        """The whole body in memory: for small objects."""
        return b"".join([chunk async for chunk in self.chunks()])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After a whole read the connection is back in the pool already and this does nothing.
        self._response.close()


class S3Client:
    def __init__(self, endpoint: Endpoint, credential: S3Credential) -> None:
        self.endpoint = endpoint
        self._credential = credential
        self.connection = Connection(endpoint, credential)
        self._stack = AsyncExitStack()
        self._boto: Any = None  # Any: aiobotocore generates its client classes at run time
        self._boto_lock = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        self._boto = None
        await self._stack.aclose()
        await self.connection.close()

    # --- buckets ------------------------------------------------------------------------------------------------------

    async def head_bucket(self, bucket: str) -> None:
        """Returns if the bucket exists and this credential may list it.

        Raises BucketNotFound, S3AccessDenied, S3BadCredential, S3ClockSkew, S3Unavailable. Asks by a LIST of one key,
        not by HEAD: an answer to HEAD has no body, so it cannot tell a wrong secret from a missing right.
        """
        await self.list_page(bucket, max_keys=1)

    async def create_bucket(self, bucket: str) -> bool:
        """True if this call made it, False if it was there and is ours. AlreadyExists if it is somebody else's."""
        extra: dict[str, Any] = {}
        if self.endpoint.region != "us-east-1":
            extra["CreateBucketConfiguration"] = {"LocationConstraint": self.endpoint.region}
        try:
            await self.control("create_bucket", bucket, Bucket=bucket, **extra)
        except AlreadyExists as err:
            if err.detail.get("s3_code") == "BucketAlreadyOwnedByYou":
                return False
            try:  # some servers answer BucketAlreadyExists to the owner too
                await self.head_bucket(bucket)
            except (S3AccessDenied, S3BadCredential):
                raise err from None
            return False
        return True

    async def list_buckets(self) -> list[str]:
        answer = await self.control("list_buckets")
        return [item["Name"] for item in answer.get("Buckets", [])]

    # --- objects ------------------------------------------------------------------------------------------------------

    async def head(self, bucket: str, key: str) -> ObjectInfo:
        """Raises FileNotFound. A refusal is looked into by a GET of one byte, whose answer names the reason."""

        async def call() -> ObjectInfo:
            response = await self.connection.send("HEAD", "HEAD", bucket, key)
            async with response:
                return ObjectInfo.from_headers(key, response.headers, int(response.headers.get("Content-Length", 0)))

        async def look() -> None:
            response = await self.connection.send("HEAD", "GET", bucket, key, headers={"Range": "bytes=0-0"})
            response.close()

        try:
            return await self.connection.bounded("HEAD", call, bucket=bucket, key=key)
        except S3AccessDenied:
            await self.connection.bounded("HEAD", look, bucket=bucket, key=key)
            raise
        except S3Error as err:
            if err.temporary or err.detail.get("s3_code") != "HTTP 400":
                raise
            await self.connection.bounded("HEAD", look, bucket=bucket, key=key)
            raise

    async def get(
        self, bucket: str, key: str, *, start: int | None = None, end: int | None = None, if_match: str | None = None
    ) -> ObjectStream:
        """Opens an object, or its bytes `start` to `end` (both included; `end` None: to the last).

        `if_match` is an ETag without quotes: S3PreconditionFailed when the object is another one by now. Raises
        FileNotFound, InvalidRequest for a range behind the end. Opening is retried; the body is not (see
        `transfer.download_ranges`).
        """
        headers: dict[str, str] = {}
        if start is not None or end is not None:
            headers["Range"] = f"bytes={start or 0}-{'' if end is None else end}"
        if if_match is not None:
            headers["If-Match"] = f'"{if_match}"'

        async def call() -> ObjectStream:
            stream = ObjectStream(
                self.connection, await self.connection.send("GET", "GET", bucket, key, headers=headers), bucket, key
            )
            if "Range" in headers and not stream.is_range(start or 0, end):
                await stream.__aexit__(None, None, None)
                raise S3Error(
                    f"S3 GET s3://{bucket}/{key}: the server answered another range than {headers['Range']}.",
                    hint="Look for a proxy between here and the S3 server that changes ranges.",
                )
            return stream

        return await self.connection.bounded("GET", call, bucket=bucket, key=key)

    async def put(
        self,
        bucket: str,
        key: str,
        body: bytes | bytearray | memoryview,
        *,
        metadata: Mapping[str, str] | None = None,
        content_type: str | None = None,
        sha256: str | None = None,
        if_none_match: bool = False,
    ) -> ObjectInfo:
        """Writes one object in one request, atomically: readers see the old or the new one. Up to 5 GiB.

        `sha256` (hex), if known, makes the server refuse other bytes (IntegrityError). `if_none_match` refuses to
        replace an object (S3PreconditionFailed) and turns repetition off, as a repeated request could lose against its
        own first try.
        """
        headers = _object_headers(metadata, content_type)
        if if_none_match:
            headers["If-None-Match"] = "*"
        if sha256 is not None:
            # The signed x-amz-content-sha256 says the same, but not every server compares it with the body.
            headers["x-amz-checksum-sha256"] = base64.b64encode(bytes.fromhex(sha256)).decode()

        async def call() -> ObjectInfo:
            response = await self.connection.send(
                "PUT", "PUT", bucket, key, headers=headers, body=memoryview(body), sha256=sha256
            )
            async with response:
                return ObjectInfo(
                    key,
                    len(body),
                    response.headers.get("ETag", "").strip('"'),
                    content_type=content_type,
                    metadata=dict(metadata or {}),
                )

        return await self.connection.bounded(
            "PUT", call, bucket=bucket, key=key, body_size=len(body), attempts=1 if if_none_match else None
        )

    async def delete(self, bucket: str, key: str) -> None:
        """Idempotent: a missing object is deleted already."""

        async def call() -> None:
            (await self.connection.send("DELETE", "DELETE", bucket, key)).release()

        try:
            await self.connection.bounded("DELETE", call, bucket=bucket, key=key)
        except FileNotFound:
            return

    async def delete_many(self, bucket: str, keys: Iterable[str]) -> list[DeleteFailure]:
        """Deletes in batches of 1,000. Returns the keys that stayed, with reasons; raises only if a whole batch failed.

        Idempotent; after an exception or a cancel, some of the keys are deleted.
        """
        failures: list[DeleteFailure] = []
        source = iter(keys)
        while batch := list(islice(source, DELETE_BATCH)):
            # XML 1.0 cannot carry these characters, so such keys go one by one.
            plain = [key for key in batch if not _NOT_XML.search(key)]
            if plain:
                answer = await self.control(
                    "delete_objects",
                    bucket,
                    Bucket=bucket,
                    Delete={"Objects": [{"Key": k} for k in plain], "Quiet": True},
                )
                failures += [
                    DeleteFailure(item.get("Key", ""), item.get("Code", ""), item.get("Message", ""))
                    for item in answer.get("Errors", [])
                    if item.get("Code") != "NoSuchKey"
                ]
            for key in batch:
                if _NOT_XML.search(key):
                    try:
                        await self.delete(bucket, key)
                    except S3AccessDenied as err:
                        failures.append(DeleteFailure(key, str(err.detail.get("s3_code", "")), err.message))
        return failures

    async def copy(
        self,
        src_bucket: str,
        src_key: str,
        dst_bucket: str,
        dst_key: str,
        *,
        size: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectInfo:
        """Copies inside the server. User metadata and content type are kept; `metadata` replaces the former.

        Over 5 GiB it is a multipart copy, aborted on any error. `size` and `metadata` known save a HEAD only when no
        metadata is replaced. Atomic for the readers of the destination.
        """
        source: ObjectInfo | None = None
        if size is None or size > COPY_LIMIT or metadata is not None:
            source = await self.head(src_bucket, src_key)
            size = source.size
        if source is not None and size > COPY_LIMIT:
            return await self._copy_parts(src_bucket, source, dst_bucket, dst_key, metadata)
        extra: dict[str, Any] = {}
        if source is not None and metadata is not None:
            extra = {"MetadataDirective": "REPLACE", "Metadata": _checked_metadata(metadata)}
            if source.content_type:
                extra["ContentType"] = source.content_type
        answer = await self.control(
            "copy_object",
            dst_bucket,
            dst_key,
            SLOW_DEADLINE,
            Bucket=dst_bucket,
            Key=dst_key,
            CopySource={"Bucket": src_bucket, "Key": src_key},
            **extra,
        )
        result = answer["CopyObjectResult"]
        return ObjectInfo(
            dst_key,
            size,
            str(result.get("ETag", "")).strip('"'),
            result.get("LastModified"),
            source.content_type if source else None,
            dict(metadata if metadata is not None else source.metadata if source else {}),
        )

    async def _copy_parts(
        self, src_bucket: str, source: ObjectInfo, dst_bucket: str, dst_key: str, metadata: Mapping[str, str] | None
    ) -> ObjectInfo:
        kept = dict(source.metadata if metadata is None else metadata)
        upload_id = await self.create_multipart(dst_bucket, dst_key, metadata=kept, content_type=source.content_type)
        slots = asyncio.Semaphore(COPY_PARALLEL)

        async def part(number: int, start: int, end: int) -> PartInfo:
            async with slots:
                answer = await self.control(
                    "upload_part_copy",
                    dst_bucket,
                    dst_key,
                    SLOW_DEADLINE,
                    Bucket=dst_bucket,
                    Key=dst_key,
                    UploadId=upload_id,
                    PartNumber=number,
                    CopySource={"Bucket": src_bucket, "Key": source.key},
                    CopySourceIfMatch=source.etag,
                    CopySourceRange=f"bytes={start}-{end}",
                )
            return PartInfo(number, answer["CopyPartResult"]["ETag"].strip('"'), end - start + 1)

        step = max(COPY_PART, -(-source.size // 10_000))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(part(number, start, min(start + step, source.size) - 1))
                    for number, start in enumerate(range(0, source.size, step), start=1)
                ]
            return await self.complete_multipart(dst_bucket, dst_key, upload_id, [task.result() for task in tasks])
        except BaseException as err:
            await asyncio.shield(self.abort_multipart(dst_bucket, dst_key, upload_id))
            if isinstance(err, ExceptionGroup):
                raise err.exceptions[0] from None
            raise

    # --- listing ------------------------------------------------------------------------------------------------------

    async def list_page(
        self,
        bucket: str,
        prefix: str = "",
        *,
        delimiter: str = "",
        start_after: str = "",
        continuation: str | None = None,
        max_keys: int = 1000,
    ) -> ListPage:
        """One page of ListObjectsV2. `start_after` may be any text; `continuation` comes from the page before."""
        query = {"list-type": "2", "max-keys": str(max_keys), "encoding-type": "url"}
        optional = {"prefix": prefix, "delimiter": delimiter, "start-after": start_after}
        query |= {name: value for name, value in optional.items() if value}
        if continuation:
            query["continuation-token"] = continuation

        async def call() -> ListPage:
            response = await self.connection.send("LIST", "GET", bucket, query=query)
            async with response:
                parser = ListParser()
                async for chunk in response.content.iter_any():
                    parser.feed(chunk)
                return parser.finish()

        return await self.connection.bounded("LIST", call, bucket=bucket, key=prefix)

    # --- multipart ----------------------------------------------------------------------------------------------------

    async def create_multipart(
        self, bucket: str, key: str, *, metadata: Mapping[str, str] | None = None, content_type: str | None = None
    ) -> str:
        """A new upload id. Not idempotent: each call makes an upload, which costs space until completed or aborted."""
        extra: dict[str, Any] = {"Metadata": _checked_metadata(metadata)} if metadata else {}
        if content_type:
            extra["ContentType"] = content_type
        answer = await self.control("create_multipart_upload", bucket, key, Bucket=bucket, Key=key, **extra)
        return str(answer["UploadId"])

    async def upload_part(
        self, bucket: str, key: str, upload_id: str, number: int, body: bytes | bytearray | memoryview
    ) -> PartInfo:
        """Writes part `number` (1 to 10,000), 5 MiB to 5 GiB unless it is the last. The last write of a part counts."""
        query = {"partNumber": str(number), "uploadId": upload_id}
        view = memoryview(body)

        async def call() -> PartInfo:
            response = await self.connection.send("UploadPart", "PUT", bucket, key, query=query, body=view)
            async with response:
                return PartInfo(number, response.headers.get("ETag", "").strip('"'), len(view))

        return await self.connection.bounded("UploadPart", call, bucket=bucket, key=key, body_size=len(view))

    async def complete_multipart(self, bucket: str, key: str, upload_id: str, parts: Sequence[PartInfo]) -> ObjectInfo:
        """Publishes the object. Safe to repeat: it notices when an earlier try has succeeded.

        `size` of the result is the sum of the parts' sizes. Raises UploadNotFound.
        """
        ordered = sorted(parts, key=lambda part: part.number)
        size = sum(part.size for part in ordered)
        try:
            answer = await self.control(
                "complete_multipart_upload",
                bucket,
                key,
                SLOW_DEADLINE,
                Bucket=bucket,
                Key=key,
                UploadId=upload_id,
                MultipartUpload={"Parts": [{"PartNumber": part.number, "ETag": f'"{part.etag}"'} for part in ordered]},
            )
        except UploadNotFound:
            info = await self.head(bucket, key)
            if info.etag != _multipart_etag(ordered):
                raise
            return info
        return ObjectInfo(key, size, str(answer.get("ETag", "")).strip('"'))

    async def abort_multipart(self, bucket: str, key: str, upload_id: str) -> None:
        """Frees the parts. Idempotent: an upload that is gone is aborted already."""
        try:
            await self.control("abort_multipart_upload", bucket, key, Bucket=bucket, Key=key, UploadId=upload_id)
        except UploadNotFound:
            return

    async def list_parts(self, bucket: str, key: str, upload_id: str) -> list[PartInfo]:
        """All parts so far, by number. Raises UploadNotFound."""
        parts: list[PartInfo] = []
        marker = 0
        while True:
            answer = await self.control(
                "list_parts", bucket, key, Bucket=bucket, Key=key, UploadId=upload_id, PartNumberMarker=marker
            )
            parts += [
                PartInfo(int(item["PartNumber"]), item["ETag"].strip('"'), int(item["Size"]))
                for item in answer.get("Parts", [])
            ]
            following = int(answer.get("NextPartNumberMarker") or 0)
            if not answer.get("IsTruncated") or following <= marker:
                return parts
            marker = following

    async def list_multipart_uploads(self, bucket: str, prefix: str = "") -> list[MultipartUpload]:
        """Unfinished uploads of keys that start with `prefix`."""
        uploads: list[MultipartUpload] = []
        markers: dict[str, str] = {}
        while True:
            answer = await self.control("list_multipart_uploads", bucket, Bucket=bucket, Prefix=prefix, **markers)
            for item in answer.get("Uploads", []):
                initiated = item.get("Initiated")
                uploads.append(
                    MultipartUpload(
                        item["Key"], item["UploadId"], initiated if isinstance(initiated, datetime) else None
                    )
                )
            following = {
                "KeyMarker": str(answer.get("NextKeyMarker") or ""),
                "UploadIdMarker": str(answer.get("NextUploadIdMarker") or ""),
            }
            if not answer.get("IsTruncated") or following == markers or not following["KeyMarker"]:
                return uploads
            markers = following

    # --- presigned URLs -----------------------------------------------------------------------------------------------

    def presign_get(self, bucket: str, key: str, *, expires: int, filename: str | None = None) -> str:
        """A URL that reads the object for `expires` seconds. `filename`: the name a browser saves it under."""
        query: dict[str, str] = {}
        if filename is not None:
            query["response-content-disposition"] = f"attachment; filename*=UTF-8''{quote(filename, safe='')}"
        return self.connection.signer.presign(
            "GET", self.endpoint.object_url(bucket, key, encode_query(query)), expires
        )

    def presign_put(self, bucket: str, key: str, *, expires: int) -> str:
        """A URL that writes the object in one PUT. The server does not limit the size of what is sent."""
        return self.connection.signer.presign("PUT", self.endpoint.object_url(bucket, key), expires)

    def presign_part(self, bucket: str, key: str, upload_id: str, number: int, *, expires: int) -> str:
        """A URL that writes one part; the sender keeps the ETag header of the answer for `complete_multipart`."""
        query = encode_query({"partNumber": str(number), "uploadId": upload_id})
        return self.connection.signer.presign("PUT", self.endpoint.object_url(bucket, key, query), expires)

    # --- operations with XML bodies, through aiobotocore --------------------------------------------------------------

    async def control(
        self, operation: str, bucket: str = "", key: str = "", deadline: float | None = None, /, **params: Any
    ) -> dict[str, Any]:  # Any: botocore's parsed answers
        """Any other operation of botocore's S3 client by its method name, with our deadline, retries and errors."""
        name = "".join(word.capitalize() for word in operation.split("_"))

        async def call() -> dict[str, Any]:
            method: Callable[..., Awaitable[dict[str, Any]]] = getattr(await self._botocore(), operation)
            try:
                return await method(**params)
            except MooringError:
                raise
            except Exception as err:
                raise self.connection.translated(err, name, bucket, key) from err

        return await self.connection.bounded(name, call, bucket=bucket, key=key, deadline=deadline)

    async def _botocore(self) -> Any:
        async with self._boto_lock:
            if self._boto is None:
                if self.endpoint.ca_file is not None:
                    load_ca(self.endpoint)  # botocore's own complaint about an unreadable file names no file
                token = self._credential.session_token
                client = await self._stack.enter_async_context(
                    _boto_session().create_client(
                        "s3",
                        endpoint_url=self.endpoint.url,
                        region_name=self.endpoint.region,
                        aws_access_key_id=self._credential.access_key,
                        aws_secret_access_key=self._credential.secret_key.reveal(),
                        aws_session_token=token.reveal() if token else None,
                        verify=str(self.endpoint.ca_file) if self.endpoint.ca_file else True,
                        config=AioConfig(
                            signature_version="s3v4",
                            connect_timeout=self.endpoint.connect_timeout,
                            read_timeout=SLOW_DEADLINE,  # `Connection.bounded` sets the real limit of each call
                            max_pool_connections=self.endpoint.max_connections,
                            retries={"total_max_attempts": 1},
                            s3={"addressing_style": "path" if self.endpoint.path_style else "virtual"},
                            # Default checksums cost CPU here and are unknown to many servers.
                            request_checksum_calculation="when_required",
                            response_checksum_validation="when_required",
                            parameter_validation=False,
                            proxies={},
                        ),
                    )
                )
                client.meta.events.register("before-sign.s3.DeleteObjects", _add_content_md5)
                self._boto = client
            return self._boto

    # Last, because its name hides the built-in `list` from the annotations below it.
    async def list(
        self, bucket: str, prefix: str = "", *, delimiter: str = "", start_after: str = ""
    ) -> AsyncGenerator[ListPage, None]:
        """All pages, one request each, asked for as they are consumed."""
        continuation: str | None = None
        while True:
            page = await self.list_page(
                bucket, prefix, delimiter=delimiter, start_after=start_after, continuation=continuation
            )
            yield page
            if page.continuation is None:
                return
            continuation = page.continuation


@lru_cache(maxsize=1)
def _boto_session() -> AioSession:
    """One for the process: it keeps the parsed service model, which costs 0.4 s, where a client more costs 0.02 s."""
    # What the operator's own AWS set-up says has no say here: profiles, configuration and credential files.
    return AioSession(
        session_vars={
            "profile": (None, None, None, None),
            "config_file": (None, None, "/dev/null", None),
            "credentials_file": (None, None, "/dev/null", None),
        }
    )


def _add_content_md5(request: Any, **_: object) -> None:
    """DeleteObjects must carry a checksum; Content-MD5 is the one that every server knows."""
    if "Content-MD5" not in request.headers:
        digest = hashlib.md5(request.body or b"", usedforsecurity=False).digest()
        request.headers["Content-MD5"] = base64.b64encode(digest).decode()


def _checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    for name, value in metadata.items():
        if not name.isascii() or not value.isascii() or not value.isprintable() or not re.fullmatch(r"[\w.-]+", name):
            raise InvalidRequest(
                f"Object metadata {name[:40]!r} is not plain ASCII.",
                hint="Metadata travels in HTTP headers: encode it first.",
            )
    return dict(metadata)


def _object_headers(metadata: Mapping[str, str] | None, content_type: str | None) -> dict[str, str]:
    headers = {f"x-amz-meta-{name}": value for name, value in _checked_metadata(metadata or {}).items()}
    headers["Content-Type"] = content_type or "binary/octet-stream"  # S3's own default
    return headers


def _content_range(text: str | None) -> tuple[int, int, int] | None:
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", text or "")
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def _multipart_etag(parts: Sequence[PartInfo]) -> str:
    """The ETag that S3 gives an object of these parts, where part ETags are MD5 sums."""
    try:
        joined = b"".join(bytes.fromhex(part.etag) for part in parts)
    except ValueError:
        return ""
    return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(parts)}"
