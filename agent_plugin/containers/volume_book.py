"""The book of container volumes: which there are, and which of them an engine believes to have mounted.

One JSON file in the state directory, replaced as a whole and synced before an engine is answered: an engine creates a
volume once and names it for years, and one that was told "mounted" does not ask again. References count for one boot of
the host only, since no container survives another.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self, TypeVar

from pydantic import ConfigDict, ValidationError

from storage_proxy.core.errors import ConfigError, NoSpace
from storage_proxy.core.secrets import write_private
from storage_proxy.core.wire import Wire

from .volume_options import VolumeOptions

T = TypeVar("T")

_VERSION = 1
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class VolumeRecord(Wire):
    """One volume. `references` are the engine's ids of its mounts; `created` in seconds since the epoch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    options: VolumeOptions
    created: float
    references: frozenset[str] = frozenset()


class _Page(Wire):
    """The file as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    boot_id: str
    volumes: tuple[VolumeRecord, ...]


class VolumeBook:
    """Use `await VolumeBook.open(path)`, and `close`. Reading is from memory.

    Changes are written in the order of the calls; a call that is cancelled still takes effect. Each raises `NoSpace` if
    the file cannot be written; then memory and file are as they were.
    """

    def __init__(self, path: Path, boot_id: str) -> None:
        self.path = path
        self._boot_id = boot_id
        self._records: dict[str, VolumeRecord] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="volume-book")

    @classmethod
    async def open(cls, path: Path, *, boot_id: str | None = None) -> Self:
        """Raises `ConfigError` for a file that is damaged or of another version."""
        book = cls(path, boot_id or _BOOT_ID.read_text(encoding="ascii").strip())
        try:
            book._records = await book._run(book._read)
        except BaseException:
            book._thread.shutdown(wait=False)
            raise
        return book

    async def close(self) -> None:
        await self._run(lambda: None)
        self._thread.shutdown(wait=True)

    def get(self, name: str) -> VolumeRecord | None:
        return self._records.get(name)

    def all(self) -> list[VolumeRecord]:
        return sorted(self._records.values(), key=lambda record: record.name)

    async def put(self, record: VolumeRecord) -> None:
        await self._change(record.name, lambda _: record)

    async def remove(self, name: str) -> None:
        await self._change(name, lambda _: None)

    async def refer(self, name: str, reference: str) -> None:
        """Remembers that an engine has it mounted. Idempotent."""
        await self._change(name, lambda record: record and _with(record, record.references | {reference}))

    async def forget(self, name: str, reference: str) -> None:
        """Idempotent; also for a volume that is not there."""
        await self._change(name, lambda record: record and _with(record, record.references - {reference}))

    async def forget_all(self, name: str) -> None:
        await self._change(name, lambda record: record and _with(record, frozenset()))

    async def _change(self, name: str, change: Callable[[VolumeRecord | None], VolumeRecord | None]) -> None:
        def work() -> None:
            old = self._records.get(name)
            new = change(old)
            if new == old:
                return
            records = {**self._records}
            if new is None:
                records.pop(name, None)
            else:
                records[name] = new
            self._write(_Page(version=_VERSION, boot_id=self._boot_id, volumes=tuple(records.values())))
            self._records = records

        await self._run(work)

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, call))

    def _read(self) -> dict[str, VolumeRecord]:
        try:
            page = _Page.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except OSError as err:
            raise ConfigError(f"The book of volumes {self.path} cannot be read: {err.strerror}.") from None
        except ValidationError:
            raise ConfigError(
                f"The book of volumes {self.path} is damaged or was written by another version.",
                hint="Restore it from a backup; or delete it, and create the volumes anew (their data are in S3).",
            ) from None
        records = page.volumes
        if page.boot_id != self._boot_id:
            records = tuple(_with(record, frozenset()) for record in records)
        return {record.name: record for record in records}

    def _write(self, page: _Page) -> None:
        try:
            write_private(self.path, page.model_dump_json(indent=1).encode())
            directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as err:
            raise NoSpace(
                f"The book of volumes {self.path} cannot be written: {err.strerror}.",
                hint="Free space below the state-dir, or check its owner.",
            ) from None


def _with(record: VolumeRecord, references: frozenset[str]) -> VolumeRecord:
    return record.model_copy(update={"references": references})
