"""Objects, buckets, presigned URLs and the pool on a real S3 server."""

from __future__ import annotations

import ipaddress
import secrets
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from yarl import URL

from storage_proxy.core.errors import (
    BucketNotFound,
    ConfigError,
    InvalidRequest,
    S3AccessDenied,
    S3Error,
)
from storage_proxy.s3 import Endpoint, S3Client, S3Pool
from storage_proxy.s3 import client as client_module
from storage_proxy.s3.pool import identity_of

from ..conftest import S3Server, make_credential
from ..fakes.fault_proxy import FaultProxy

STRANGE = [
    "empty",
    "a b/c d.txt",
    "ünïcode/日本語/😀.bin",
    "plus+plus",
    "100%",
    "a%20b",
    "hash#tag",
    "what?x=1&y=2",
    "~a'()*!;:@$,=",
    "-.-/...a",
    '<xml>&amp;"quote"',
    " leading and trailing ",
    "n" * 255,
]


@pytest_asyncio.fixture
async def bucket(s3: S3Client) -> AsyncIterator[str]:
    """One bucket for all of these tests, emptied after each: making one takes longer than most of them."""
    name = "client"
    await s3.create_bucket(name)
    yield name
    await s3.delete_many(name, [item.key for item in (await s3.list_page(name)).objects])


@pytest.mark.asyncio
@pytest.mark.parametrize("key", STRANGE)
async def test_every_name_makes_the_round(s3: S3Client, bucket: str, key: str) -> None:
    body = b"" if key == "empty" else key.encode() * 10
    put = await s3.put(bucket, key, body, metadata={"uid": "1000", "mode": "33188"}, content_type="text/x-test")
    head = await s3.head(bucket, key)
    assert (head.key, head.size, head.etag, head.content_type) == (key, len(body), put.etag, "text/x-test")
    assert {"uid": "1000", "mode": "33188"}.items() <= head.metadata.items()
    assert head.last_modified is not None
    assert abs(head.last_modified - datetime.now(UTC)) < timedelta(minutes=5)
    async with await s3.get(bucket, key) as stream:
        assert await stream.read() == body
        assert (stream.info.etag, stream.content_range) == (put.etag, None)
    assert [item.key for item in (await s3.list_page(bucket)).objects] == [key]
    copied = await s3.copy(bucket, key, bucket, key[:200] + "2")
    assert (copied.size, copied.etag) == (head.size, head.etag)
    async with aiohttp.ClientSession() as session:
        answer = await session.get(_encoded(s3.presign_get(bucket, key, expires=60)))
        assert (answer.status, await answer.read()) == (200, body)
    assert await s3.delete_many(bucket, [key]) == []
    assert [item.key for item in (await s3.list_page(bucket)).objects] == [key[:200] + "2"]
    await s3.delete(bucket, key[:200] + "2")
    await s3.delete(bucket, key[:200] + "2")
    assert (await s3.list_page(bucket)).objects == []


def _encoded(url: str) -> URL:
    return URL(url, encoded=True)


@pytest.mark.asyncio
async def test_buckets(s3: S3Client, s3_server: S3Server) -> None:
    name = f"new-{secrets.token_hex(4)}"
    with pytest.raises(BucketNotFound):
        await s3.head_bucket(name)
    assert await s3.create_bucket(name) is True
    assert await s3.create_bucket(name) is False
    await s3.head_bucket(name)
    assert name in await s3.list_buckets()
    async with S3Client(s3_server.endpoint, s3_server.limited) as limited:
        await limited.head_bucket(s3_server.limited_bucket)
        with pytest.raises(S3AccessDenied):
            await limited.head_bucket(name)


@pytest.mark.asyncio
async def test_copy_keeps_or_replaces_metadata(s3: S3Client, bucket: str) -> None:
    await s3.put(bucket, "a", b"x", metadata={"uid": "5"}, content_type="text/plain")
    await s3.copy(bucket, "a", bucket, "b", size=1)
    info = await s3.head(bucket, "b")
    assert (info.metadata.get("uid"), info.content_type) == ("5", "text/plain")
    await s3.copy(bucket, "a", bucket, "c", metadata={"uid": "6", "gid": "7"})
    info = await s3.head(bucket, "c")
    assert (info.metadata.get("uid"), info.metadata.get("gid"), info.content_type) == ("6", "7", "text/plain")


@pytest.mark.asyncio
async def test_large_copies_go_in_parts(s3: S3Client, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "COPY_LIMIT", 6 * 1024**2)
    monkeypatch.setattr(client_module, "COPY_PART", 5 * 1024**2)
    body = secrets.token_bytes(1024) * (12 * 1024 + 1)
    await s3.put(bucket, "a b+", body, metadata={"uid": "5"}, content_type="text/plain")
    copied = await s3.copy(bucket, "a b+", bucket, "copy")
    info = await s3.head(bucket, "copy")
    assert (info.size, info.metadata.get("uid"), info.content_type) == (len(body), "5", "text/plain")
    assert copied.etag == info.etag
    assert copied.etag.endswith("-3")
    async with await s3.get(bucket, "copy") as stream:
        assert await stream.read() == body
    with pytest.raises(BucketNotFound):
        await s3.copy(bucket, "a b+", "no-such-bucket", "copy")
    assert await s3.list_multipart_uploads(bucket) == []


@pytest.mark.asyncio
async def test_metadata_that_no_header_can_carry(s3: S3Client, bucket: str) -> None:
    for metadata in ({"name": "ü"}, {"na me": "x"}, {"name": "a\r\nX-Evil: 1"}, {"": "x"}):
        with pytest.raises(InvalidRequest):
            await s3.put(bucket, "k", b"", metadata=metadata)
        with pytest.raises(InvalidRequest):
            await s3.create_multipart(bucket, "k", metadata=metadata)


@pytest.mark.asyncio
async def test_multipart_primitives(s3: S3Client, bucket: str) -> None:
    upload = await s3.create_multipart(bucket, "dir/key", metadata={"mtime": "1"}, content_type="text/x")
    assert [(item.key, item.upload_id) for item in await s3.list_multipart_uploads(bucket, "dir/")] == [
        ("dir/key", upload)
    ]
    assert await s3.list_multipart_uploads(bucket, "other/") == []
    second = await s3.upload_part(bucket, "dir/key", upload, 2, b"tail")
    first = await s3.upload_part(bucket, "dir/key", upload, 1, bytes(5 * 1024**2))
    assert await s3.list_parts(bucket, "dir/key", upload) == [first, second]
    done = await s3.complete_multipart(bucket, "dir/key", upload, [second, first])
    info = await s3.head(bucket, "dir/key")
    assert (info.size, info.etag, info.metadata.get("mtime")) == (5 * 1024**2 + 4, done.etag, "1")
    assert done.size == info.size


@pytest.mark.asyncio
async def test_presigned_urls(s3: S3Client, bucket: str) -> None:
    upload = await s3.create_multipart(bucket, "parts")
    async with aiohttp.ClientSession() as session:

        async def send(method: str, url: str, data: bytes | None = None) -> aiohttp.ClientResponse:
            return await session.request(method, _encoded(url), data=data)

        answer = await send("PUT", s3.presign_put(bucket, "a +b", expires=60), b"by url")
        assert answer.status == 200
        answer = await send("PUT", s3.presign_part(bucket, "parts", upload, 1, expires=60), b"part")
        assert answer.headers["ETag"].strip('"') == (await s3.list_parts(bucket, "parts", upload))[0].etag
        url = s3.presign_get(bucket, "a +b", expires=60, filename="größe 1;.txt")
        answer = await send("GET", url)
        assert await answer.read() == b"by url"
        assert "gr%C3%B6%C3%9Fe%201%3B.txt" in answer.headers["Content-Disposition"]
        for spoiled in (url.replace("%2Bb?", "%2Bc?"), url[:-1] + ("0" if url[-1] != "0" else "1")):
            assert (await send("GET", spoiled)).status == 403
        assert (await send("PUT", url, b"x")).status == 403
        assert (await send("GET", s3.presign_get(bucket, "a +b", expires=-10))).status in (400, 403)
    await s3.abort_multipart(bucket, "parts", upload)


@pytest.mark.asyncio
async def test_keys_that_xml_cannot_carry(s3: S3Client, bucket: str) -> None:
    await s3.put(bucket, "bell\x07", b"")
    assert [item.key for item in (await s3.list_page(bucket)).objects] == ["bell\x07"]
    assert await s3.delete_many(bucket, ["bell\x07"]) == []
    assert (await s3.list_page(bucket)).objects == []


@pytest.mark.asyncio
async def test_stored_bytes_are_not_decoded(s3: S3Client, bucket: str) -> None:
    """An object that somebody stored with a Content-Encoding comes back as it is stored."""
    async with aiohttp.ClientSession() as session:
        url = s3.presign_put(bucket, "packed", expires=60)
        await session.put(_encoded(url), data=b"no gzip at all", headers={"Content-Encoding": "gzip"})
    async with await s3.get(bucket, "packed") as stream:
        assert await stream.read() == b"no gzip at all"


@pytest.mark.asyncio
async def test_the_environment_has_no_say(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client_module._boto_session.cache_clear()
    for name, value in {
        "AWS_PROFILE": "nobody",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "wrong",
        "AWS_SECRET_ACCESS_KEY": "wrong",
        "AWS_CA_BUNDLE": str(tmp_path / "none"),
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_supported",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
    }.items():
        monkeypatch.setenv(name, value)
    async with S3Client(s3_server.endpoint, s3_server.admin) as client:
        assert s3_server.limited_bucket in await client.list_buckets()
        await client.head_bucket(s3_server.limited_bucket)
    client_module._boto_session.cache_clear()


@pytest.mark.asyncio
async def test_one_client_per_endpoint_and_credential(s3_server: S3Server) -> None:
    async with S3Pool() as pool:
        first = await pool.client(s3_server.endpoint, s3_server.admin)
        assert await pool.client(Endpoint(s3_server.endpoint.url + "/"), s3_server.admin.model_copy()) is first
        rotated = s3_server.admin.model_copy(update={"secret_key": make_credential().secret_key})
        others = [
            await pool.client(s3_server.endpoint, s3_server.limited),
            await pool.client(s3_server.endpoint, rotated),
            await pool.client(Endpoint(s3_server.endpoint.url, region="eu-west-1"), s3_server.admin),
        ]
        assert len({id(client) for client in (first, *others)}) == 4
        assert s3_server.limited_bucket in await first.list_buckets()
        await pool.discard(s3_server.endpoint, s3_server.admin)
        assert await pool.client(s3_server.endpoint, s3_server.admin) is not first
        assert s3_server.admin.secret_key.reveal() not in identity_of(s3_server.admin)


# --- TLS --------------------------------------------------------------------------------------------------------------


def _certificate(place: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mooring test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = place / "ca.pem", place / "key.pem"
    cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert_file, key_file


@pytest.mark.asyncio
async def test_tls_with_an_own_authority(s3_server: S3Server, tmp_path: Path) -> None:
    cert_file, key_file = _certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert_file, key_file)

    async with FaultProxy(s3_server.endpoint.url, tls=context) as relay:
        assert relay.url.startswith("https://")
        async with S3Client(Endpoint(relay.url, ca_file=cert_file), s3_server.admin) as client:
            await client.put(s3_server.limited_bucket, "over-tls", b"x" * 1000)
            assert s3_server.limited_bucket in await client.list_buckets()
            await client.delete(s3_server.limited_bucket, "over-tls")
        async with S3Client(Endpoint(relay.url), s3_server.admin) as client:
            for call in (client.head_bucket("bucket"), client.list_buckets()):
                with pytest.raises(S3Error, match="certificate"):
                    await call
    for broken in (tmp_path / "none.pem", key_file):
        async with S3Client(Endpoint(relay.url, ca_file=broken), s3_server.admin) as client:
            for call in (client.head_bucket("bucket"), client.list_buckets()):
                with pytest.raises(ConfigError, match="authority"):
                    await call
