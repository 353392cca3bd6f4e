"""Listings: the parser against a plain reference, and paging on a real server."""

from __future__ import annotations

import asyncio
import string
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from urllib.parse import quote_plus
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage_proxy.core.errors import S3Error
from storage_proxy.s3 import ListPage, ObjectInfo, S3Client
from storage_proxy.s3.listing import ListParser

NS = "http://s3.amazonaws.com/doc/2006-03-01/"

# Everything XML 1.0 can carry: no control characters, no surrogates, no non-characters.
xml_text = st.text(
    st.characters(codec="utf-8", exclude_characters="\r", exclude_categories=["Cs", "Cc"], max_codepoint=0xFFFD)
)
any_text = st.text(st.characters(codec="utf-8"))
stamps = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)).map(lambda t: t.replace(microsecond=0, tzinfo=UTC))
etags = st.text(string.hexdigits, min_size=1, max_size=32)


@st.composite
def documents(draw: st.DrawFn) -> tuple[bytes, ListPage]:
    """An answer as servers write them, in the many ways they differ, and what it means."""
    encoded = draw(st.booleans())
    names = any_text if encoded else xml_text
    objects = [
        ObjectInfo(key, size, etag, stamp)
        for key, size, etag, stamp in draw(st.lists(st.tuples(names, st.integers(0, 2**60), etags, stamps), max_size=8))
    ]
    prefixes = draw(st.lists(names, max_size=4))
    token = draw(st.none() | st.text(string.ascii_letters + "+/=&<", min_size=1))

    def text(value: str) -> str:
        plain = quote_plus(value, safe="/") if encoded else value
        style = draw(st.sampled_from(["escape", "cdata", "numeric"]))
        if style == "cdata" and "]]>" not in plain:
            return f"<![CDATA[{plain}]]>"
        if style == "numeric":
            return "".join(f"&#{ord(char)};" if draw(st.booleans()) else escape(char) for char in plain)
        return escape(plain)

    parts = [
        f"<Contents><Key>{text(item.key)}</Key><LastModified>{stamp:%Y-%m-%dT%H:%M:%S}.000Z</LastModified>"
        f"<ETag>&quot;{item.etag}&quot;</ETag><Size>{item.size}</Size>"
        "<Owner><ID>x</ID><DisplayName>Key</DisplayName><Key>not this</Key></Owner>"
        "<StorageClass>STANDARD</StorageClass></Contents>"
        for item in objects
        if (stamp := item.last_modified)
    ] + [f"<CommonPrefixes><Prefix>{text(prefix)}</Prefix></CommonPrefixes>" for prefix in prefixes]
    head = [
        "<Prefix>of the request</Prefix>",
        f"<IsTruncated>{'true' if token else 'false'}</IsTruncated>",
        *([f"<NextContinuationToken>{escape(token)}</NextContinuationToken>"] if token else []),
        *(["<EncodingType>url</EncodingType>"] if encoded else []),
    ]
    body = "\n".join(parts + head if draw(st.booleans()) else head + parts)
    namespace = draw(st.sampled_from(["", f' xmlns="{NS}"']))
    declaration = draw(st.sampled_from(["", '<?xml version="1.0" encoding="UTF-8"?>\n']))
    return (
        f"{declaration}<ListBucketResult{namespace}>{body}</ListBucketResult>".encode(),
        ListPage(objects, prefixes, token),
    )


def parse(document: bytes, cuts: list[int]) -> ListPage:
    parser = ListParser()
    edges = [0, *sorted(min(cut, len(document)) for cut in cuts), len(document)]
    for begin, end in pairwise(edges):
        parser.feed(document[begin:end])
    return parser.finish()


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(documents(), st.lists(st.integers(0, 4000), max_size=12))
def test_parser_gives_what_was_written_at_any_cut(made: tuple[bytes, ListPage], cuts: list[int]) -> None:
    document, expected = made
    assert parse(document, cuts) == expected


def test_every_single_cut() -> None:
    document = (
        f'<ListBucketResult xmlns="{NS}"><Contents><Key>ä&amp;&#x1F600;]</Key><Size>7</Size><ETag>"e"</ETag>'
        "<LastModified>2026-01-02T03:04:05.678Z</LastModified></Contents><IsTruncated>false</IsTruncated>"
        "</ListBucketResult>"
    ).encode()
    stamp = datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)
    for cut in range(len(document) + 1):
        assert parse(document, [cut]) == ListPage([ObjectInfo("ä&😀]", 7, "e", stamp)], [], None)


def test_same_as_element_tree() -> None:
    """A reference that shares no code with the parser."""
    keys = [f"dir {i}/file&<{i}>.bin" for i in range(50)]
    document = (
        f'<ListBucketResult xmlns="{NS}">'
        + "".join(f"<Contents><Key>{escape(key)}</Key><Size>{i}</Size></Contents>" for i, key in enumerate(keys))
        + "</ListBucketResult>"
    ).encode()
    tree = ElementTree.fromstring(document)
    reference = [
        (item.findtext(f"{{{NS}}}Key"), int(item.findtext(f"{{{NS}}}Size") or -1))
        for item in tree.iter(f"{{{NS}}}Contents")
    ]
    assert [(item.key, item.size) for item in parse(document, [100]).objects] == reference


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"not xml",
        b"<ListBucketResult>",
        b"<ListBucketResult></ListBucketResult><x/>",
        b"<Error><Code>x</Code></Error>",
        b"<html></html>",
        b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>",
        b"<ListBucketResult><Contents><Size>1</Size></Contents></ListBucketResult>",
        b"<ListBucketResult><Contents><Key>k</Key><Size>many</Size></Contents></ListBucketResult>",
        b"<ListBucketResult><Contents><Key>k</Key><Size>1</Size><LastModified>x</LastModified></Contents></ListBucketResult>",
        b'<!DOCTYPE a [<!ENTITY b "c">]><ListBucketResult></ListBucketResult>',
        b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><ListBucketResult></ListBucketResult>',
        b"<ListBucketResult>&unknown;</ListBucketResult>",
    ],
)
def test_what_is_no_listing(document: bytes) -> None:
    with pytest.raises(S3Error, match="cannot be read"):
        parse(document, [])


# --- on a real server -------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_pages_prefixes_and_start_after(s3: S3Client, bucket: str) -> None:
    keys = [f"many/{i // 100:02}/file {i:04}+.txt" for i in range(2500)]
    slots = asyncio.Semaphore(32)

    async def put(key: str) -> None:
        async with slots:
            await s3.put(bucket, key, b"")

    async with asyncio.TaskGroup() as group:
        for key in [*keys, "other/x", "top"]:
            group.create_task(put(key))

    pages = [page async for page in s3.list(bucket, "many/")]
    assert len(pages) == 3
    assert all(len(page.objects) <= 1000 for page in pages)
    listed = [item for page in pages for item in page.objects]
    assert sorted(item.key for item in listed) == keys
    assert all(item.size == 0 and item.etag for item in listed)
    assert all(abs((item.last_modified or datetime.min) - datetime.now(UTC)) < timedelta(hours=1) for item in listed)

    top = await s3.list_page(bucket, delimiter="/")
    assert (top.prefixes, [item.key for item in top.objects]) == (["many/", "other/"], ["top"])
    inner = [page async for page in s3.list(bucket, "many/", delimiter="/")]
    assert [prefix for page in inner for prefix in page.prefixes] == [f"many/{i:02}/" for i in range(25)]

    after = [item.key async for page in s3.list(bucket, "many/", start_after=keys[2000]) for item in page.objects]
    assert after == keys[2001:]
    assert (await s3.list_page(bucket, "many/", start_after="many/24/file 2499+.txt")).objects == []
    small = await s3.list_page(bucket, "many/", max_keys=7)
    assert len(small.objects) == 7
    assert small.continuation is not None
    rest = await s3.list_page(bucket, "many/", continuation=small.continuation)
    assert rest.objects[0].key == keys[7]

    assert await s3.delete_many(bucket, iter([*keys, "never-there"])) == []
    assert [item.key for item in (await s3.list_page(bucket)).objects] == ["other/x", "top"]


@pytest.mark.asyncio
async def test_an_empty_bucket_and_an_empty_prefix(s3: S3Client, bucket: str) -> None:
    assert await s3.list_page(bucket) == ListPage([], [], None)
    assert [page async for page in s3.list(bucket, "none/")] == [ListPage([], [], None)]


@pytest.mark.asyncio
async def test_leaving_a_listing_early(s3: S3Client, bucket: str) -> None:
    await s3.put(bucket, "a", b"")
    async for page in s3.list(bucket):
        assert page.objects
        break
    assert (await s3.list_page(bucket)).objects
