"""Opaque cursors. A cursor says where the last page ended; it gives no right to see anything."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence

from storage_proxy.core.errors import InvalidRequest


def encode_cursor(values: Sequence[str]) -> str:
    return base64.urlsafe_b64encode(json.dumps(list(values)).encode()).rstrip(b"=").decode()


def decode_cursor(cursor: str, length: int) -> list[str]:
    """Raises `InvalidRequest` for what `encode_cursor` did not make."""
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        values = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (ValueError, binascii.Error, RecursionError):
        values = None
    # A NUL or a lone surrogate would be refused by the database with an error of its own.
    if (
        not isinstance(values, list)
        or len(values) != length
        or not all(isinstance(value, str) and value.isprintable() for value in values)
    ):
        raise InvalidRequest(
            "The cursor is not one that this service gave.",
            hint="Start again without a cursor.",
            detail={"cursor": "not valid"},
        )
    return values
