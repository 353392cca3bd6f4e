"""What the S3 room hands out: objects, pages, parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_META = "x-amz-meta-"


@dataclass(slots=True)
class ObjectInfo:
    """One object. `size` in bytes, `etag` without quotes. Listings know neither `content_type` nor `metadata`.

    Not frozen: a listing makes a million of them, and a frozen dataclass costs three times as much to make.
    """

    key: str
    size: int
    etag: str
    last_modified: datetime | None = None
    content_type: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_headers(cls, key: str, headers: Mapping[str, str], size: int) -> ObjectInfo:
        """From the headers of HEAD, GET or PUT; metadata names in lower case, as S3 compares them."""
        modified = headers.get("Last-Modified")
        return cls(
            key=key,
            size=size,
            etag=headers.get("ETag", "").strip('"'),
            last_modified=_http_date(modified) if modified else None,
            content_type=headers.get("Content-Type"),
            metadata={
                name[len(_META) :].lower(): value for name, value in headers.items() if name.lower().startswith(_META)
            },
        )


def _http_date(text: str) -> datetime | None:
    try:
        return parsedate_to_datetime(text).astimezone(UTC)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class ListPage:
    """One LIST answer: at most 1,000 objects and prefixes, in the order the server gave them.

    That order is by bytes of the key on AWS and by path component on some others: do not merge by it.
    `continuation` is None on the last page.
    """

    objects: list[ObjectInfo]
    prefixes: list[str]
    continuation: str | None


@dataclass(frozen=True, slots=True)
class PartInfo:
    """One uploaded part of a multipart upload; `number` is 1 to 10,000."""

    number: int
    etag: str
    size: int


@dataclass(frozen=True, slots=True)
class MultipartUpload:
    """An upload that was neither completed nor aborted: it costs space and no LIST shows it."""

    key: str
    upload_id: str
    initiated: datetime | None


@dataclass(frozen=True, slots=True)
class DeleteFailure:
    """One key of a batch that the server did not delete, and its reason."""

    key: str
    code: str
    message: str
