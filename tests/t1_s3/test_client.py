"""Objects and buckets on a real S3 server."""

from __future__ import annotations

import pytest

from storage_proxy.s3 import S3Client

STRANGE = [
    "empty",
    "a b/c d.txt",
    "ünïcode/日本語.bin",
    "plus+plus",
    "100%",
    "a%20b",
    "hash#tag",
    "what?x=1&y=2",
    "~a'()*!",
]


@pytest.mark.asyncio
@pytest.mark.parametrize("key", STRANGE)
async def test_put_get_head_delete(s3: S3Client, bucket: str, key: str) -> None:
    body = b"" if key == "empty" else key.encode() * 10
    put = await s3.put(bucket, key, body, metadata={"uid": "1000", "mode": "33188"}, content_type="text/x-test")
    head = await s3.head(bucket, key)
    assert (head.size, head.etag, head.content_type) == (len(body), put.etag, "text/x-test")
    assert {"uid": "1000", "mode": "33188"}.items() <= head.metadata.items()
    async with await s3.get(bucket, key) as stream:
        assert await stream.read() == body
        assert stream.info.etag == put.etag
    assert [item.key for item in (await s3.list_page(bucket)).objects] == [key]
    await s3.delete(bucket, key)
    await s3.delete(bucket, key)
    assert (await s3.list_page(bucket)).objects == []
