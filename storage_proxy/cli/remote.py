"""How a place in a folder is written on the command line: `NAME`, `NAME:/` or `NAME:/path/in/folder`."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Remote:
    """`path` is guarded and relative, empty for the folder itself; `is_directory`: it was written with a slash at its
    end."""

    folder: str
    path: str
    is_directory: bool

    @classmethod
    def parse(cls, text: str) -> Remote:
        """Raises `UsageError`, `InvalidPath`. A folder name may hold a colon, never a slash, so the first `:/`
        decides."""
        from ..core.paths import RelPath

        if ":/" in text:
            folder, _, raw = text.partition(":/")
        elif text.endswith(":"):
            folder, raw = text[:-1], ""
        elif "/" in text:
            raise UsageError(
                f"{text!a} names no place in a folder.", hint="Write NAME:/path, or ./path for a file on this machine."
            )
        elif ":" in text:
            name, _, rest = text.partition(":")
            raise UsageError(
                f"{text!a} is ambiguous.", hint=f"For a path write {name}:/{rest}; for a folder of that name {text}:/."
            )
        else:
            folder, raw = text, ""
        if not folder:
            raise UsageError(f"{text!a} names no folder.", hint="Write NAME:/path.")
        path = RelPath.parse(raw)
        return cls(folder, path.text, path.is_root or raw.endswith("/"))

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def __str__(self) -> str:
        return f"{self.folder}:/{self.path}"


def looks_remote(text: str) -> bool:
    """`NAME:/...` or `NAME:`; a local path with a colon is written with `./` before it."""
    return (":/" in text and "/" not in text.partition(":/")[0]) or text.endswith(":")
