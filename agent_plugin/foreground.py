"""`mooring mount` and `mooring umount`: one bucket at one directory, without an agent. The tool for trials and
benchmarks.

The mount process is mounted at the directory itself and lives as long as the command. The key file is wiped as soon as
the mount is ready (s3fs reads it only once), and the process is told by the kernel when the command is killed, so that
even kill -9 leaves no mount.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from storage_proxy.core.config import parse_request
from storage_proxy.core.errors import (
    Conflict,
    DeadlineExceeded,
    InUse,
    MountFailed,
    NotEmpty,
    NotFound,
    UsageError,
)
from storage_proxy.core.ids import AccessMode, MountKey
from storage_proxy.core.logs import get_logger
from storage_proxy.core.wire import Location, Ownership, S3Credential

from .config import DriversConfig
from .credentials import wipe_credential, write_credential
from .drivers import Drivers, Launch, MountPlan
from .host import check_host
from .kernel import fusectl, top_at, unmount
from .kernel.abandon import off_loop
from .layout import unmount_one
from .mounter import KERNEL_SECONDS, wait_ready
from .probe import Prober
from .s3check import check_place
from .supervisor import MountProcess, ProcessID

log = get_logger(__name__)

DEADLINE_SECONDS = 10.0
_CHECK_SECONDS = 6.0
_ROOM = "mooring-mount-"
_MEMORY = (Path("/run"), Path("/dev/shm"))  # noqa: S108 - a directory is made there, 0700 and with a random name


@dataclass(frozen=True, slots=True)
class ForegroundMount:
    """What is asked for."""

    plan: MountPlan
    directory: Path
    credential: S3Credential
    ca_file: Path | None = None


@dataclass(frozen=True, slots=True)
class Mounted:
    """What stands now."""

    place: str
    directory: Path
    pid: int
    seconds: float


def parse_place(url: str, *, endpoint: str, region: str) -> Location:
    """`s3://BUCKET[/PREFIX]`; the rest after the bucket is taken as it is, nothing is decoded."""
    match = re.fullmatch(r"s3://([^/]+)(?:/(.*))?", url, re.DOTALL)
    if match is None:
        raise UsageError(f"{url[:80]!r} is not an S3 location.", hint="Write it as s3://BUCKET or s3://BUCKET/PREFIX.")
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(
            f"{endpoint[:80]!r} is not an endpoint.", hint="Write it as https://host or http://127.0.0.1:9000."
        )
    return parse_request(
        Location, {"endpoint": endpoint, "region": region, "bucket": match[1], "prefix": match[2] or ""}
    )


def make_plan(location: Location, mode: AccessMode, ownership: Ownership, driver: str) -> MountPlan:
    return MountPlan(
        key=MountKey("foreground"),
        driver=driver,
        volume="foreground",
        location=location,
        mode=mode,
        ownership=ownership,
        credential_id="foreground",
    )


def find_credential(path: Path | None, environ: Mapping[str, str]) -> S3Credential:
    """From a private file (JSON with access_key and secret_key, or two lines), else from AWS_ACCESS_KEY_ID and
    AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN).
    """
    if path is not None:
        return S3Credential.read(path)
    data = {
        "access_key": environ.get("AWS_ACCESS_KEY_ID"),
        "secret_key": environ.get("AWS_SECRET_ACCESS_KEY"),
        "session_token": environ.get("AWS_SESSION_TOKEN") or None,
    }
    if not data["access_key"] or not data["secret_key"]:
        raise UsageError(
            "There is no credential in the environment.",
            hint="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give --access-key-file.",
        )
    return parse_request(S3Credential, data)


async def run(request: ForegroundMount, announce: Callable[[Mounted], None]) -> None:
    """Mounts, tells `announce` when the mount is usable, waits for SIGINT or SIGTERM, unmounts.

    Raises the cause and leaves nothing behind when the mount does not come to be, or dies later. Returns when it was
    unmounted by somebody else.
    """
    check_host()
    plan = request.plan
    directory = check_directory(request.directory)
    driver = Drivers(DriversConfig()).get(plan.driver)
    begun = time.monotonic()
    info = await off_loop("a look at the driver", KERNEL_SECONDS + 1, driver.check)
    driver.accept(plan, request.credential)
    await check_place(plan.location, request.credential, info, deadline=_CHECK_SECONDS, ca_file=request.ca_file)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        with _private_room() as (room, scratch):
            key_file = room / "key"
            write_credential(key_file, driver.credential_file(request.credential))
            launch = driver.launch(plan, mount_point=directory, credential=key_file, scratch=scratch)
            process = MountProcess.start(_dying_with_us(launch), room / "log")
            try:
                async with Prober() as prober:
                    await _until(
                        stop,
                        wait_ready(directory, process, prober, plan, DEADLINE_SECONDS, [request.credential.secret_key]),
                    )
                wipe_credential(key_file)
                if not stop.is_set():
                    announce(Mounted(plan.place, directory, process.pid, time.monotonic() - begun))
                    await _until(stop, process.ended.wait())
                if process.ended.is_set() and top_at(directory) is not None:
                    said = process.last_words(request.credential.secret_key)
                    raise MountFailed(
                        f"The {plan.driver} process for {plan.place} ended (status {process.status})"
                        + (f"; it said: {said}." if said else "."),
                        hint="Mount again.",
                    )
            finally:
                await _end(directory, process)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def _until(stop: asyncio.Event, work: Coroutine[object, object, object]) -> None:
    """Waits for `work` or for the stop, whichever is first; `work` is cancelled by the stop and its error raised."""
    task = asyncio.create_task(work)
    waiter = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiter.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _end(directory: Path, process: MountProcess) -> None:
    """Unmounts and ends the process, whatever state they are in."""
    top = top_at(directory)
    try:
        if top is not None and top.is_fuse:
            lazy = await off_loop("the unmount", KERNEL_SECONDS, lambda: unmount_one(directory))
            if lazy:
                log.warning("the directory is still in use; it goes when its last user does", path=str(directory))
    except DeadlineExceeded:
        if top is not None:
            fusectl.abort(fusectl.SYSTEM, top.connection)
        with contextlib.suppress(OSError):
            unmount(directory, lazy=True)
    if not await process.stop(patience=KERNEL_SECONDS) and top is not None:
        fusectl.abort(fusectl.SYSTEM, top.connection)


@contextmanager
def _private_room() -> Iterator[tuple[Path, Path]]:
    """A 0700 directory in memory for the key and the log, and one on disk for temporary files; both go at the end.

    Their names tell whose they are, so that those of a command that was killed go with the next one.
    """
    memory = next((place for place in _MEMORY if os.access(place, os.W_OK)), None)
    disk = Path(tempfile.gettempdir())
    for parent in {memory or disk, disk}:
        _sweep_rooms(parent)
    own = ProcessID.of(os.getpid())
    prefix = f"{_ROOM}{os.getpid()}.{own.started if own else 0}-"
    room = Path(tempfile.mkdtemp(prefix=prefix, dir=memory))
    try:
        scratch = Path(tempfile.mkdtemp(prefix=prefix))
        try:
            yield room, scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        wipe_credential(room / "key")
        shutil.rmtree(room, ignore_errors=True)


def _sweep_rooms(parent: Path) -> None:
    for room in parent.glob(f"{_ROOM}*"):
        match = re.match(r"(\d+)\.(\d+)-", room.name.removeprefix(_ROOM))
        with contextlib.suppress(OSError):
            if match and room.lstat().st_uid == os.geteuid() and not ProcessID(int(match[1]), int(match[2])).runs:
                wipe_credential(room / "key")
                shutil.rmtree(room, ignore_errors=True)


def _dying_with_us(launch: Launch) -> Launch:
    """The same program, told by the kernel to end when this process dies (setpriv of util-linux, where it is there)."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        return launch
    return Launch((setpriv, "--pdeathsig", "TERM", "--", *launch.argv), launch.environment, launch.directory)


def check_directory(path: Path) -> Path:
    """An existing empty directory with nothing mounted on it, as an absolute path. Asks the mount table first: a dead
    mount below the name would make every other question hang or lie.
    """
    place = _absolute(path)
    top = top_at(place)
    if top is not None:
        raise Conflict(f"Something ({top.fstype}) is mounted at {place} already.", hint=f"Run: mooring umount {place}")
    try:
        if next(place.iterdir(), None) is not None:
            raise NotEmpty(f"The directory {place} is not empty.", hint="Mount on an empty directory.")
    except FileNotFoundError:
        raise NotFound(f"The directory {place} does not exist.", hint=f"Run: mkdir -p {place}") from None
    except NotADirectoryError:
        raise UsageError(f"{place} is not a directory.", hint="Mount on an empty directory.") from None
    except PermissionError:
        raise UsageError(f"The directory {place} may not be read.", hint="Run as root.") from None
    return place


def _absolute(path: Path) -> Path:
    """Without touching what the last name stands for."""
    whole = Path.cwd() / path
    return (
        Path(os.path.normpath(whole.parent.resolve() / whole.name)) if whole.name not in ("", "..") else whole.resolve()
    )


async def unmount_directory(path: Path, *, lazy: bool = False) -> int:
    """Takes off the FUSE mounts at `path`, dead or alive. Returns how many there were.

    Raises `NotFound` if none is there, `InUse` if a living one is in use and `lazy` is not said.
    """
    place = _absolute(path)
    count = 0
    async with Prober() as prober:
        while (top := top_at(place)) is not None and top.is_fuse:
            try:
                await off_loop("the unmount", KERNEL_SECONDS, lambda: unmount(place, lazy=lazy))
            except DeadlineExceeded:
                fusectl.abort(fusectl.SYSTEM, top.connection)
                unmount(place, lazy=True)
            except PermissionError:
                raise UsageError(f"This user may not unmount {place}.", hint="Run as root.") from None
            except OSError as err:
                if err.errno != errno.EBUSY:
                    raise MountFailed(f"{place} cannot be unmounted: {err.strerror}.") from None
                if (await prober.stat(place, 2.0)).healthy:
                    raise InUse(
                        f"Programs still use {place}.", hint="End them (see: fuser -vm DIR), or add --lazy."
                    ) from None
                unmount(place, lazy=True)
            count += 1
    if count == 0:
        raise NotFound(f"Nothing that Mooring could unmount is at {place}.", hint="See: findmnt -t fuse.s3fs")
    return count
