"""Directories of this machine as sources and targets of transfers: nothing is read or written outside of them.

Sending: symbolic links that lead out are skipped, and what was opened is checked again by its real path, so a link that
is swapped in between does not help. Receiving: every directory is opened without following links, one step below the
other, so neither a hostile name from the server nor a link that lies in the target leads out.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..core.errors import InvalidPath, NoSpace, NotFound, UsageError
from ..core.paths import RelPath


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file to send. `relpath` is its guarded name below the tree, `boundary` the real directory it must be in."""

    path: Path
    relpath: str
    size: int
    boundary: Path | None = None


@dataclass(frozen=True, slots=True)
class Remark:
    """Something that was left out, and why."""

    path: str
    reason: str


@dataclass(slots=True)
class LocalScan:
    """What a directory holds. `invalid` names cannot be sent; `skipped` things are no files of this directory."""

    files: list[LocalFile] = field(default_factory=list)
    empty_dirs: list[str] = field(default_factory=list)
    skipped: list[Remark] = field(default_factory=list)
    invalid: list[Remark] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    def refuse_invalid(self) -> None:
        """Raises `InvalidPath` naming the first names that cannot be sent."""
        if self.invalid:
            first = self.invalid[0]
            more = f" and {len(self.invalid) - 1} more names" if len(self.invalid) > 1 else ""
            raise InvalidPath(
                f"{first.path!a}{more} cannot be uploaded: {first.reason}",
                hint="Rename it, or move it out of the directory.",
                detail={"invalid": [ascii(item.path) for item in self.invalid[:100]]},
            )


def scan_file(path: Path, relpath: str) -> LocalFile:
    """One file that the caller named; a symbolic link is followed because it was named. Raises `UsageError`,
    `NotFound`."""
    try:
        info = path.stat()
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist.") from None
    except (OSError, ValueError) as err:
        raise UsageError(f"{str(path)!a} cannot be read: {getattr(err, 'strerror', None) or err}.") from None
    if not stat.S_ISREG(info.st_mode):
        raise UsageError(f"{path} is not a file.")
    return LocalFile(path, RelPath.parse_file(relpath).text, info.st_size)


def scan_tree(root: Path, prefix: str = "") -> LocalScan:
    """Everything below `root`, with names below `prefix`. Blocking. Raises `NotFound`, `UsageError`."""
    scan = LocalScan()
    try:
        real_root = root.resolve(strict=True)
    except FileNotFoundError:
        raise NotFound(f"{root} does not exist.") from None
    except (OSError, RuntimeError) as err:
        raise UsageError(f"{root} cannot be read: {err}.") from None
    todo = [(root, RelPath.parse(prefix).text)]
    while todo:
        directory, above = todo.pop()
        try:
            with os.scandir(directory) as entries:
                children = sorted(entries, key=lambda entry: entry.name)
        except OSError as err:
            if directory == root:
                raise UsageError(f"{root} cannot be read: {err.strerror}.") from None
            scan.skipped.append(Remark(str(directory), f"cannot be read: {err.strerror}"))
            continue
        if not children and above and directory != root:
            scan.empty_dirs.append(above)
        for entry in children:
            _add(scan, entry, above, real_root, todo)
    return scan


def _add(scan: LocalScan, entry: os.DirEntry[str], above: str, real_root: Path, todo: list[tuple[Path, str]]) -> None:
    path = Path(entry.path)
    relpath = f"{above}/{entry.name}" if above else entry.name
    try:
        RelPath.parse_file(relpath)
    except InvalidPath as err:
        scan.invalid.append(Remark(entry.path, err.message))
        return
    try:
        if entry.is_symlink():
            real = Path(os.path.realpath(entry.path))
            if not real.is_relative_to(real_root):
                scan.skipped.append(Remark(entry.path, "symbolic link that leads out of the directory"))
                return
            if real.is_dir():
                scan.skipped.append(Remark(entry.path, "symbolic link to a directory"))
                return
        elif entry.is_dir():
            todo.append((path, relpath))
            return
        info = entry.stat()
    except FileNotFoundError:
        scan.skipped.append(Remark(entry.path, "symbolic link to nothing, or it vanished"))
        return
    except OSError as err:
        scan.skipped.append(Remark(entry.path, f"cannot be read: {err.strerror}"))
        return
    if stat.S_ISREG(info.st_mode):
        scan.files.append(LocalFile(path, relpath, info.st_size, real_root))
    else:
        scan.skipped.append(Remark(entry.path, "neither a file nor a directory"))


@contextmanager
def open_source(file: LocalFile) -> Iterator[int]:
    """A read-only file descriptor. Raises `UsageError` when it is no file any more or lies outside of its tree."""
    try:
        # O_NONBLOCK: a FIFO that took the file's place must not hold us.
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as err:
        raise UsageError(f"{file.path} cannot be read: {err.strerror}.") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UsageError(f"{file.path} is not a file any more.")
        if file.boundary is not None and not Path(f"/proc/self/fd/{fd}").readlink().is_relative_to(file.boundary):
            raise UsageError(f"{file.path} leads out of its directory now.")
        yield fd
    finally:
        os.close(fd)


class LocalTarget:
    """A directory that files are put into. Close it, or use it as a context manager."""

    def __init__(self, root: Path) -> None:
        """Makes the directory if needed. Raises `UsageError`, `NoSpace`."""
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as err:
            raise local_error(err, str(root)) from None

    def __enter__(self) -> LocalTarget:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def open_directory(self, path: RelPath) -> int:
        """A descriptor of a directory below, made if needed; the caller closes it.

        Raises `UsageError` when a symbolic link or a file is in the way.
        """
        fd = os.dup(self._fd)
        try:
            for name in path.text.split("/") if path.text else ():
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=fd)
                below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                os.close(fd)
                fd = below
        except OSError as err:
            os.close(fd)
            if isinstance(err, NotADirectoryError) or err.errno == errno.ELOOP:
                raise UsageError(
                    f"{self.root / path.text} passes through a symbolic link or a file.",
                    hint="Choose an empty target directory.",
                ) from None
            raise local_error(err, str(self.root / path.text)) from None
        return fd


def local_error(err: OSError, what: str) -> NoSpace | UsageError:
    """The error of the tree for a failed write to the local disk."""
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"The disk of {what} is full.", hint="Free space there; the download goes on where it stopped.")
    return UsageError(f"{what} cannot be written: {err.strerror}.")
