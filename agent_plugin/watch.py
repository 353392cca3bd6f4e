"""The watchdog: does every mount process still serve, and can every used mount reach S3?

Each pass looks, without touching a mount, at the state of all processes (/proc) and at what waits for them (the FUSE
control file system). Asked (`Prober.filesystems`) are mounts that somebody waits for, and idle ones in rotation. Slow
is not hung: the question never goes to S3, and a process is given up only if, for the whole of `hang-deadline`, it

* answered none of several questions, though a question about another file system was answered each time, and
* did nothing: no thread ran, wanted to run or waited for a disk, and none woke up again and again, as threads do that
  wait for a server.

What does something but does not answer is told, and given up after `_PATIENCE` deadlines if S3 is well. A process that
was stopped (SIGSTOP) is given up when the next pass sees it stopped again.

Apart from that each mount with sessions gets a deep check once in a while: a name that nobody asked for before is
looked up through the mount, and its credential is tried on S3. What goes wrong there is told as trouble. The mount
stays: it works again by itself when S3 does.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import random
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage_proxy.core.errors import FileNotFound, MooringError
from storage_proxy.core.ids import MountKey
from storage_proxy.core.logs import get_logger
from storage_proxy.core.wire import MountState

from .attachments import Attachments
from .journal import MountRecord
from .kernel import fusectl
from .kernel.abandon import off_loop
from .kernel.processes import ProcessStat, ThreadStat, read_stat, read_threads
from .mounter import Mounter
from .probe import Answer, Prober
from .supervisor import ProcessID

log = get_logger(__name__)

_ANSWER_SECONDS = 1.0  # a mount that takes longer is told as unresponsive
_ROTATION_SECONDS = 30.0  # within which each idle mount is asked once
_BATCHES = 4  # children at most per pass, for mounts that somebody waits for
_BATCH = 50  # questions at most per child
# Pause before the same mount is asked by another child, and its threads are looked at again. Longer than the timers of
# S3 clients: libcurl wakes at least once a second.
_AGAIN_SECONDS = 1.5
_LOOKS = 3  # a thread at work woke up between each two of them
_QUESTIONS = 3  # children at most that wait for the same mount
_PATIENCE = 60  # hang deadlines that a process may be at work without an answer while S3 is well
_STATE_TURNS = 5  # the state of a process that nobody waits for is read in every fifth pass
_LOOK_SECONDS = 5.0
_CHECKS = 32  # deep checks at once
_DEEP_SECONDS = 10.0
_S3_TURNS = 4  # S3 itself is asked in every fourth check: a mount of a deleted bucket looks like one of an empty bucket
_AWAY_SECONDS = 30.0
_TROUBLE_SECONDS, _TROUBLE_RATE = 15.0, 10.0  # pause between checks of a mount in trouble; such checks per second


@dataclass(slots=True)
class _Watched:
    """One start of a mount process."""

    key: MountKey
    token: str
    process: ProcessID
    connection: int
    path: Path
    place: str
    asked: float  # when the last question was answered, or it was first seen
    due: float  # when the next deep check is
    checks: int  # deep checks so far, from a random number on
    waiting: bool = False  # somebody waits for an answer
    stopped: bool = False
    asking: bool = False  # a question is under way
    checking: bool = False  # a deep check is under way
    given_up: bool = False


class Watchdog:
    """Use `run` in a task; it ends when cancelled. `fusectl_root`: the agent's own view of the control file system."""

    def __init__(
        self,
        attachments: Attachments,
        mounter: Mounter,
        prober: Prober,
        fusectl_root: Path,
        *,
        interval: float,
        hang_deadline: float,
        s3_check_interval: float,
    ) -> None:
        self._attachments = attachments
        self._mounter = mounter
        self._prober = prober
        self._fusectl = fusectl_root
        self._interval = interval
        self._hang_deadline = hang_deadline
        self._answer_seconds = min(_ANSWER_SECONDS, hang_deadline / 2)
        self._check_interval = s3_check_interval
        self._checks = asyncio.Semaphore(_CHECKS)
        self.pass_seconds = 0.0  # that the last pass took
        self._turn = 0
        self._away: dict[str, float] = {}  # endpoints that did not answer, and when
        self._watched: dict[MountKey, _Watched] = {}
        self._tasks: asyncio.TaskGroup

    async def run(self) -> None:
        async with asyncio.TaskGroup() as self._tasks:
            while True:
                begun = time.monotonic()
                try:
                    await self._pass()
                except MooringError as err:
                    log.warning("the mounts could not be looked at", error=str(err))
                except Exception:
                    log.exception("the mounts could not be looked at")
                self.pass_seconds = time.monotonic() - begun
                await asyncio.sleep(max(self._interval / 10, begun + self._interval - time.monotonic()))

    # --- the pass -----------------------------------------------------------------------------------------------------

    async def _pass(self) -> None:
        watched = self._refresh()
        if not watched:
            return
        looks = await off_loop("a look at the mounts", _LOOK_SECONDS, lambda: self._look(watched))
        for item, (stat, waiting) in zip(watched, looks, strict=True):
            item.waiting = waiting > 0
            if stat is None or stat.started != item.process.started:
                continue  # whoever waits for its end will see
            self._judge_state(item, stat)
        now = time.monotonic()
        free = [item for item in watched if not (item.asking or item.stopped or item.given_up)]
        self._ask_all([item for item in free if item.waiting], _BATCHES)
        idle = [item for item in free if not item.waiting and now - item.asked >= _ROTATION_SECONDS]
        # No more than their share of one rotation, so that they stay spread.
        idle = sorted(idle, key=_last_asked)[: int(len(watched) * self._interval / _ROTATION_SECONDS) + 1]
        self._ask_all(idle, 1)
        for item in watched:
            if now >= item.due and not item.checking:
                item.checking = True
                self._begin(self._check(item), f"check {item.key}")

    def _refresh(self) -> list[_Watched]:
        """The living mounts; what is known of the same start is kept."""
        now = time.monotonic()
        found: dict[MountKey, _Watched] = {}
        for record, _ in self._attachments.mounts():
            if record.state not in (MountState.LIVE, MountState.DRAINING) or not record.process or not record.device:
                continue
            item = self._watched.get(record.key)
            if item is None or item.token != record.token:
                item = _Watched(
                    key=record.key,
                    token=record.token,
                    process=record.process,
                    connection=int(record.device.partition(":")[2]),
                    path=self._mounter.pooled(record),
                    place=record.plan.place,
                    asked=now - random.uniform(0.0, _ROTATION_SECONDS),  # so that the rotation is spread
                    due=now + random.uniform(0.0, self._check_interval),
                    checks=random.randrange(_S3_TURNS),
                )
            found[record.key] = item
        self._watched = found
        return list(found.values())

    def _look(self, watched: Sequence[_Watched]) -> list[tuple[ProcessStat | None, int]]:
        """State (None: gone, or not read this time) and waiting requests of each. Reads only /proc and the control
        file system.
        """
        self._turn = (self._turn + 1) % _STATE_TURNS
        found: list[tuple[ProcessStat | None, int]] = []
        seen = False
        for number, item in enumerate(watched):
            waiting = fusectl.waiting(self._fusectl, item.connection)
            seen = seen or waiting is not None
            # What nobody waits for may be stopped for some seconds: reading the state costs more than all the rest.
            wanted = waiting or item.waiting or item.stopped or number % _STATE_TURNS == self._turn
            found.append((read_stat(item.process.pid) if wanted else None, waiting or 0))
        if not seen:
            fusectl.ensure_mounted(self._fusectl)  # somebody may have unmounted it
        return found

    def _judge_state(self, item: _Watched, stat: ProcessStat) -> None:
        before, item.stopped = item.stopped, stat.stopped
        if item.given_up:
            return
        if stat.stopped and before:
            item.given_up = True
            reason = "The mount process was stopped by a signal and not continued."
            self._begin(self._give_up(item, reason), f"give up {item.key}")
        elif stat.stopped:
            self._tell(item, "was stopped by a signal")
        elif before and not item.asking:
            self._tell(item, None)

    # --- questions ----------------------------------------------------------------------------------------------------

    def _ask_all(self, items: Sequence[_Watched], batches: int) -> None:
        """Those that were not asked for the longest time first; what does not fit waits for the next pass."""
        chosen = sorted(items, key=_last_asked)[: batches * _BATCH]
        for number in range(min(batches, len(chosen))):
            group = chosen[number::batches]
            for item in group:
                item.asking = True
            self._begin(self._ask(group), "ask mounts")

    async def _ask(self, group: Sequence[_Watched]) -> None:
        """Asks one after the other. The first that does not answer in time is looked at closer; those behind it are
        free to be asked again.
        """
        futures: list[asyncio.Future[int]] = []
        late: _Watched | None = None
        try:
            futures = await self._prober.filesystems([item.path for item in group])
            for item, future in zip(group, futures, strict=True):
                await asyncio.wait([future], timeout=self._answer_seconds)
                if not future.done():
                    late = item
                    break
                item.asking = False
                await self._answered(item, future.result())
        except (ConnectionError, MooringError) as err:
            log.info("the mounts could not be asked", error=str(err))
        finally:
            for item in group:
                item.asking = item is late
            for item, future in zip(group, futures, strict=False):
                if item is not late:
                    future.cancel()
        if late is not None:
            try:
                await self._insist(late, futures[group.index(late)])
            finally:
                late.asking = False

    async def _answered(self, item: _Watched, number: int) -> None:
        item.asked = time.monotonic()
        if number in (errno.ENOTCONN, errno.ECONNABORTED) and self._is_current(item):
            # Its connection is cut. Usually the process ends by itself then, and whoever waits for that will see.
            await asyncio.sleep(self._interval)
            if item.process.runs:
                await self._give_up(item, f"The mount says: {Answer(number)}.")

    async def _insist(self, item: _Watched, first: asyncio.Future[int]) -> None:
        """One that did not answer in time: asked again by other children, until it answers or is given up."""
        questions = {first}
        begun = silent_since = time.monotonic() - self._answer_seconds
        looks: list[dict[int, ThreadStat]] = []
        try:
            while self._is_current(item) and not item.given_up:
                if not await self._others_answer():
                    log.info("the machine is too busy to judge a mount", key=item.key, place=item.place)
                    looks, silent_since = [], time.monotonic()
                elif not questions:  # the helper was killed with them
                    looks, silent_since = [], time.monotonic()
                elif not item.stopped:
                    self._tell(item, "does not answer")
                number = await _first_answer(questions, 0.0)
                now = time.monotonic()
                if number is None and questions and now - silent_since >= self._hang_deadline and len(looks) >= _LOOKS:
                    if not item.process.runs:
                        return  # it has ended; whoever waits for it will see
                    if not _worked(looks):
                        reason = f"The mount process did not answer for {now - begun:.0f} s and did nothing."
                        await self._give_up(item, reason)
                        return
                    log.info("a mount process is at work but does not answer", key=item.key, place=item.place)
                    silent_since = now
                    if await self._is_stuck(item, now - begun):
                        await self._give_up(item, f"The mount process did not answer for {now - begun:.0f} s.")
                        return
                threads = await off_loop("a look at a process", _LOOK_SECONDS, lambda: read_threads(item.process.pid))
                looks = [*looks[1 - _LOOKS :], threads]
                if len(questions) < _QUESTIONS:
                    questions.update(await self._another(item))
                if number is None:
                    number = await _first_answer(questions, _AGAIN_SECONDS)
                if number is not None:
                    log.info("a mount process answers again", key=item.key, seconds=round(time.monotonic() - begun, 1))
                    self._tell(item, None)
                    await self._answered(item, number)
                    return
        finally:
            for question in questions:
                question.cancel()

    async def _another(self, item: _Watched) -> list[asyncio.Future[int]]:
        try:
            return await self._prober.filesystems([item.path])
        except (ConnectionError, MooringError):
            return []

    async def _others_answer(self) -> bool:
        """False if a file system without a process behind it is not answered for in time either: then the machine is
        busy and the silence of a mount says nothing.
        """
        return (await self._prober.stat(self._fusectl.parent, self._answer_seconds)).healthy

    async def _is_stuck(self, item: _Watched, seconds: float) -> bool:
        """At work for very long without an answer, and S3 is not the reason."""
        record = self._record(item)
        if seconds < _PATIENCE * self._hang_deadline or record is None:
            return False
        return await self._mounter.examine(record) is None

    async def _give_up(self, item: _Watched, reason: str) -> None:
        item.given_up = True
        if self._is_current(item):
            await self._attachments.lost(item.key, reason)

    def _tell(self, item: _Watched, what: str | None) -> None:
        if not self._is_current(item):
            return
        text = None if what is None else f"The mount process of {item.place} (pid {item.process.pid}) {what}."
        if text is not None:
            entry = self._attachments.entry(item.key)
            if entry is None or entry.unresponsive == text:
                return
            log.warning(
                "a mount process does not serve", key=item.key, place=item.place, pid=item.process.pid, why=what
            )
        self._attachments.unresponsive(item.key, text)

    # --- S3 -----------------------------------------------------------------------------------------------------------

    async def _check(self, item: _Watched) -> None:
        """One deep check, if somebody uses the mount; sets when the next one is due."""
        entry = self._attachments.entry(item.key)
        trouble = entry.trouble if entry is not None else None
        try:
            if entry is not None and entry.attachments:
                async with self._checks:
                    trouble = await self._trouble(item, trouble)
                if self._is_current(item):
                    self._attachments.trouble(item.key, trouble)
        finally:
            item.checking = False
            seconds = self._check_interval
            if trouble is not None:  # it shall end soon after its cause, but not at the cost of hundreds of requests
                seconds = min(seconds, max(_TROUBLE_SECONDS, len(self._watched) / _TROUBLE_RATE))
            item.due = time.monotonic() + seconds * random.uniform(0.9, 1.1)

    async def _trouble(self, item: _Watched, known: str | None) -> str | None:
        """Through the mount, which is cheap; and S3 itself if that did not go well, or would keep a caller waiting."""
        record = self._record(item)
        if record is None:
            return None
        endpoint = record.plan.location.endpoint
        away = time.monotonic() - self._away.get(endpoint, -_AWAY_SECONDS) < _AWAY_SECONDS
        item.checks += 1
        if not (known or away or item.checks % _S3_TURNS == 0):
            answer = await self._prober.fresh_name(item.path, _DEEP_SECONDS)
            if _is_well(answer):
                return None
        error = await self._mounter.examine(record)
        if error is not None and error.temporary:
            self._away[endpoint] = time.monotonic()
            await asyncio.sleep(random.uniform(0.5, 1.5))
            error = await self._mounter.examine(record)
        # An empty folder has no keys, so S3 cannot tell it from none; the mount does not mind.
        if error is not None and not isinstance(error, FileNotFound):
            return f"{item.place}: {error}"
        self._away.pop(endpoint, None)
        answer = await self._prober.fresh_name(item.path, _DEEP_SECONDS)
        if _is_well(answer) or not self._is_current(item):
            return None
        said = "that a name is there which cannot be" if answer.number == 0 else str(answer)
        return f"{item.place}: S3 accepts the credential, but the mount says: {said}."

    # --- plumbing -----------------------------------------------------------------------------------------------------

    def _record(self, item: _Watched) -> MountRecord | None:
        """What the manager knows of this start; None when there is another one or none."""
        entry = self._attachments.entry(item.key)
        record = None if entry is None else entry.record
        return record if record is not None and record.token == item.token else None

    def _is_current(self, item: _Watched) -> bool:
        record = self._record(item)
        return record is not None and record.state in (MountState.LIVE, MountState.DRAINING)

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        async def run() -> None:
            try:
                await work
            except MooringError as err:
                log.warning("a look at a mount failed", task=name, error=str(err))
            except Exception:
                log.exception("a look at a mount failed", task=name)

        self._tasks.create_task(run(), name=name)


def _is_well(answer: Answer) -> bool:
    """A name that nobody has made is not there. To s3fs 1.90 every name is there when S3 refuses its key."""
    return answer.number == errno.ENOENT


def _last_asked(item: _Watched) -> float:
    return item.asked


async def _first_answer(questions: set[asyncio.Future[int]], seconds: float) -> int | None:
    """The errno of the first question that is answered within that time. Takes those out that can never be."""
    if not questions:
        await asyncio.sleep(seconds)
        return None
    done, _ = await asyncio.wait(questions, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    questions -= done
    return next((each.result() for each in done if not each.cancelled() and each.exception() is None), None)


def _worked(looks: Sequence[dict[int, ThreadStat]]) -> bool:
    """True if some thread did something all the time. One that wakes up once, takes a request and then waits for a
    lock for ever, did not.
    """
    if any(thread.at_work for look in looks for thread in look.values()):
        return True
    first = looks[0]
    return any(
        all(
            tid in later and later[tid].switches > earlier[tid].switches
            for earlier, later in itertools.pairwise(looks)
            if tid in earlier
        )
        for tid in first
    )
