"""One file of a folder onto this machine: in pieces, several at a time, resumable, published under its name at the
end."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from ..core.errors import (
    Conflict,
    FileNotFound,
    IntegrityError,
    InternalError,
    MooringError,
    S3AccessDenied,
    TokenExpired,
)
from ..core.paths import RelPath
from .channel import Answer, Broken, Channels, Writer, together
from .http import error_from_answer
from .localtree import LocalTarget, local_error
from .manager import ManagerClient, TransferTicket
from .uploading import Mode, Patience, Progress, sha256_of, store_error, with_token

PIECE_BYTES = 64 * 1024 * 1024  # larger ones cost the proxy less, smaller ones lose less of a broken download
PIECES_AT_ONCE = 3
RESTARTS = 3


@dataclass(frozen=True, slots=True)
class Downloaded:
    """`resumed` bytes were here already from an earlier try. `sha256` in hex if it was asked for."""

    relpath: str
    path: Path
    size: int
    etag: str
    resumed: int = 0
    sha256: str | None = None


class _Changed(Exception):
    """The file on the other side is not the one we began with."""


@dataclass(slots=True)
class _Journal:
    """What is known of a partial download. `done`: numbers of whole pieces."""

    etag: str
    size: int
    done: set[int] = field(default_factory=set)


class PartFile:
    """`.mooring-<hash of the name>.part` beside the target, and `.state` with its ETag, size and whole pieces.

    The state counts only within one boot of the machine: after a crash of the machine nobody knows which of the written
    pages reached the disk.
    """

    def __init__(self, target: LocalTarget, path: RelPath) -> None:
        """Opens and locks it. Raises `Conflict` while another download of this file writes it, `UsageError`,
        `NoSpace`."""
        self.path = target.root / path.text
        self._name = path.name
        stem = f".mooring-{hashlib.sha256(self._name.encode()).hexdigest()[:16]}"
        self._part, self._state = f"{stem}.part", f"{stem}.state"
        self._directory = target.open_directory(path.parent)
        self.journal: _Journal | None = None
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self.fd = os.open(self._part, flags, 0o666, dir_fd=self._directory)
        except OSError as err:
            os.close(self._directory)
            raise local_error(err, str(self.path)) from None
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise Conflict(
                f"Another download writes {self.path} now.", hint="Wait until it ends, or choose another target."
            ) from None
        self.journal = self._load()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._directory)

    def begin(self, etag: str, size: int) -> None:
        """Starts anew with an empty file of the final size (sparse)."""
        try:
            with suppress(FileNotFoundError):
                os.unlink(self._state, dir_fd=self._directory)
            os.ftruncate(self.fd, 0)
            os.ftruncate(self.fd, size)
            self.journal = _Journal(etag, size)
            if size > PIECE_BYTES:
                self._append({"etag": etag, "size": size, "piece": PIECE_BYTES, "boot": _boot_id()})
        except OSError as err:
            raise local_error(err, str(self.path)) from None

    def mark(self, piece: int, *, whole_file: bool = False) -> None:
        """This piece is complete (or all are: the server sent everything although a range was asked for)."""
        if self.journal is None:
            return
        count = -(-self.journal.size // PIECE_BYTES)
        for number in range(count) if whole_file else (piece,):
            self.journal.done.add(number)
            if self.journal.size > PIECE_BYTES:
                self._append(number)

    def publish(self) -> None:
        """Gives it its name; a file of that name is replaced."""
        if self.journal is None or os.fstat(self.fd).st_size != self.journal.size:
            raise IntegrityError(f"{self.path} has not the size that was promised.", hint="Download it again.")
        try:
            os.replace(self._part, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError as err:
            raise local_error(err, str(self.path)) from None
        with suppress(FileNotFoundError):
            os.unlink(self._state, dir_fd=self._directory)

    def discard_if_small(self) -> None:
        """After a failure: what can be resumed is kept, the rest goes."""
        if self.journal is None or not self.journal.done or self.journal.size <= PIECE_BYTES:
            for name in (self._part, self._state):
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self._directory)

    def _append(self, value: object) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._state, flags, 0o600, dir_fd=self._directory)
        try:
            os.write(fd, json.dumps(value).encode() + b"\n")
        finally:
            os.close(fd)

    def _load(self) -> _Journal | None:
        """The journal of an earlier try, or None when there is none that can be trusted."""
        try:
            fd = os.open(self._state, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        except OSError:
            return None
        with os.fdopen(fd, "rb") as file:
            lines = file.read().split(b"\n")
        try:
            head = json.loads(lines[0])
            if (head["piece"], head["boot"]) != (PIECE_BYTES, _boot_id()):
                return None
            journal = _Journal(str(head["etag"]), int(head["size"]))
            # The last line may be cut: a whole one ends with a line break.
            journal.done.update(int(line) for line in lines[1:-1])
        except (ValueError, KeyError, TypeError):
            return None
        return journal if os.fstat(self.fd).st_size == journal.size else None


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"


class FileDownload:
    """Gets `folder`/`relpath` into `part`. Use once."""

    def __init__(
        self,
        channels: Channels,
        manager: ManagerClient,
        folder: str,
        relpath: str,
        part: PartFile,
        mode: Mode,
        progress: Progress | None,
    ) -> None:
        self._channels, self._manager = channels, manager
        self._folder, self._relpath = folder, relpath
        self._part, self._mode = part, mode
        self._progress = progress
        self._said = 0
        self._url = ""
        self._direct = False  # the URL is one of the object store itself

    async def run(self, *, checksum: bool = False) -> Downloaded:
        """Raises `FileNotFound`, `IntegrityError` (it keeps changing), `ServiceUnavailable`, `NoSpace`,
        `UsageError`."""
        try:
            for _ in range(RESTARTS):
                await self._locate()
                try:
                    resumed = await self._fetch_all()
                    break
                except _Changed:
                    self._part.journal = None
                    self._say(-self._said)
            else:
                raise IntegrityError(
                    f"{self._relpath} changes while it is read.",
                    hint="Wait until nothing writes to it, then try again.",
                )
            journal = self._part.journal
            if journal is None:
                raise InternalError(f"The download of {self._relpath} ended without a size.", hint="Report this.")
            digest = await sha256_of(self._channels, self._part.fd, journal.size) if checksum else None
            self._part.publish()
        except BaseException:
            self._part.discard_if_small()
            raise
        return Downloaded(
            self._relpath, self._part.path, journal.size, journal.etag, resumed, digest.hex() if digest else None
        )

    def _say(self, count: int) -> None:
        self._said += count
        if self._progress is not None and count:
            self._progress(count)

    async def _locate(self) -> None:
        """A fresh URL."""
        ticket = await self._manager.request_download(self._folder, self._relpath)
        self._direct = False
        self._url = with_token(ticket)
        if self._mode is Mode.PRESIGNED:
            self._url = with_token(ticket, redirect="presigned")

    async def _fetch_all(self) -> int:
        """Returns how many bytes were here before."""
        resumed = 0
        if self._part.journal is None:
            await self._fetch(0)
        else:
            resumed = sum(self._length(number) for number in self._part.journal.done)
            self._say(resumed)
        journal = self._part.journal
        if journal is None:
            raise InternalError(f"The download of {self._relpath} has no beginning.", hint="Report this.")
        todo = iter([n for n in range(-(-journal.size // PIECE_BYTES)) if n not in journal.done])

        async def work() -> None:
            for number in todo:
                await self._fetch(number)

        async with together() as group:
            for _ in range(PIECES_AT_ONCE):
                group.create_task(work())
        if resumed == journal.size and resumed:
            await self._confirm(journal)
        return resumed

    def _length(self, number: int) -> int:
        journal = self._part.journal
        size = journal.size if journal is not None else PIECE_BYTES
        return min(PIECE_BYTES, size - number * PIECE_BYTES)

    async def _confirm(self, journal: _Journal) -> None:
        """All pieces were here before: is it still the same file? (Its last byte is asked for, under its ETag.)"""
        journal.done.discard(number := (journal.size - 1) // PIECE_BYTES)
        self._say(-self._length(number))
        await self._fetch(number)

    async def _fetch(self, number: int) -> None:
        """One piece; the first one of a new download also finds out size and ETag."""
        begin = number * PIECE_BYTES
        piece = _Piece(self, begin)
        patience = Patience(f"Downloading {self._relpath}", self._url)
        renewed, hops = False, 0
        while True:
            before = piece.written
            headers = {"Range": f"bytes={begin + piece.written}-{begin + self._length(number) - 1}"}
            journal = self._part.journal
            url = self._url
            if journal is not None:
                # S3 knows If-Match on GET, our proxy If-Range: both keep us from mixing two versions of a file.
                headers["If-Match" if self._direct else "If-Range"] = journal.etag
            reason: str | MooringError
            try:
                answer = await self._channels.exchange("GET", url, headers=headers, sink=piece.sink, moved=self._say)
                if answer.status in (302, 303, 307) and "location" in answer.headers and not hops:
                    hops += 1
                    if self._url == url:  # else another piece was faster
                        self._url, self._direct = answer.headers["location"], True
                    continue
                if piece.error is not None:
                    raise piece.error
                if piece.is_complete(self._length(number)):
                    self._part.mark(number, whole_file=answer.status == 200)
                    return
                if answer.status not in (200, 206):
                    reason = self._refusal(answer)
                    if isinstance(reason, (TokenExpired, S3AccessDenied)) and not renewed:
                        renewed, hops = True, 0
                        await self._locate()
                        continue
                    if not reason.temporary:
                        raise reason
                else:
                    reason = "the connection ended too early"
            except Broken as err:
                if piece.error is not None:
                    raise piece.error from None
                reason = err.reason
            if piece.written > before:
                patience.progressed()
            await patience.after(reason)

    def _refusal(self, answer: Answer) -> MooringError:
        if answer.status in (412, 416):
            raise _Changed
        if not self._direct:
            return error_from_answer(answer.status, answer.content, "storage proxy")
        if answer.status == 404:
            return FileNotFound(f"There is no file {self._relpath} in the folder.", hint="Check the name.")
        return store_error(answer, self._relpath)


async def file_size(channels: Channels, ticket: TransferTicket, relpath: str) -> int:
    """By HEAD on the client port. Raises `FileNotFound` and what else the proxy answered."""
    url = with_token(ticket)
    patience = Patience(f"Looking for {relpath}", url)
    while True:
        try:
            answer = await channels.exchange("HEAD", url)
        except Broken as err:
            await patience.after(err.reason)
            continue
        if answer.status == 200 and answer.headers.get("content-length", "").isdecimal():
            return int(answer.headers["content-length"])
        if answer.status == 404:  # the answer to a HEAD has no body that would say it
            raise FileNotFound(f"There is no file {relpath} in the folder.", hint="Check the name.")
        error = error_from_answer(answer.status, b"", "storage proxy")
        if not error.temporary:
            raise error
        await patience.after(error)


class _Piece:
    """Writes one piece into the part file; its methods run in the thread that receives."""

    def __init__(self, download: FileDownload, begin: int) -> None:
        self._download = download
        self._begin = begin
        self.written = 0
        self.whole_file = False
        self.error: Exception | None = None

    def is_complete(self, length: int) -> bool:
        journal = self._download._part.journal
        return journal is not None and self.written >= (journal.size if self.whole_file else length)

    def sink(self, status: int, headers: Mapping[str, str]) -> Writer | None:
        try:
            return self._sink(status, headers)
        except Exception as err:  # raised again by the task that waits for this thread
            self.error = err
            return None

    def _sink(self, status: int, headers: Mapping[str, str]) -> Writer | None:
        part = self._download._part
        etag = headers.get("etag", "")
        if status == 416 and headers.get("content-range", "").endswith("*/0") and self._begin == 0:
            if part.journal is None:
                part.begin(etag, 0)
            return None
        if status == 200:
            if part.journal is not None and not (self._begin == 0 and self.written == 0 and etag == part.journal.etag):
                raise _Changed
            if self.written:
                raise _Changed
            size, start = int(headers.get("content-length", "-1")), 0
            self.whole_file = True
        elif status == 206:
            match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("content-range", ""))
            if match is None:
                raise InternalError(f"A range of {self._download._relpath} came without Content-Range.")
            start, size = int(match[1]), int(match[3])
        else:
            return None
        if start != self._begin + self.written:
            raise InternalError(f"Another range of {self._download._relpath} came than was asked for.")
        if part.journal is None:
            if size < 0 or not etag:
                raise InternalError(f"{self._download._relpath} came without size or ETag.", hint="Report this.")
            part.begin(etag, size)
        elif (part.journal.etag, part.journal.size) != (etag, size):
            raise _Changed
        return self._write

    def _write(self, data: memoryview) -> None:
        try:
            offset = 0
            while offset < len(data):
                offset += os.pwrite(self._download._part.fd, data[offset:], self._begin + self.written + offset)
        except OSError as err:
            self.error = local_error(err, str(self._download._part.path))
            raise
        self.written += len(data)
