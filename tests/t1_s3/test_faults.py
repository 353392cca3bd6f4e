"""A server that fails: what is repeated, what is translated, and that nothing waits for ever."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
import pytest_asyncio
import stamina

from storage_proxy.core.errors import (
    BucketNotFound,
    ConfigError,
    FileNotFound,
    InvalidRequest,
    MooringError,
    S3AccessDenied,
    S3BadCredential,
    S3ClockSkew,
    S3Error,
    S3PreconditionFailed,
    S3Unavailable,
    UploadNotFound,
)
from storage_proxy.core.secrets import Secret
from storage_proxy.s3 import Endpoint, PartInfo, S3Client
from storage_proxy.s3.connection import Connection

from ..conftest import S3Server, make_credential
from ..fakes.fault_proxy import ALWAYS, Fault, FaultProxy

MIB = 1024 * 1024
retries = pytest.mark.expects_log("stamina.retry_scheduled")

# Every kind of call: through our own signed requests and through aiobotocore.
Call = Callable[[S3Client, str], Awaitable[object]]
CALLS: dict[str, Call] = {
    "head_bucket": lambda c, b: c.head_bucket(b),
    "head": lambda c, b: c.head(b, "key"),
    "get": lambda c, b: c.get(b, "key"),
    "put": lambda c, b: c.put(b, "key", b"body"),
    "delete": lambda c, b: c.delete(b, "key"),
    "list": lambda c, b: c.list_page(b),
    "delete_many": lambda c, b: c.delete_many(b, ["key"]),
    "copy": lambda c, b: c.copy(b, "key", b, "copy", size=1),
    "create_multipart": lambda c, b: c.create_multipart(b, "key"),
    "upload_part": lambda c, b: c.upload_part(b, "key", "no-such-upload", 1, b"x"),
    "uploads": lambda c, b: c.list_multipart_uploads(b),
}
every_call = pytest.mark.parametrize("name", CALLS)


@pytest.fixture(autouse=True)
def no_waits() -> Iterator[None]:
    """Retries as many as in life, without the pauses between them."""
    with stamina.set_testing(True, attempts=4, cap=True):
        yield


@pytest_asyncio.fixture
async def bucket(s3: S3Client) -> AsyncIterator[str]:
    """One bucket for all of these tests, emptied after each: making one takes longer than most of them."""
    name = "faults"
    await s3.create_bucket(name)
    yield name
    await s3.delete_many(name, [item.key for item in (await s3.list_page(name)).objects])


async def _error_of(call: Awaitable[object]) -> MooringError:
    try:
        await call
    except MooringError as err:
        return err
    pytest.fail("nothing was raised")


@retries
@pytest.mark.asyncio
@every_call
async def test_a_busy_server_is_asked_again(shaky: S3Client, bucket: str, faults: FaultProxy, name: str) -> None:
    await shaky.put(bucket, "key", b"x")
    busy = faults.add(Fault(times=2, status=503, code="SlowDown", contains=bucket))
    if name == "upload_part":
        with pytest.raises(UploadNotFound):
            await CALLS[name](shaky, bucket)
    else:
        result = await CALLS[name](shaky, bucket)
        if hasattr(result, "__aexit__"):
            await result.__aexit__(None, None, None)
    assert busy.hits == 2


@retries
@pytest.mark.asyncio
@every_call
async def test_retries_are_bounded(shaky: S3Client, bucket: str, faults: FaultProxy, name: str) -> None:
    faults.add(Fault(times=ALWAYS, status=503, code="SlowDown", contains=bucket))
    before = len(faults.requests)
    err = await _error_of(CALLS[name](shaky, bucket))
    assert isinstance(err, S3Unavailable)
    assert err.temporary
    assert len(faults.requests) - before == shaky.endpoint.attempts
    assert err.detail["operation"]


@retries
@pytest.mark.asyncio
@every_call
async def test_a_reset_connection_is_tried_again(shaky: S3Client, bucket: str, faults: FaultProxy, name: str) -> None:
    await shaky.put(bucket, "key", b"x")
    reset = faults.add(Fault(reset=True, contains=bucket))
    if name == "upload_part":
        with pytest.raises(UploadNotFound):
            await CALLS[name](shaky, bucket)
    else:
        result = await CALLS[name](shaky, bucket)
        if hasattr(result, "__aexit__"):
            await result.__aexit__(None, None, None)
    assert reset.hits == 1


@pytest.mark.asyncio
@every_call
async def test_refusals_are_not_repeated(s3_server: S3Server, faults: FaultProxy, bucket: str, name: str) -> None:
    wrong = s3_server.admin.model_copy(update={"secret_key": Secret("wrong")})
    endpoint = dataclasses.replace(s3_server.endpoint, url=faults.url)
    async with S3Client(endpoint, wrong) as client:
        err = await _error_of(CALLS[name](client, bucket))
    assert isinstance(err, S3BadCredential)
    # HEAD has no body to say why, so it is followed by one GET.
    assert len(faults.requests) == (2 if name == "head" else 1)
    assert "wrong" not in str(err)
    assert err.exit_code == 8
    assert err.hint


@pytest.mark.asyncio
@every_call
async def test_an_unknown_access_key(s3_server: S3Server, bucket: str, name: str) -> None:
    async with S3Client(s3_server.endpoint, make_credential()) as client:
        assert isinstance(await _error_of(CALLS[name](client, bucket)), S3BadCredential)


@pytest.mark.asyncio
@every_call
async def test_a_known_key_without_the_right(s3_server: S3Server, bucket: str, name: str) -> None:
    async with S3Client(s3_server.endpoint, s3_server.limited) as client:
        if name == "delete_many":  # answered key by key
            failures = await client.delete_many(bucket, ["key"])
            assert [(item.key, item.code) for item in failures] == [("key", "AccessDenied")]
            return
        assert isinstance(await _error_of(CALLS[name](client, bucket)), S3AccessDenied)


@pytest.mark.asyncio
async def test_missing_things(s3: S3Client, bucket: str) -> None:
    missing = "no-such-bucket-anywhere"
    for call in (s3.head_bucket(missing), s3.list_page(missing), s3.put(missing, "k", b""), s3.get(missing, "k")):
        err = await _error_of(call)
        assert isinstance(err, BucketNotFound)
        assert err.detail["bucket"] == missing
        assert err.detail["s3_code"] == "NoSuchBucket"
    for call in (s3.head(bucket, "k"), s3.get(bucket, "k"), s3.copy(bucket, "k", bucket, "l", size=1)):
        err = await _error_of(call)
        assert isinstance(err, FileNotFound)
    with pytest.raises(UploadNotFound):
        await s3.list_parts(bucket, "k", "no-such-upload")
    await s3.abort_multipart(bucket, "k", "no-such-upload")
    await s3.put(bucket, "k", b"12345")
    with pytest.raises(InvalidRequest):
        await s3.get(bucket, "k", start=5)


@pytest.mark.asyncio
@every_call
async def test_clock_skew(shaky: S3Client, bucket: str, faults: FaultProxy, name: str) -> None:
    faults.add(Fault(times=ALWAYS, status=403, code="RequestTimeTooSkewed", contains=bucket))
    err = await _error_of(CALLS[name](shaky, bucket))
    assert isinstance(err, S3ClockSkew)
    assert "clock" in str(err)


@pytest.mark.asyncio
async def test_clock_skew_as_the_real_server_sees_it(
    s3: S3Client, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore import auth

    real = auth.get_current_datetime
    import datetime

    monkeypatch.setattr(auth, "get_current_datetime", lambda *a, **k: real(*a, **k) - datetime.timedelta(minutes=20))
    for call in (s3.head_bucket(bucket), s3.head(bucket, "k"), s3.create_multipart(bucket, "k")):
        assert isinstance(await _error_of(call), S3ClockSkew)


@retries
@pytest.mark.asyncio
async def test_a_closed_port(s3_server: S3Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    begin = time.monotonic()
    async with S3Client(Endpoint(f"http://127.0.0.1:{port}"), s3_server.admin) as client:
        for call in (client.head_bucket("bucket"), client.list_buckets()):
            err = await _error_of(call)
            assert isinstance(err, S3Unavailable)
            assert f"http://127.0.0.1:{port}" in str(err)
    assert time.monotonic() - begin < 15


@retries
@pytest.mark.asyncio
async def test_a_name_that_does_not_resolve(s3_server: S3Server) -> None:
    async with S3Client(Endpoint("http://s3.invalid:9000", attempts=2), s3_server.admin) as client:
        assert isinstance(await _error_of(client.head_bucket("bucket")), S3Unavailable)


@pytest.mark.asyncio
@pytest.mark.parametrize("url", ["ftp://host", "host:9000", "http://", "http://host/path", "http://u:p@host"])
async def test_endpoints_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError):
        Endpoint(url)


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["head_bucket", "put", "create_multipart"])
async def test_a_server_that_accepts_and_is_silent(s3_server: S3Server, name: str) -> None:
    """With the default deadline it would be 12 s each; the mechanism is the same."""
    assert Endpoint("http://host").deadline < 15
    with socket.create_server(("127.0.0.1", 0), backlog=16) as hole:
        endpoint = Endpoint(f"http://127.0.0.1:{hole.getsockname()[1]}", deadline=0.7)
        async with S3Client(endpoint, s3_server.admin) as client:
            begin = time.monotonic()
            err = await _error_of(CALLS[name](client, "bucket"))
            assert isinstance(err, S3Unavailable)
            assert "within 1 s" in err.message
            assert 0.6 < time.monotonic() - begin < 10


@pytest.mark.asyncio
async def test_a_body_that_falls_silent(s3_server: S3Server, faults: FaultProxy, s3: S3Client, bucket: str) -> None:
    await s3.put(bucket, "key", b"x" * MIB)
    faults.add(Fault(method="GET", rate=1000.0))
    endpoint = dataclasses.replace(s3_server.endpoint, url=faults.url, read_timeout=0.5)
    async with S3Client(endpoint, s3_server.admin) as client:
        with pytest.raises(S3Unavailable):
            async with await client.get(bucket, "key") as stream:
                await stream.read()


@pytest.mark.asyncio
async def test_a_body_that_stops_short(shaky: S3Client, faults: FaultProxy, s3: S3Client, bucket: str) -> None:
    await s3.put(bucket, "key", b"x" * MIB)
    faults.add(Fault(method="GET", cut=MIB // 2))
    with pytest.raises(S3Unavailable):
        async with await shaky.get(bucket, "key") as stream:
            await stream.read()


@pytest.mark.asyncio
async def test_a_range_of_the_wrong_length(shaky: S3Client, faults: FaultProxy, s3: S3Client, bucket: str) -> None:
    await s3.put(bucket, "key", b"x" * 1000)
    faults.add(Fault(method="GET", shrink=10))
    with pytest.raises(S3Error, match="another range"):
        await shaky.get(bucket, "key", start=100, end=899)
    faults.add(Fault(method="GET", status=200, body=b"x" * 1000))
    with pytest.raises(S3Error, match="another range"):
        await shaky.get(bucket, "key", start=100, end=899)


@pytest.mark.asyncio
async def test_answers_that_are_not_from_s3(shaky: S3Client, faults: FaultProxy, bucket: str) -> None:
    pages = (b"<html><body>Welcome</body></html>", b"{}", b"", b"<ListBucketResult>", b"\xff\xfe\x00")
    for page in pages:
        faults.add(Fault(status=200, body=page, contains=bucket))
        err = await _error_of(shaky.list_page(bucket))
        assert isinstance(err, S3Error)
        assert "cannot be read" in err.message
    faults.add(
        Fault(status=418, body=b"<!DOCTYPE x [<!ENTITY a 'b'>]><Error><Code>&a;</Code></Error>", contains=bucket)
    )
    assert (await _error_of(shaky.list_page(bucket))).detail["s3_code"] == "HTTP 418"
    faults.add(Fault(status=301, code="PermanentRedirect", contains=bucket))
    err = await _error_of(shaky.list_page(bucket))
    assert "region" in str(err.hint)


@retries
@pytest.mark.asyncio
async def test_completion_whose_answer_was_lost(shaky: S3Client, faults: FaultProxy, s3: S3Client, bucket: str) -> None:
    """The server has published the object; the repeated request must not turn that into an error."""
    upload = await shaky.create_multipart(bucket, "key")
    part = await shaky.upload_part(bucket, "key", upload, 1, b"hello")
    faults.add(Fault(method="POST", contains="uploadId", reset=True, after_server=True))
    info = await shaky.complete_multipart(bucket, "key", upload, [part])
    assert (info.size, info.etag) == (5, (await s3.head(bucket, "key")).etag)
    for parts, known in (([part], True), ([PartInfo(1, "0" * 32, 5)], False)):  # a server that has forgotten it
        faults.add(Fault(method="POST", status=404, code="NoSuchUpload"))
        if known:
            assert (await shaky.complete_multipart(bucket, "key", upload, parts)).etag == info.etag
        else:
            with pytest.raises(UploadNotFound):
                await shaky.complete_multipart(bucket, "key", upload, parts)


@pytest.mark.asyncio
async def test_create_only_if_absent(s3: S3Client, shaky: S3Client, faults: FaultProxy, bucket: str) -> None:
    await s3.put(bucket, "key", b"first", if_none_match=True)
    with pytest.raises(S3PreconditionFailed):
        await s3.put(bucket, "key", b"second", if_none_match=True)
    faults.add(Fault(method="PUT", reset=True, after_server=True))
    with pytest.raises(S3Unavailable):  # not repeated: the second try would lose against the first
        await shaky.put(bucket, "other", b"x", if_none_match=True)
    assert faults.count("PUT") == 1


@pytest.mark.asyncio
async def test_a_cancelled_call_leaves_no_connection(s3_server: S3Server) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=16) as hole:
        connection = Connection(Endpoint(f"http://127.0.0.1:{hole.getsockname()[1]}"), s3_server.admin)
        task = asyncio.create_task(connection.send("GET", "GET", "bucket"))
        peer, _ = await asyncio.to_thread(hole.accept)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with peer:
            peer.settimeout(5)
            while peer.recv(65536):
                pass  # the request, then end of file
        await connection.close()
