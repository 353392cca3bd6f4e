"""The steps of a mount's life, each by itself: check, start, wait until ready, put in place, take down.

Knows nothing of sessions or of the journal; the attachments manager writes down each step before it calls it here. A
mount is ready when it is in the kernel mount table on the private stage, its process runs and a `stat` of its root was
answered; only then is it moved to the pool, on top of whatever is there, and so becomes visible at once and whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from storage_proxy.core.errors import DeadlineExceeded, MooringError, MountError, MountFailed, NoSpace
from storage_proxy.core.logs import get_logger
from storage_proxy.core.secrets import Secret
from storage_proxy.core.wire import S3Credential

from .cgroups import Cgroups
from .credentials import read_credential, wipe_credential, write_credential
from .drivers import Drivers, MountPlan
from .journal import MountRecord
from .kernel import MountEntry, entries_at, move_mount, read_mountinfo, top_at
from .kernel import fusectl as _fusectl
from .kernel.abandon import off_loop
from .layout import Layout, not_permitted, unmount_stack
from .probe import Prober
from .s3check import check_place
from .supervisor import MountProcess

log = get_logger(__name__)

KERNEL_SECONDS = 5.0
_POLL_SECONDS = (0.004, 0.05)
# How long a process may take from the unmount to its exit, before it is told to. It leaves at once unless a container
# still holds a copy of the mount, or its last requests are slow.
_EXIT_SECONDS = 5.0
# The kernel does one after the other; more would only wait in line while their deadline runs.
_UNMOUNTS_AT_ONCE = 8
_STARTS_AT_ONCE = 16


def new_token() -> str:
    """A name for one start of a mount process: 16 hex digits."""
    return secrets.token_hex(8)


class Mounter:
    """`scratch` is a directory on disk where every mount gets a 0700 folder of its own for temporary files.

    Hold `unmounting` around every unmount: hundreds may end at the same moment.
    """

    def __init__(
        self,
        layout: Layout,
        drivers: Drivers,
        prober: Prober,
        scratch: Path,
        *,
        deadline: float,
        ca_file: Path | None,
        cgroups: Cgroups,
    ) -> None:
        self._layout = layout
        self._drivers = drivers
        self._prober = prober
        self._scratch = scratch
        self._deadline = deadline
        self._ca_file = ca_file
        self._cgroups = cgroups
        self._starting: dict[str, asyncio.Semaphore] = {}
        self.unmounting = asyncio.Semaphore(_UNMOUNTS_AT_ONCE)

    async def check(self, plan: MountPlan, credential: S3Credential) -> None:
        """Everything that can be known before a process is started. Touches nothing on this host.

        Raises DriverMissing, Unsupported, and what `s3check.check_place` raises.
        """
        driver = self._drivers.get(plan.driver)
        info = await off_loop("a look at the driver", KERNEL_SECONDS + 1, driver.check)
        driver.accept(plan, credential)
        await check_place(plan.location, credential, info, deadline=self._deadline, ca_file=self._ca_file)

    async def examine(self, record: MountRecord) -> MooringError | None:
        """Why S3 refuses what a mount needs, with the credential of that mount; None if it does not."""
        try:
            credential = self._credential(record)
            driver = self._drivers.get(record.plan.driver)
            info = await off_loop("a look at the driver", KERNEL_SECONDS + 1, driver.check)
            await check_place(record.plan.location, credential, info, deadline=self._deadline, ca_file=self._ca_file)
        except MooringError as err:
            return err
        return None

    def _credential(self, record: MountRecord) -> S3Credential:
        driver = self._drivers.get(record.plan.driver)
        return driver.read_credential(read_credential(self._layout.credential(record.key)))

    async def start(self, record: MountRecord, credential: S3Credential | None) -> MountProcess:
        """Writes the credential file, if there is a credential to write (else the key has one), and starts the process.

        On failure the caller calls `remove` or `undo`.
        """
        layout, token = self._layout, record.token
        driver = self._drivers.get(record.plan.driver)
        scratch = self._scratch / token
        try:
            layout.keep_stage_private()
            layout.staged(token).mkdir(mode=0o700)
            scratch.mkdir(mode=0o700)
        except OSError as err:
            raise NoSpace(
                f"A directory for the mount cannot be made: {err.strerror}.", hint="Free space below the state-dir."
            ) from None
        if credential is not None:
            write_credential(layout.credential(record.key), driver.credential_file(credential))
        launch = driver.launch(
            record.plan, mount_point=layout.staged(token), credential=layout.credential(record.key), scratch=scratch
        )
        process = MountProcess.start(launch, layout.log(token))
        await self._cgroups.enter(process.pid, token)
        return process

    def last_words(self, record: MountRecord, process: MountProcess) -> str:
        """Why a process ended, as far as it or the kernel says."""
        return self._cgroups.reason(record.token) or process.last_words()

    def starting(self, record: MountRecord) -> asyncio.Semaphore:
        """Hold it from `start` until `ready`: if hundreds die at once, all starting at once would miss their deadline.

        One for each endpoint, so that a server that is silent holds up nobody else's mounts.
        """
        return self._starting.setdefault(record.plan.location.endpoint, asyncio.Semaphore(_STARTS_AT_ONCE))

    async def ready(self, record: MountRecord, process: MountProcess) -> str:
        """Waits until the staged mount is usable. Returns its device, "major:minor".

        Raises `MountFailed` if the process ended, `DeadlineExceeded` if the time did.
        """
        secrets: list[Secret] = []
        with contextlib.suppress(MooringError):
            secrets.append(self._credential(record).secret_key)
        return await wait_ready(
            self._layout.staged(record.token), process, self._prober, record.plan, self._deadline, secrets
        )

    async def place(self, record: MountRecord) -> None:
        """Moves the mount from the stage to the pool, in the place of what is there. Nobody else looks at the pool."""
        target = self._layout.pooled(record.key)

        def move() -> None:
            unmount_stack(target)  # first: a dead mount answers neither mkdir nor stat
            target.mkdir(mode=0o755, exist_ok=True)
            self._layout.keep_stage_private()
            move_mount(self._layout.staged(record.token), target)
            self._layout.staged(record.token).rmdir()

        try:
            await off_loop("the move of a mount into the pool", KERNEL_SECONDS, move)
        except PermissionError as err:
            raise not_permitted(err) from None
        except OSError as err:
            raise MountError(f"A mount could not be put into the pool: {err.strerror}.", hint="Try again.") from None

    def pooled(self, record: MountRecord) -> Path:
        return self._layout.pooled(record.key)

    async def placed(self, record: MountRecord) -> bool:
        """True if what is seen in the pool is the recorded mount."""
        top = top_at(self._layout.pooled(record.key))
        return top is not None and top.device == record.device

    async def usable(self, record: MountRecord) -> bool:
        """True if the recorded mount is in the pool, or still on the stage, and does not say that it is dead.

        One that only takes long to answer counts as usable: a busy machine is no reason to end somebody's session.
        """
        for place in (self._layout.pooled(record.key), self._layout.staged(record.token)):
            top = top_at(place)
            if top is not None and top.is_fuse and top.device == record.device:
                answer = await self._prober.stat(place, KERNEL_SECONDS)
                return answer.healthy or answer.number is None
        return False

    async def cut(self, record: MountRecord, process: MountProcess | None) -> None:
        """Frees everybody who waits for a mount, and kills its process. Returns at once; raises nothing."""
        if record.device is not None:
            await self._abort({int(record.device.partition(":")[2])})
        if process is not None:
            process.send(signal.SIGKILL)

    async def undo(self, record: MountRecord, process: MountProcess | None) -> None:
        """Takes back a start that did not get ready. The key keeps its credential and whatever is in the pool.

        Raises as `remove` does.
        """
        staged = self._layout.staged(record.token)
        if process is not None:
            process.send(signal.SIGKILL)  # it has served nobody, so nothing is lost
        await self._end([staged], [process])
        await self.sweep(record.token)

    async def remove(
        self,
        record: MountRecord,
        process: MountProcess | None,
        retired: Mapping[str, MountProcess | None] | None = None,
    ) -> None:
        """Takes everything of a key away: mounts, processes, credential, temporary files. Idempotent.

        `retired` are its former starts by token. Sessions must be unbound before. Raises `DeadlineExceeded` or
        `MountError` if something stays.
        """
        layout = self._layout
        tokens = [record.token, *(retired or {})]
        places = [layout.pooled(record.key), *map(layout.staged, tokens)]
        await self._end(places, [process, *(retired or {}).values()])
        wipe_credential(layout.credential(record.key))
        for token in tokens:
            await self.sweep(token)
        with contextlib.suppress(OSError):
            layout.pooled(record.key).rmdir()

    async def _end(self, places: Sequence[Path], processes: Iterable[MountProcess | None]) -> None:
        """Unmounts, then waits for the processes, in the end by force."""
        table = read_mountinfo()
        connections = {entry.connection for place in places for entry in entries_at(place, table) if entry.is_fuse}
        try:
            await self._unmount(places)
        except DeadlineExceeded:
            # The kernel waits for the mount process: end their connection, then it has nothing to wait for.
            await self._abort(connections)
            await self._unmount(places)
        running = [process for process in processes if process is not None]
        for process, ended in zip(
            running, await asyncio.gather(*(each.stop(patience=_EXIT_SECONDS) for each in running)), strict=True
        ):
            if not ended:
                await self._abort(connections)
                if not await process.wait(KERNEL_SECONDS):
                    raise MountError(
                        f"Mount process {process.pid} does not end.",
                        hint="Look at its stack in /proc and at the kernel log.",
                    )

    async def sweep(self, token: str) -> None:
        """Removes the directories and the log of one start."""
        layout = self._layout

        def work() -> None:
            shutil.rmtree(self._scratch / token, ignore_errors=True)
            layout.log(token).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                layout.staged(token).rmdir()

        await off_loop("the removal of temporary files", 60.0, work)
        await self._cgroups.leave(token)

    async def _unmount(self, places: Iterable[Path]) -> None:
        def work() -> None:
            for place in places:
                unmount_stack(place)

        async with self.unmounting:
            await off_loop("an unmount", KERNEL_SECONDS, work)

    async def _abort(self, connections: Iterable[int]) -> None:
        for connection in connections:
            log.info("aborting FUSE connection", connection=connection)
            with contextlib.suppress(OSError):
                _fusectl.abort(self._layout.fusectl, connection)


async def wait_ready(
    place: Path,
    process: MountProcess,
    prober: Prober,
    plan: MountPlan,
    deadline: float,
    secrets: Iterable[Secret] = (),
) -> str:
    """See `Mounter.ready`. Reads the mount table first: a `stat` would not tell a mount from the directory below it."""
    end = time.monotonic() + deadline
    pause, longest = _POLL_SECONDS
    words = tuple(secrets)
    while True:
        if process.ended.is_set():
            raise _ended(plan, process, words)
        top = top_at(place)
        left = end - time.monotonic()
        if top is not None and top.is_fuse:
            answer = await prober.stat(place, max(left, 0.05))
            if answer.healthy and await _settled(place, top, process):
                return top.device
            if process.ended.is_set():
                raise _ended(plan, process, words)
            left = end - time.monotonic()
        if left <= 0:
            said = process.last_words(*words)
            raise DeadlineExceeded(
                f"The mount of {plan.place} was not ready within {deadline:g} s{_quoted(said)}.",
                hint="Check that the S3 server answers; raise mount-deadline if it is slow.",
            )
        await asyncio.sleep(pause)
        pause = min(pause * 1.25, longest)


async def _settled(place: Path, seen: MountEntry, process: MountProcess) -> bool:
    """A program that gives up right after it mounted is still in the table for a moment: look once more."""
    await asyncio.sleep(0)
    return not process.ended.is_set() and top_at(place) == seen


def _ended(plan: MountPlan, process: MountProcess, secrets: tuple[Secret, ...]) -> MountFailed:
    return MountFailed(
        f"The {plan.driver} process for {plan.place} ended at once{_quoted(process.last_words(*secrets))}.",
        hint="Check the bucket, the prefix and the credential with `mooring doctor`.",
    )


def _quoted(words: str) -> str:
    return f"; it said: {words}" if words else " and said nothing"
