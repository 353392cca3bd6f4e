"""One run of `mooring up`, from an unknown machine to an empty one: check, clean, start, job, serve, stop, look."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ..core.errors import InternalError, MooringError, MountError
from ..core.logs import configure, get_logger
from . import preflight
from .endpoints import Endpoints
from .job import JobResult, MainJob, disk_needed
from .ports import PortPlan
from .process import LOG_ROTATE_BYTES, require_main_thread
from .redis import find_redis_server, ping
from .residue import find
from .sessions import SessionRunner, find_busybox
from .stack import Part, Stack, StackOptions
from .state import MIN_FREE_BYTES, StateDirectory, check_free_space, disk_error
from .weed import find_program

log = get_logger(__name__)

DATASET_NAME = "mooring-job"


@dataclass(frozen=True, slots=True)
class Ready:
    """The stack runs. `warnings`: what it does without, in sentences."""

    endpoints: Endpoints
    parts: list[Part]
    summary: dict[str, Any]  # Any: JSON
    warnings: list[str]
    seconds: float


@dataclass(slots=True)
class Report:
    """Where a run tells what happens; the command line draws it."""

    say: Callable[[str], None] = lambda _: None
    ready: Callable[[Ready], None] = lambda _: None
    job: Callable[[JobResult], None] = lambda _: None
    job_failed: Callable[[MooringError], None] = lambda _: None


@dataclass(slots=True)
class Run:
    """`once`: end after the job. `exit_code` is what the process should end with when `run` returns."""

    state_path: Path | None
    ports: PortPlan
    options: StackOptions
    once: bool = False
    with_job: bool = True
    report: Report = field(default_factory=Report)
    exit_code: int = 0
    is_ready: bool = False
    result: JobResult | None = None
    summary: dict[str, Any] = field(default_factory=dict)  # Any: JSON
    timings: dict[str, float] = field(default_factory=dict)

    async def run(self) -> None:
        """Serves until cancelled, or until the job is done (`once`). Nothing is left when this returns or raises."""
        require_main_thread()
        begin = time.monotonic()
        state = StateDirectory.open(self.state_path)
        with state.lock(), _LogInto(state):
            try:
                await self._locked(state)
            finally:
                self.timings["total"] = round(time.monotonic() - begin, 2)

    async def _locked(self, state: StateDirectory) -> None:
        no_mounts = await self._preflight(state)
        options = StackOptions(
            self.options.s3, self.options.redis_url, self.options.database_url, mounts=no_mounts is None
        )
        stack = Stack(state, self.ports, options, timings=self.timings)
        try:
            begin = time.monotonic()
            endpoints = await stack.start(self.report.say)
            self.timings["start"] = round(time.monotonic() - begin, 2)
            self.summary = _summary(endpoints, stack.parts, self.options)
            self.is_ready = True
            warnings = [str(no_mounts)] if no_mounts else []
            self.report.ready(Ready(endpoints, stack.parts, self.summary, warnings, self.timings["start"]))
            await self._serve(state, stack, endpoints, no_mounts)
        except Exception as err:
            cause = _cause(err)
            if cause is None:
                log.exception("unexpected error")
                raise
            log.error(str(cause), detail=cause.detail)
            raise cause from err
        finally:
            await stack.stop(self.report.say)
        left = find(state)
        if self.result is not None:
            self.result.residue += left
            self.result.ok = self.result.ok and not left
        if left:
            log.error("something was left after the stop", residue=left)
            raise InternalError(f"The stop left something behind: {'; '.join(left[:5])}.")

    async def _preflight(self, state: StateDirectory) -> MountError | None:
        """Finds what cannot work before anything is started; returns why mounting does not, if the rest may run."""
        self.report.say("looking at this machine")
        leftovers = await Stack(state, self.ports, self.options).clean_leftovers()
        if leftovers:
            self.report.say(f"cleaned what an earlier stack left: {'; '.join(leftovers[:5])}")
        own, redis_url, database_url = self.options.s3, self.options.redis_url, self.options.database_url
        self.ports.check(redis=redis_url is None, s3=own is None)
        needed = MIN_FREE_BYTES + (disk_needed(own is None) if self.with_job else 0)
        check_free_space(state.path, needed, "the stack with its job" if self.with_job else "the stack")
        if own is None:
            find_program()
        if redis_url is None:
            find_redis_server()
        no_mounts: MountError | None = None
        try:
            await preflight.check_mounting(state.run_dir)
        except MountError as err:
            if self.once and self.with_job:
                raise  # the job is all that was asked for, and it cannot be whole
            no_mounts = err
        else:
            if self.with_job:
                find_busybox()
        if own is not None:
            await preflight.check_s3(own.endpoint, own.credential, own.bucket)
        if redis_url is not None:
            await ping(redis_url)
        if database_url is not None:
            await preflight.check_database(database_url.reveal())
        return no_mounts

    async def _serve(
        self, state: StateDirectory, stack: Stack, endpoints: Endpoints, no_mounts: MountError | None
    ) -> None:
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(stack.supervise(), name="watch the stack")
            if self.with_job:
                await self._job(state, stack, endpoints, no_mounts)
            if self.once:
                watch.cancel()

    async def _job(
        self, state: StateDirectory, stack: Stack, endpoints: Endpoints, no_mounts: MountError | None
    ) -> None:
        job = MainJob(
            state, endpoints, stack.dataset(DATASET_NAME), SessionRunner(state), self.report.say, no_mounts=no_mounts
        )
        try:
            self.result = await job.run()
        except MooringError as err:
            if self.once:
                raise
            # The stack stays up, so that one can look at what went wrong.
            self.exit_code = err.exit_code
            log.error(str(err), detail=err.detail)
            self.report.job_failed(err)
            return
        finally:
            await stack.reclaim_space()
        self.timings.update(self.result.timings)
        if no_mounts is not None:
            self.exit_code = no_mounts.exit_code
        self.report.job(self.result)


def _cause(err: BaseException) -> MooringError | None:
    """The first error of our own tree in a TaskGroup's bundle."""
    if isinstance(err, BaseExceptionGroup):
        return next((cause for item in err.exceptions if (cause := _cause(item)) is not None), None)
    return err if isinstance(err, MooringError) else None


def _summary(endpoints: Endpoints, parts: list[Part], options: StackOptions) -> dict[str, Any]:
    """What runs where, without a secret."""
    database = "sqlite"
    if options.database_url is not None:
        database = options.database_url.reveal().partition(":")[0]
    return {
        "state": str(endpoints.state),
        "database": database,
        "s3": {"url": endpoints.s3.url, "bucket": endpoints.s3.bucket, "embedded": endpoints.s3.embedded},
        "proxy": {
            "manager_url": endpoints.proxy.manager_url,
            "client_url": endpoints.proxy.client_url,
            "internal_url": endpoints.proxy.internal_url,
        },
        "manager": {"url": endpoints.manager.url},
        "agent": {"id": endpoints.agent.id, "socket": str(endpoints.agent.socket)},
        "volumes": endpoints.volumes,
        "processes": [
            {"name": part.name, "where": part.where, "pid": part.pid, "log": str(part.log_file or "")} for part in parts
        ],
    }


class _LogInto:
    """`mooring up` says little on the terminal; its own log is beside those of its children."""

    def __init__(self, state: StateDirectory) -> None:
        self._path = state.log_file("up")
        self._file: TextIO | None = None

    def __enter__(self) -> None:
        try:
            if self._path.exists() and self._path.stat().st_size > LOG_ROTATE_BYTES:
                self._path.replace(self._path.with_name("up.log.1"))
            self._path.touch(mode=0o600)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as err:
            raise disk_error(err, f"Log file {self._path}") from None
        configure(component="up", json=True, stream=self._file)

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.flush()
