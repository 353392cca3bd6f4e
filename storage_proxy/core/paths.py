"""The one path guard: a path from outside becomes a `RelPath` here or is refused.

Object keys have no notion of `..`, but the file systems that show them do, and so do the programs that copy a folder to
a disk. So the guard refuses whatever could mean something else on either side: absolute paths, empty, `.` and `..`
segments, backslashes, NUL and control characters, segments over 255 bytes (the kernel's NAME_MAX) and keys over 1,024
bytes (S3's limit). Nothing is decoded here: percent signs are ordinary characters, HTTP decoded its layer once already.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Self

from .errors import InvalidPath

MAX_SEGMENT_BYTES = 255
MAX_PATH_BYTES = 1024


@dataclass(frozen=True, slots=True, order=True)
class RelPath:
    """A guarded path below a folder; `""` is the folder itself. No leading or trailing slash."""

    text: str

    @classmethod
    def parse(cls, raw: str) -> Self:
        """Accepts `a/b`, `a/b/`, `./a`, `.` and `""`; raises `InvalidPath` for what could leave the folder."""
        if raw.startswith("/"):
            raise InvalidPath(f"Path {_show(raw)} is absolute.", hint="Give a path relative to the folder.")
        body = raw.removeprefix("./").removesuffix("/")
        if body in ("", "."):
            return cls("")
        for segment in body.split("/"):
            _check_segment(segment, raw)
        if len(body.encode("utf-8", "surrogatepass")) > MAX_PATH_BYTES:
            raise InvalidPath(f"Path {_show(raw)} is longer than {MAX_PATH_BYTES} bytes.", hint="Shorten it.")
        return cls(body)

    @classmethod
    def parse_file(cls, raw: str) -> Self:
        """As `parse`, for the name of a file: refuses the folder itself and a trailing slash."""
        path = cls.parse(raw)
        if not path.text or raw.endswith("/"):
            raise InvalidPath(f"Path {_show(raw)} does not name a file.", hint="Give the path of a file in the folder.")
        return path

    @property
    def name(self) -> str:
        return self.text.rpartition("/")[2]

    @property
    def parent(self) -> RelPath:
        return RelPath(self.text.rpartition("/")[0])

    @property
    def is_root(self) -> bool:
        return not self.text

    @property
    def as_prefix(self) -> str:
        """The key prefix of what is inside: empty for the root, else with a slash, so `a` never matches `ab`."""
        return f"{self.text}/" if self.text else ""

    def child(self, name: str) -> RelPath:
        _check_segment(name, name)
        return RelPath(f"{self.text}/{name}" if self.text else name)

    def join(self, other: RelPath) -> RelPath:
        return RelPath("/".join(part for part in (self.text, other.text) if part))

    def is_inside(self, other: RelPath) -> bool:
        """True if this is `other` or below it."""
        return other.is_root or self.text == other.text or self.text.startswith(other.text + "/")

    def __str__(self) -> str:
        return self.text or "."


def parse_prefix(raw: str) -> str:
    """A guarded bucket prefix: empty, or ending with a slash."""
    return RelPath.parse(raw).as_prefix


def _check_segment(segment: str, whole: str) -> None:
    if segment in ("", ".", ".."):
        raise InvalidPath(
            f"Path {_show(whole)} has an empty, '.' or '..' part.",
            hint="Write it without them, relative to the folder.",
        )
    if "/" in segment or "\\" in segment:
        raise InvalidPath(f"Path {_show(whole)} has a slash or backslash inside a name.", hint="Use '/' between names.")
    for char in segment:
        if unicodedata.category(char) in ("Cc", "Cs"):
            raise InvalidPath(
                f"Path {_show(whole)} has a control character or is not UTF-8.", hint="Use printable names."
            )
    if len(segment.encode()) > MAX_SEGMENT_BYTES:
        raise InvalidPath(
            f"A name in path {_show(whole)} is longer than {MAX_SEGMENT_BYTES} bytes.", hint="Shorten it."
        )


def _show(raw: str) -> str:
    return ascii(raw if len(raw) <= 80 else raw[:77] + "...")
