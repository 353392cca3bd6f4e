"""What an S3 server can do, found out by trying: the core profile that every volume needs, and the extras.

`probe` writes under `.mooring-probe/<random>/` in the given bucket and removes it again. It changes no setting of the
bucket: extras that would need that (policy, lifecycle, notifications, tags of the bucket) are only asked for.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from ..core.errors import (
    BucketNotFound,
    MooringError,
    NotFound,
    S3AccessDenied,
    S3BadCredential,
    S3ClockSkew,
    S3Error,
    S3PreconditionFailed,
    S3Unavailable,
    Unsupported,
)
from .client import S3Client
from .transfer import MIN_PART

CORE = ("signature", "put_get", "range_get", "list_start_after", "multipart", "copy", "delete_many", "presign")
_ROOT = ".mooring-probe/"


@dataclass(slots=True)
class Capabilities:
    """True: seen to work. False: tried, and it does not; `notes` says how it answered. The first eight are the core
    profile. `clock_skew` is the server's clock minus ours, in seconds, to about a second."""

    signature: bool = False
    put_get: bool = False
    range_get: bool = False
    list_start_after: bool = False
    multipart: bool = False
    copy: bool = False
    delete_many: bool = False
    presign: bool = False
    conditional_put: bool = False
    checksum: bool = False
    sts: bool = False
    iam: bool = False
    tags: bool = False
    versioning: bool = False
    lifecycle: bool = False
    notifications: bool = False
    policy: bool = False
    clock_skew: float = 0.0
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def missing_core(self) -> list[str]:
        """What keeps this server from being a volume; empty is good."""
        return [name for name in CORE if not getattr(self, name)]

    def as_dict(self) -> dict[str, object]:
        return {item.name: getattr(self, item.name) for item in fields(self)}


async def probe(client: S3Client, bucket: str) -> Capabilities:
    """Tries everything, one thing after the other; about 30 requests.

    Raises BucketNotFound, S3BadCredential, S3ClockSkew, S3Unavailable, and S3AccessDenied when it may not even list:
    then nothing can be known. Idempotent; what it writes is removed on errors and cancellation too.
    """
    await client.head_bucket(bucket)
    run = _Probe(client, bucket)
    try:
        await run.all()
    finally:
        await run.clean()
    return run.found


class _Probe:
    def __init__(self, client: S3Client, bucket: str) -> None:
        self._client, self._bucket = client, bucket
        self._prefix = f"{_ROOT}{secrets.token_hex(6)}/"
        self.found = Capabilities(signature=True)

    async def all(self) -> None:
        self.found.clock_skew = await self._clock_skew()
        tries: dict[str, Callable[[], Awaitable[None]]] = {
            "put_get": self._put_get,
            "range_get": self._range_get,
            "list_start_after": self._list_start_after,
            "multipart": self._multipart,
            "copy": self._copy,
            "delete_many": self._delete_many,
            "presign": self._presign,
            "conditional_put": self._conditional_put,
            "checksum": self._checksum,
            "tags": lambda: self._ask("get_object_tagging", Key=self._key("a")),
            "versioning": lambda: self._ask("get_bucket_versioning"),
            "lifecycle": lambda: self._ask("get_bucket_lifecycle_configuration", "NoSuchLifecycleConfiguration"),
            "notifications": lambda: self._ask("get_bucket_notification_configuration"),
            "policy": lambda: self._ask("get_bucket_policy", "NoSuchBucketPolicy"),
            "iam": lambda: self._query("iam", "ListUsers", {"Version": "2010-05-08", "MaxItems": "1"}),
            # A policy that allows nothing: the key that comes back is worthless.
            "sts": lambda: self._query("sts", "AssumeRole", _WORTHLESS_ROLE),
        }
        for name, attempt in tries.items():
            try:
                await attempt()
            except (S3Unavailable, S3BadCredential, S3ClockSkew, BucketNotFound):
                if name in CORE:
                    raise
                self.found.notes[name] = "the server did not answer"
            except MooringError as err:
                self.found.notes[name] = err.message
            else:
                setattr(self.found, name, True)

    async def clean(self) -> None:
        try:
            for upload in await self._client.list_multipart_uploads(self._bucket, self._prefix):
                await self._client.abort_multipart(self._bucket, upload.key, upload.upload_id)
            async for page in self._client.list(self._bucket, self._prefix):
                for item in page.objects:
                    await self._client.delete(self._bucket, item.key)
        except S3Error as err:
            self.found.notes["clean"] = f"{self._prefix} may be left in the bucket: {err.message}"

    def _key(self, name: str) -> str:
        return self._prefix + name

    async def _clock_skew(self) -> float:
        begin = datetime.now(UTC)
        query = {"list-type": "2", "max-keys": "1"}
        async with await self._client.connection.send("LIST", "GET", self._bucket, query=query) as response:
            date = response.headers.get("Date", "")
        middle = begin + (datetime.now(UTC) - begin) / 2
        try:
            # HTTP dates are cut to whole seconds: on average half a second early.
            return (parsedate_to_datetime(date).astimezone(UTC) - middle).total_seconds() + 0.5
        except ValueError:
            self.found.notes["clock_skew"] = "the server sends no Date"
            return 0.0

    async def _put_get(self) -> None:
        for name, body in (("a", b"0123456789"), ("a b+%#?ü", b"x"), ("empty", b"")):
            await self._client.put(self._bucket, self._key(name), body, metadata={"mooring": "1"})
            info = await self._client.head(self._bucket, self._key(name))
            async with await self._client.get(self._bucket, self._key(name)) as stream:
                _expect(await stream.read() == body and info.size == len(body), "other bytes come back")
            _expect(info.metadata.get("mooring") == "1", "user metadata is lost")

    async def _range_get(self) -> None:
        async with await self._client.get(self._bucket, self._key("a"), start=3, end=5) as stream:
            _expect(await stream.read() == b"345", "a range has other bytes")

    async def _list_start_after(self) -> None:
        page = await self._client.list_page(self._bucket, self._prefix)
        names = [item.key for item in page.objects]
        _expect(sorted(names) == sorted(self._key(name) for name in ("a", "a b+%#?ü", "empty")), "a listing is wrong")
        page = await self._client.list_page(self._bucket, self._prefix, start_after=names[0])
        _expect([item.key for item in page.objects] == names[1:], "start-after is ignored")
        page = await self._client.list_page(self._bucket, _ROOT, delimiter="/")
        _expect(self._prefix in page.prefixes, "prefixes are not grouped")

    async def _multipart(self) -> None:
        key = self._key("parts")
        upload = await self._client.create_multipart(self._bucket, key)
        parts = [
            await self._client.upload_part(self._bucket, key, upload, 1, bytes(MIN_PART)),
            await self._client.upload_part(self._bucket, key, upload, 2, b"end"),
        ]
        _expect(len(await self._client.list_parts(self._bucket, key, upload)) == 2, "parts are not listed")
        await self._client.complete_multipart(self._bucket, key, upload, parts)
        info = await self._client.head(self._bucket, key)
        _expect(info.size == MIN_PART + 3, "a multipart object has another size")
        upload = await self._client.create_multipart(self._bucket, key)
        await self._client.abort_multipart(self._bucket, key, upload)
        left = await self._client.list_multipart_uploads(self._bucket, key)
        _expect(not left, "an aborted upload is still there")

    async def _copy(self) -> None:
        await self._client.copy(self._bucket, self._key("a"), self._bucket, self._key("copy"), size=10)
        info = await self._client.head(self._bucket, self._key("copy"))
        _expect((info.size, info.metadata.get("mooring")) == (10, "1"), "a copy loses its metadata")

    async def _delete_many(self) -> None:
        keys = [self._key("copy"), self._key("parts")]
        _expect(not await self._client.delete_many(self._bucket, keys), "a batch is refused")
        left = [item.key for item in (await self._client.list_page(self._bucket, self._prefix)).objects]
        _expect(not set(keys) & set(left), "deleted objects are still listed")

    async def _presign(self) -> None:
        url = self._client.presign_get(self._bucket, self._key("a"), expires=60)
        _expect(await self._client.connection.plain_get(url) == (200, b"0123456789"), "a presigned URL is refused")
        spoiled = url[:-1] + ("0" if url[-1] != "0" else "1")
        _expect((await self._client.connection.plain_get(spoiled))[0] == 403, "a spoiled signature is accepted")

    async def _conditional_put(self) -> None:
        key = self._key("once")
        await self._client.put(self._bucket, key, b"1", if_none_match=True)
        try:
            await self._client.put(self._bucket, key, b"2", if_none_match=True)
        except S3PreconditionFailed:
            return
        _expect(False, "If-None-Match is ignored")

    async def _checksum(self) -> None:
        try:
            await self._client.put(self._bucket, self._key("sum"), b"x", sha256="0" * 64)
        except MooringError as err:
            if isinstance(err, (S3Unavailable, S3AccessDenied)):
                raise
            return
        _expect(False, "a wrong checksum is accepted")

    async def _ask(self, operation: str, *fine: str, **params: Any) -> None:
        """A read-only call. `fine` are error codes that mean: known, but nothing is set."""
        try:
            await self._client.control(operation, self._bucket, Bucket=self._bucket, **params)
        except (S3Error, NotFound) as err:
            if err.detail.get("s3_code") not in fine:
                raise

    async def _query(self, service: str, action: str, params: dict[str, str]) -> None:
        body = await self._client.connection.bounded(
            action, lambda: self._client.connection.query(service, action, params), attempts=1
        )
        _expect(f"<{action}Response".encode() in body, f"no {service.upper()} answer")


_WORTHLESS_ROLE = {
    "Version": "2011-06-15",
    "DurationSeconds": "900",
    "RoleSessionName": "mooring-probe",
    "Policy": json.dumps(
        {
            "Version": "2012-10-17",
            "Statement": [{"Effect": "Deny", "Action": ["s3:*"], "Resource": ["arn:aws:s3:::*"]}],
        }
    ),
}


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Unsupported(otherwise)
