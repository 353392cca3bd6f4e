"""Credentials that end: renewed in time, and a mount that S3 refuses is not left to show empty folders.

For every mount with sessions whose credential ends, a fresh grant is asked for in time: when a fifth of its life is
left, or five minutes, whichever is earlier, but not before 60 % of it are over; a little earlier still by chance, so
that mounts of one moment do not ask together. `Attachments.renew` puts a process with the new keys in front of the old
one. What fails is tried again, until the end and after it; a renewal that comes late revives the mount.

The end is a moment of the wall clock, pauses are taken by the monotonic one and are short, so that neither a clock that
jumps nor a machine that slept makes this late by more than `LOOK_SECONDS`.

A mount whose credential S3 refuses and for which there is no other is given up (`Attachments.lost`): s3fs 1.90 answers
403 by showing every file as empty and every name as there (measured), which looks like data. A dead mount says
ENOTCONN. It comes back with the next grant, or when S3 takes the credential again.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from storage_proxy.client import ManagerClient
from storage_proxy.client.manager import PlannedMount
from storage_proxy.core.errors import (
    AccessError,
    Conflict,
    InvalidRequest,
    MooringError,
    NotFound,
    S3AccessDenied,
    S3BadCredential,
    ServiceUnavailable,
    TokenExpired,
    Unauthenticated,
)
from storage_proxy.core.ids import MountKey, SessionID
from storage_proxy.core.logs import get_logger
from storage_proxy.core.secrets import read_secret
from storage_proxy.core.wire import MountState

from .attachments import Attachments
from .events import Event, EventKind
from .grants import GrantVerifier
from .journal import AttachmentRecord, MountRecord
from .mounter import Mounter

log = get_logger(__name__)

LOOK_SECONDS = 10.0
_PART_LEFT = 0.2
_MARGIN_SECONDS = 300.0
# Never with more than this left: whoever issues a credential gives no new one while the old one is young.
_LARGEST_PART = 0.4
_JITTER = 0.1
_PAUSES = (2.0, 60.0)  # after the first failure, and the longest
_REFUSED_PAUSE = 10.0  # the longest while a mount lives that may show empty files
_SECOND_LOOK_SECONDS = 1.0
_AT_ONCE = 4
_SESSIONS = 8  # how many sessions of a mount are tried in one attempt

GrantSource = Callable[[AttachmentRecord], Awaitable[PlannedMount]]


class ManagerGrants:
    """Fresh grants of a manager extension. The token file is read each time, so that it may be replaced."""

    def __init__(self, url: str, token_file: Path) -> None:
        self._url = url
        self._token_file = token_file

    async def __call__(self, item: AttachmentRecord) -> PlannedMount:
        """Raises what `ManagerClient.renew_grant` raises."""
        async with ManagerClient(self._url, read_secret(self._token_file)) as manager:
            return await manager.renew_grant(item.session, item.vfid.hex)


@dataclass(slots=True, eq=False)
class _Plan:
    """What is planned for the credential of one mount. `expires`, `due`: wall clock; `again`: monotonic."""

    expires: float | None
    due: float
    again: float = 0.0
    failures: int = 0
    error: str | None = None
    told: str | None = None  # our own text of trouble
    suspect: bool = False  # S3 may refuse it
    busy: bool = False


class Renewals:
    """Use `run` in a task. `source` is None where there is nobody to ask: then grants are only pushed (`push`)."""

    def __init__(
        self,
        attachments: Attachments,
        mounter: Mounter,
        verifier: GrantVerifier,
        source: GrantSource | None,
        *,
        wall: Callable[[], float] = time.time,
        look: float = LOOK_SECONDS,
    ) -> None:
        self._attachments = attachments
        self._mounter = mounter
        self._verifier = verifier
        self._source = source
        self._wall = wall
        self._look = look
        self._plans: dict[MountKey, _Plan] = {}
        self._wake = asyncio.Event()
        self._limit = asyncio.Semaphore(_AT_ONCE)
        attachments.listen(self._heard)

    async def run(self) -> None:
        """Until it is cancelled. A renewal that is under way then is finished by the attachments manager."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._wake.clear()
                for key, plan in self._due():
                    plan.busy = True
                    tasks.create_task(self._work(key, plan), name=f"renew {key}")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._pause()):
                        await self._wake.wait()

    async def push(self, session: SessionID, folder_hex: str, token: str) -> MountRecord:
        """Uses a grant that the holder of a session brings. Returns the mount as it is now.

        Raises as `Attachments.renew` does, and `InvalidRequest` for the grant of another session or folder.
        """
        grant = self._verifier.verify(token)
        if (grant.session, grant.vfid.hex) != (session, folder_hex):
            raise InvalidRequest(
                "The grant is for another session or another folder than the address says.",
                hint="Send it to /v1/attachments/SESSION/FOLDER/renew of its own session and folder.",
            )
        await self._attachments.renew(token)
        for record, items in self._attachments.mounts():
            if any((item.session, item.vfid) == (grant.session, grant.vfid) for item in items):
                self._plans.pop(record.key, None)
                self._wake.set()
                return record
        raise NotFound(f"Session {session} has folder {grant.vfid} not attached here.", hint="Attach it first.")

    def warnings(self, others: Sequence[str] = ()) -> list[str]:
        """`others`, and one sentence for each credential that could not be renewed yet, with the time left. What is
        among `others` as the trouble that was told here is not said twice.
        """
        told = {plan.told for plan in self._plans.values()}
        found = [text for text in others if text not in told]
        for record, _ in self._attachments.mounts():
            plan = self._plans.get(record.key)
            if plan is not None and plan.error is not None:
                when = "" if plan.expires is None else f", {_left(plan.expires - self._wall())},"
                found.append(
                    f"The credential of the mount of {record.plan.place}{when} was not renewed yet: {plan.error}"
                )
        return found

    # --- planning -----------------------------------------------------------------------------------------------------

    def _heard(self, event: Event) -> None:
        plan = None if event.key is None else self._plans.get(event.key)
        if plan is not None and event.kind is EventKind.TROUBLE and event.error not in (None, plan.told):
            plan.suspect, plan.again = True, 0.0
        self._wake.set()

    def _due(self) -> list[tuple[MountKey, _Plan]]:
        """What to work on now; brings the plans up to date first."""
        now, tick = self._wall(), time.monotonic()
        plans: dict[MountKey, _Plan] = {}
        due = []
        for record, items in self._attachments.mounts():
            if not items:
                continue
            plan = self._plans.get(record.key)
            if plan is None or plan.expires != record.credential_expires:
                plan = _plan_for(record.credential_expires, now)
            plans[record.key] = plan
            if record.state not in (MountState.LIVE, MountState.DEAD, MountState.FAILED):
                continue  # a start is under way
            if not plan.busy and tick >= plan.again and (now >= plan.due or plan.suspect):
                due.append((record.key, plan))
        self._plans = plans
        return due

    def _pause(self) -> float:
        now, tick = self._wall(), time.monotonic()
        waiting = [plan for plan in self._plans.values() if not plan.busy]
        pauses = [max(0.0 if plan.suspect else plan.due - now, plan.again - tick) for plan in waiting]
        return max(min([self._look, *pauses]), 0.02)

    # --- one credential -----------------------------------------------------------------------------------------------

    async def _work(self, key: MountKey, plan: _Plan) -> None:
        try:
            async with self._limit:
                await self._attempt(key, plan)
        except MooringError as err:
            self._failed(key, plan, err)
        except Exception as err:
            log.exception("a credential was not renewed", key=key)
            self._failed(key, plan, MooringError(f"{type(err).__name__} (see the log)."))
        finally:
            plan.busy = False
            self._wake.set()

    async def _attempt(self, key: MountKey, plan: _Plan) -> None:
        """Raises why the credential was not renewed."""
        record = self._record(key)
        if record is None:
            return
        over = plan.expires is not None and self._wall() >= plan.expires
        refusal = await self._refusal(record) if plan.suspect or over else None
        if plan.suspect and refusal is None:
            plan.suspect = False
            if record.state is MountState.FAILED:
                await self._attachments.repair(key)  # S3 takes it again
            if self._wall() < plan.due:
                plan.error, plan.failures = None, 0
                return
        try:
            await self._renew(key, record, refused=refusal is not None)
        except MooringError:
            if refusal is not None:
                await self._give_up(key, record, plan, refusal)
            raise
        plan.error, plan.failures, plan.suspect, plan.again = None, 0, False, 0.0

    async def _renew(self, key: MountKey, record: MountRecord, *, refused: bool) -> None:
        """Asks for a grant with one session after the other, and uses it. `refused`: any other key will do, else only
        one that lives longer.
        """
        if self._source is None:
            raise ServiceUnavailable(
                "This agent has no manager extension to ask for a fresh grant.",
                hint="Set [manager] url and token-file, or send it one: POST /v1/attachments/SESSION/FOLDER/renew.",
            )
        entry = self._attachments.entry(key)
        items = [] if entry is None else list(entry.attachments.values())
        reason: MooringError = Conflict("No session holds the mount any more.")
        for item in random.sample(items, min(len(items), _SESSIONS)):
            try:
                fresh = await self._source(item)
            except Unauthenticated:
                raise  # it is our token
            except (NotFound, Conflict, AccessError) as err:
                reason = err  # this session may have no more grants; another one may
                continue
            if not refused:
                self._check_fresh(fresh, record)
            await self._attachments.renew(fresh.grant)
            return
        raise reason

    def _check_fresh(self, fresh: PlannedMount, record: MountRecord) -> None:
        new, old = fresh.credential_expires_at, record.credential_expires
        if new is None or old is None:
            return
        if new.timestamp() <= self._wall():
            raise TokenExpired("The credential that the manager extension has for it has ended.", hint="Replace it.")
        if new.timestamp() < old + 0.5 and record.state is MountState.LIVE:
            raise Conflict(
                "The manager extension has no credential for it that lives longer.",
                hint="Whoever stored the credential of that folder must replace it.",
            )

    async def _refusal(self, record: MountRecord) -> MooringError | None:
        """Why S3 refuses the credential of a mount for good, asked twice; None if it does not, or does not answer."""
        error = None
        for pause in (0.0, _SECOND_LOOK_SECONDS):
            await asyncio.sleep(pause)
            error = await self._mounter.examine(record)
            if not isinstance(error, S3BadCredential | S3AccessDenied):
                return None
        return error

    async def _give_up(self, key: MountKey, record: MountRecord, plan: _Plan, refusal: MooringError) -> None:
        plan.suspect = True  # looked at again until S3 takes it
        current = self._record(key)
        if current is not None and current.token == record.token and current.state is MountState.LIVE:
            await self._attachments.lost(key, f"S3 refuses its credential, and there is no other: {refusal}")

    def _failed(self, key: MountKey, plan: _Plan, err: MooringError) -> None:
        plan.error = str(err)
        plan.failures += 1
        first, longest = _PAUSES
        pause = min(first * 2 ** min(plan.failures - 1, 10), longest) * random.uniform(0.7, 1.0)
        left = math.inf if plan.expires is None else plan.expires - self._wall()
        record = self._record(key)
        if left > 0:
            pause = min(pause, left + 0.05)  # the end itself is a moment to try and to look
        elif record is not None and record.state is MountState.LIVE:
            pause = min(pause, _REFUSED_PAUSE)
        plan.again = time.monotonic() + pause
        if record is None:
            return
        log.warning(
            "credential not renewed",
            key=key,
            place=record.plan.place,
            attempt=plan.failures,
            left_s=None if plan.expires is None else round(left, 1),
            again_in_s=round(pause, 1),
            error=str(err),
        )
        # Told when it begins and when the time is over; in between the watchdog may have more to say.
        what = "is refused" if plan.expires is None else "ends soon" if left > 0 else "has ended"
        if plan.told is None or (left <= 0 and " has ended: " not in plan.told):
            plan.told = f"The credential of the mount of {record.plan.place} {what}: {err}"
            self._attachments.trouble(key, plan.told)

    def _record(self, key: MountKey) -> MountRecord | None:
        entry = self._attachments.entry(key)
        return entry.record if entry is not None and entry.attachments else None


def _plan_for(expires: float | None, now: float) -> _Plan:
    """`expires` in seconds since the epoch; the life is counted from now, since nobody says when it began."""
    if expires is None:
        return _Plan(expires=None, due=math.inf)
    life = max(0.0, expires - now)
    margin = min(max(_PART_LEFT * life, _MARGIN_SECONDS), _LARGEST_PART * life)
    return _Plan(expires=expires, due=expires - margin * random.uniform(1.0, 1.0 + _JITTER))


def _left(seconds: float) -> str:
    """`ends in 5 min`, `ended 20 s ago`."""
    size = abs(seconds)
    text = f"{size:.0f} s" if size < 120 else f"{size / 60:.0f} min" if size < 7200 else f"{size / 3600:.0f} h"
    return f"which ends in {text}" if seconds > 0 else f"which ended {text} ago"
