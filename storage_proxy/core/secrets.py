"""`Secret`: text that cannot print, and the files that hold it."""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets as _secrets
import stat
from pathlib import Path
from typing import Any, Self

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from .errors import ConfigError, InsecureFileMode

MASK = "**********"


class Secret:
    """A credential in memory. `str`, `repr`, `format` and JSON never show it; `reveal()` is easy to grep for."""

    __slots__ = ("__value",)

    def __init__(self, value: str) -> None:
        self.__value = value

    def reveal(self) -> str:
        return self.__value

    def equals(self, other: str) -> bool:
        """Compares in time that does not depend on where the first difference is."""
        return hmac.compare_digest(self.__value.encode(), other.encode("utf-8", "surrogatepass"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self.equals(other.reveal())

    def __hash__(self) -> int:
        return hash((Secret, self.__value))

    def __bool__(self) -> bool:
        return bool(self.__value)

    def __str__(self) -> str:
        return MASK

    def __repr__(self) -> str:
        return f"Secret({MASK!r})"

    def __format__(self, spec: str) -> str:
        return MASK

    def __reduce__(self) -> Any:  # Any: what object.__reduce__ is declared to return
        raise TypeError("a Secret is not pickled")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        from_text = core_schema.no_info_after_validator_function(cls, core_schema.str_schema(min_length=1))
        return core_schema.json_or_python_schema(
            json_schema=from_text,
            python_schema=core_schema.union_schema([core_schema.is_instance_schema(cls), from_text]),
            serialization=core_schema.plain_serializer_function_ser_schema(lambda _: MASK),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "format": "password", "writeOnly": True, "minLength": 1}

    @classmethod
    def generate(cls, nbytes: int = 32) -> Self:
        """A new random secret, URL-safe text of `nbytes` of entropy."""
        return cls(_secrets.token_urlsafe(nbytes))


def check_private(path: Path) -> None:
    """Raises `InsecureFileMode` if group or others may read or write `path`, or it belongs to a third user."""
    try:
        info = path.stat()
    except FileNotFoundError:
        raise ConfigError(f"Secret file {path} does not exist.", hint="Create it with mode 0600.") from None
    except PermissionError:
        raise ConfigError(f"Secret file {path} may not be read by this user.", hint="Check its owner.") from None
    if stat.S_IMODE(info.st_mode) & 0o077:
        raise InsecureFileMode(
            f"Secret file {path} has mode {stat.S_IMODE(info.st_mode):04o}.", hint=f"Run: chmod 600 {path}"
        )
    if info.st_uid not in (0, os.geteuid()):
        raise InsecureFileMode(
            f"Secret file {path} belongs to uid {info.st_uid}.", hint=f"Run: chown {os.geteuid()} {path}"
        )


def read_secret(path: Path) -> Secret:
    """The first line of a private file."""
    check_private(path)
    text = path.read_text(encoding="utf-8").partition("\n")[0].strip()
    if not text:
        raise ConfigError(f"Secret file {path} is empty.", hint="Write the secret into its first line.")
    return Secret(text)


def write_private(path: Path, data: bytes) -> None:
    """Writes a 0600 file atomically: a new file beside it (never through a symlink), fsync, rename.

    Raises OSError (disk full, no right). On failure nothing is left behind and the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{_secrets.token_hex(4)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


def read_or_create(path: Path, nbytes: int = 32) -> Secret:
    """The secret in `path`, generated on first use."""
    if not path.exists():
        write_private(path, (Secret.generate(nbytes).reveal() + "\n").encode())
    return read_secret(path)
