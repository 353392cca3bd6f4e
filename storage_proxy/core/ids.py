"""Identifiers and plain values: frozen types for things that would all be `str` or `int` otherwise.

Text forms are those of Backend.AI: a quota scope is `user:<uuid>` or `project:<uuid>`, a vfolder id is
`<quota scope>/<32 hex>`. Every `parse` raises `InvalidIdentifier` and accepts nothing that could act as a path.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType, Self

from .errors import InvalidIdentifier

VolumeName = NewType("VolumeName", str)
SessionID = NewType("SessionID", str)
AgentID = NewType("AgentID", str)
MountKey = NewType("MountKey", str)

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
# The union of what S3 servers accept: https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
_BUCKET = re.compile(r"[a-z0-9](?:[a-z0-9.-]{1,61})[a-z0-9]")


def parse_name(text: str, what: str) -> str:
    """A volume, session or agent name: 1-64 of letters, digits, `.`, `_`, `-`, not starting or ending with a sign."""
    if not _NAME.fullmatch(text) or ".." in text:
        raise InvalidIdentifier(
            f"{text[:80]!r} is not a valid {what}.", hint="Use 1 to 64 letters, digits, '.', '_' or '-'."
        )
    return text


def parse_volume_name(text: str) -> VolumeName:
    return VolumeName(parse_name(text, "volume name"))


def parse_session_id(text: str) -> SessionID:
    return SessionID(parse_name(text, "session id"))


def parse_agent_id(text: str) -> AgentID:
    return AgentID(parse_name(text, "agent id"))


def parse_bucket_name(text: str) -> str:
    """An S3 bucket name: 3-63 of lower-case letters, digits, `.` and `-`."""
    if not _BUCKET.fullmatch(text) or ".." in text:
        raise InvalidIdentifier(
            f"{text[:80]!r} is not a valid bucket name.",
            hint="Bucket names have 3 to 63 lower-case letters, digits, '.' or '-'.",
        )
    return text


class ScopeType(StrEnum):
    USER = "user"
    PROJECT = "project"


@dataclass(frozen=True, slots=True, order=True)
class QuotaScopeID:
    """What a limit applies to: one user or one project."""

    type: ScopeType
    id: uuid.UUID

    @classmethod
    def parse(cls, text: str) -> Self:
        kind, sep, raw = text.partition(":")
        try:
            if not sep:
                raise ValueError
            return cls(ScopeType(kind.lower()), _parse_uuid(raw))
        except ValueError:
            raise InvalidIdentifier(
                f"{text[:80]!r} is not a quota scope id.", hint="Write user:<uuid> or project:<uuid>."
            ) from None

    @property
    def hex(self) -> str:
        return self.id.hex

    def __str__(self) -> str:
        return f"{self.type}:{self.id}"


@dataclass(frozen=True, slots=True, order=True)
class VFolderID:
    """A user's folder inside a quota scope."""

    scope: QuotaScopeID
    id: uuid.UUID

    @classmethod
    def parse(cls, text: str) -> Self:
        scope, sep, raw = text.partition("/")
        if not sep:
            raise InvalidIdentifier(
                f"{text[:80]!r} is not a vfolder id: it has no quota scope.",
                hint="Write user:<uuid>/<32 hex> or project:<uuid>/<32 hex>.",
            )
        try:
            return cls(QuotaScopeID.parse(scope), _parse_uuid(raw))
        except (ValueError, InvalidIdentifier):
            raise InvalidIdentifier(
                f"{text[:80]!r} is not a vfolder id.", hint="Write user:<uuid>/<32 hex> or project:<uuid>/<32 hex>."
            ) from None

    @classmethod
    def new(cls, scope: QuotaScopeID) -> Self:
        return cls(scope, uuid.uuid4())

    @property
    def hex(self) -> str:
        return self.id.hex

    @property
    def managed_prefix(self) -> str:
        """Where a managed vfolder lives below its volume: `{scope hex}/{aa}/{bb}/{rest}/` (volume layout 3)."""
        h = self.id.hex
        return f"{self.scope.hex}/{h[0:2]}/{h[2:4]}/{h[4:]}/"

    def __str__(self) -> str:
        return f"{self.scope}/{self.id.hex}"


def _parse_uuid(text: str) -> uuid.UUID:
    # uuid.UUID also takes braces and a urn: prefix; no sender uses them and they hide what is meant.
    if not re.fullmatch(r"[0-9a-fA-F]{8}-?(?:[0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}", text):
        raise ValueError(text)
    return uuid.UUID(text)


class AccessMode(StrEnum):
    """How a session may use a folder."""

    READ_ONLY = "ro"
    READ_WRITE = "rw"


@dataclass(frozen=True, slots=True, order=True)
class BucketRef:
    """A bucket, or a directory of it. `prefix` is empty or ends with a slash, and never starts with one."""

    bucket: str
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.prefix and (not self.prefix.endswith("/") or self.prefix.startswith("/")):
            raise InvalidIdentifier(f"Bucket prefix {self.prefix[:80]!r} must be relative and end with a slash.")

    def key(self, relpath: str) -> str:
        """The object key of a guarded relative path (see `paths.RelPath`)."""
        return self.prefix + relpath

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"


class ByteSize(int):
    """A count of bytes that prints itself with a binary unit."""

    _UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")

    @classmethod
    def parse(cls, value: str | int) -> Self:
        """Accepts 1048576, "1048576", "10m", "10 MiB", "100g" (all units are powers of 1024)."""
        if isinstance(value, int):
            return cls(value)
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgtp]?)(?:i?b)?\s*", value.lower())
        if not match:
            raise InvalidIdentifier(
                f"{value[:40]!r} is not a size.", hint="Write bytes, or a unit as in 512m or 100 GiB."
            )
        return cls(int(float(match[1]) * 1024 ** " kmgtp".index(match[2] or " ")))

    def __str__(self) -> str:
        value, unit = float(self), 0
        while value >= 1024 and unit < len(self._UNITS) - 1:
            value, unit = value / 1024, unit + 1
        return f"{int(self)} B" if unit == 0 else f"{value:.1f} {self._UNITS[unit]}"
