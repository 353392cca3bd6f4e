"""Container volumes: what engines (Docker, Podman) made, mounted and still hold.

A volume is a name with options. While an engine refers to it, it is an attachment like any other, of a session named
after it, so that crashes are repaired and mounts are shared by the same rules. Engines differ in how they count: Docker
mounts once per container with a new id each time, Podman once for all its containers with one id for ever. So
references are a set, both calls may be repeated, and an id that was never seen is unmounted with success.

An engine does not mount again what it believes to be mounted. So references outlive the agent, an attachment that is
missing after a restart is made anew, and it is the engine's word that ends one, not how many containers are seen. Only
if somebody detaches the session of a volume by hand, its references go with it.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from storage_proxy.core.errors import (
    AlreadyExists,
    Conflict,
    DeadlineExceeded,
    InUse,
    InvalidIdentifier,
    MooringError,
    RecordNotFound,
)
from storage_proxy.core.ids import MountKey, QuotaScopeID, ScopeType, SessionID, VFolderID, parse_session_id
from storage_proxy.core.logs import get_logger

from ..attachments import Attachments
from ..config import VolumePluginSection
from ..drivers import Drivers, MountPlan
from ..journal import AttachmentRecord, AttachmentState
from ..kernel.abandon import off_loop
from ..mounter import KERNEL_SECONDS
from ..orders import Order
from .binds import Binds
from .volume_book import VolumeBook, VolumeRecord
from .volume_options import VolumeOptions, VolumePlace

log = get_logger(__name__)

T = TypeVar("T")

# What Docker and Podman themselves allow, and short enough for a file name.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_REFERENCE = re.compile(r"[\x21-\x7e]{1,256}")
_SCOPE = QuotaScopeID(ScopeType.PROJECT, uuid.uuid5(uuid.NAMESPACE_URL, "mooring:container-volumes"))
_TARGET = "/volume"  # where a container has it, only its engine knows
_ORDER_SECONDS = 60.0
_FIRST_PAUSE = 1.0


@dataclass(frozen=True, slots=True)
class VolumeView:
    """A volume to show. `mountpoint` is None while it is not mounted; `status` holds plain values, no secrets."""

    name: str
    created: float
    mountpoint: Path | None
    status: Mapping[str, object] = field(default_factory=dict)


class Volumes:
    """Use as an async context manager, inside that of the attachments. `interval`: seconds between two comparisons of
    references and attachments."""

    def __init__(
        self,
        config: VolumePluginSection,
        book: VolumeBook,
        attachments: Attachments,
        binds: Binds,
        drivers: Drivers,
        *,
        interval: float,
    ) -> None:
        self._config = config
        self._book = book
        self._attachments = attachments
        self._binds = binds
        self._drivers = drivers
        self._interval = interval
        self._locks: dict[str, asyncio.Lock] = {}
        self._calls: Counter[str] = Counter()  # Mount calls under way: each is a reference until it is answered
        self._attaching: dict[str, asyncio.Task[Path]] = {}
        self._established: set[str] = set()  # referred to and seen attached since this agent started
        self._trouble: dict[str, str] = {}
        self._key_from: dict[MountKey, float] = {}  # when the credential of a mount was read, seconds since the epoch
        self._running: set[asyncio.Task[Any]] = set()  # Any: what a task returns is its caller's affair

    async def __aenter__(self) -> Self:
        self._background(self._watch(), "volumes")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends the background tasks; what is mounted stays, and the book knows it."""
        while running := list(self._running):
            for task in running:
                task.cancel()
            await asyncio.wait(running)

    # --- what is there ------------------------------------------------------------------------------------------------

    def holds(self, session: SessionID, vfid: VFolderID) -> bool:
        """True if an engine believes to have this attachment mounted: it must not be released for want of holders."""
        if vfid.scope != _SCOPE:
            return False
        return any(
            session == _session(record.name) and not self._unused(record.name)
            for record in self._book.all()
            if _folder(record.name) == vfid
        )

    def get(self, name: str) -> VolumeView:
        """Raises `RecordNotFound`."""
        return self._view(self._record(name))

    def all(self) -> list[VolumeView]:
        return [self._view(record) for record in self._book.all()]

    def _view(self, record: VolumeRecord) -> VolumeView:
        status: dict[str, object] = {"references": len(record.references)}
        source = None
        if (attached := self._attachment(record.name)) is not None:
            item, plan = attached
            source = Path(self._attachments.spec(item, plan).source)
            mount = next((mount for mount, _ in self._attachments.mounts() if mount.key == item.key), None)
            if mount is not None:
                status |= {"state": mount.state.value, "mount_key": mount.key, "error": mount.last_error}
        try:
            place = self._place(record)
            status |= {
                "place": place.plan.place,
                "volume": place.plan.volume,
                "mode": place.plan.mode.value,
                "credential": place.credential_name,
            }
        except MooringError as err:
            status["error"] = str(err)
        if record.name in self._trouble:
            status["error"] = self._trouble[record.name]
        status = {name: value for name, value in status.items() if value is not None}
        return VolumeView(record.name, record.created, source, status)

    def warnings(self) -> list[str]:
        """What an operator should look at."""
        return [f"Volume {name}: {text}" for name, text in sorted(self._trouble.items())]

    def _record(self, name: str) -> VolumeRecord:
        record = self._book.get(name)
        if record is None:
            raise RecordNotFound(
                f"There is no volume {name[:128]!a} here.", hint="Create it first: volume create --driver NAME."
            )
        return record

    def _place(self, record: VolumeRecord) -> VolumePlace:
        return VolumePlace.of(record.options, self._config, self._drivers.default)

    def _attachment(self, name: str) -> tuple[AttachmentRecord, MountPlan] | None:
        session, vfid = _session(name), _folder(name)
        for item, plan in self._attachments.attachments():
            if item.session == session and item.vfid == vfid and item.state is AttachmentState.BOUND:
                return item, plan
        return None

    # --- create and remove --------------------------------------------------------------------------------------------

    async def create(self, name: str, options: Mapping[str, str]) -> None:
        """Checks everything that does not need the S3 server, and remembers it. Idempotent for the same options.

        Raises `InvalidIdentifier`, `AlreadyExists`, and what `VolumeOptions.parse`, `VolumePlace.of`, reading the
        credential file and the driver can raise.
        """
        if not _NAME.fullmatch(name):
            raise InvalidIdentifier(
                f"{name[:40]!a} is not a name for a volume.",
                hint="Use 1 to 128 letters, digits, '.', '_' or '-', the first a letter or digit.",
            )
        record = VolumeRecord(name=name, options=VolumeOptions.parse(options), created=round(time.time(), 3))
        place = self._place(record)
        driver = self._drivers.get(place.plan.driver)

        def check() -> None:
            driver.check()
            driver.accept(place.plan, place.read_credential())

        await off_loop("a look at the credential", self._config.answer_within, check)
        async with self._lock(name):
            old = self._book.get(name)
            if old is None:
                await self._book.put(record)
                log.info("volume created", volume=name, place=place.plan.place, mode=place.plan.mode)
            elif old.options != record.options:
                raise AlreadyExists(f"There is a volume {name} with other options.", hint="Remove it first.")

    async def remove(self, name: str) -> None:
        """Forgets a volume; its data stay in S3. Raises `RecordNotFound`, or `InUse` while an engine refers to it."""
        async with self._lock(name):
            record = self._record(name)
            if not self._unused(name):
                raise InUse(
                    f"Volume {name} is mounted ({max(len(record.references), 1)} reference(s)).",
                    hint="Remove its containers first.",
                )
            await self._detach(name)
            await self._book.remove(name)
            log.info("volume removed", volume=name)
        self._trouble.pop(name, None)

    # --- mount and unmount --------------------------------------------------------------------------------------------

    async def mount(self, name: str, reference: str) -> Path:
        """Attaches the volume if it is not, remembers the reference, and returns what the container is to bind.

        Idempotent. Raises `RecordNotFound`, `DeadlineExceeded` after `answer-within`, `Conflict`, and everything that
        mounting can raise; then no reference is left that was not there before.
        """
        if not _REFERENCE.fullmatch(reference):
            raise InvalidIdentifier("The id of a mount has 1 to 256 printable ASCII characters.", hint="Send another.")
        record = self._record(name)
        self._calls[name] += 1
        try:
            async with asyncio.timeout(self._config.answer_within):
                async with self._lock(name):
                    task = self._attaching.get(name) or self._attach_task(record)
                place = await asyncio.shield(task)
                async with self._lock(name):
                    await self._book.refer(name, reference)
                    self._established.add(name)
            self._trouble.pop(name, None)
        except TimeoutError:
            raise DeadlineExceeded(
                f"Volume {name} was not mounted within {self._config.answer_within:g} s.",
                hint="Check that its S3 server answers, then start the container again.",
            ) from None
        finally:
            self._calls[name] -= 1
            if not self._calls[name]:
                del self._calls[name]
            if self._unused(name):
                self._background(self._settle(name), f"settle {name}")
        return place

    async def unmount(self, name: str, reference: str) -> None:
        """Forgets the reference; after the last one the volume is detached, and its mount has its grace period.

        Idempotent, also for what is not known. Raises only if the book cannot be written.
        """
        if self._book.get(name) is None:
            return
        try:
            async with asyncio.timeout(self._config.answer_within), self._lock(name):
                await self._book.forget(name, reference)
                if self._unused(name):
                    await self._detach(name)
        except TimeoutError:
            log.info("a volume takes long to be detached", volume=name)
            self._background(self._settle(name), f"settle {name}")

    def _attach_task(self, record: VolumeRecord) -> asyncio.Task[Path]:
        """One for all calls that come while it runs, and going on when they have given up."""
        task = self._background(self._attach(record), f"attach volume {record.name}")
        self._attaching[record.name] = task

        def ended(_: asyncio.Task[Path]) -> None:
            self._attaching.pop(record.name, None)

        task.add_done_callback(ended)
        return task

    async def _attach(self, record: VolumeRecord) -> Path:
        order = self._order(record, self._place(record))
        begun = time.time()
        try:
            spec = await self._attachments.attach_order(order)
        except AlreadyExists:
            raise Conflict(
                f"Volume {record.name} is mounted with other settings than the configuration has now.",
                hint="Stop all its containers, then start them again.",
            ) from None
        self._key_from.setdefault(order.plan.key, begun)
        source = Path(spec.source)
        await off_loop("a look at a session bind", KERNEL_SECONDS, lambda: self._binds.check(source))
        return source

    def _order(self, record: VolumeRecord, place: VolumePlace) -> Order:
        return Order(
            order_id=f"volume-{uuid.uuid4().hex}",
            session=_session(record.name),
            vfid=_folder(record.name),
            target=_TARGET,
            plan=place.plan,
            expires=time.time() + _ORDER_SECONDS,
            credential=place.read_credential,
        )

    async def _detach(self, name: str) -> None:
        """Under the lock of the name. What cannot be detached now is tried again by `_watch`."""
        self._established.discard(name)
        try:
            await self._attachments.detach(_session(name), _folder(name).hex)
        except MooringError as err:
            log.error("a volume could not be detached", volume=name, error=str(err))

    async def _settle(self, name: str) -> None:
        """After a call that left nothing: what it may have attached meanwhile goes."""
        if task := self._attaching.get(name):
            await asyncio.wait([task])
        async with self._lock(name):
            if self._unused(name) and name not in self._attaching:
                await self._detach(name)

    def _unused(self, name: str) -> bool:
        record = self._book.get(name)
        return not self._calls[name] and (record is None or not record.references)

    # --- references and attachments agree -----------------------------------------------------------------------------

    async def _watch(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            try:
                agreed = await self._agree()
            except Exception:  # a bug here must not end it
                log.exception("volumes could not be compared with their references")
                agreed = False
            pause = self._interval if agreed else min(pause * 2, self._interval)
            await asyncio.sleep(pause)

    async def _agree(self) -> bool:
        """Compares every volume once; False if something could not be put right."""
        agreed = True
        for record in self._book.all():
            try:
                await self._agree_on(record.name)
                self._trouble.pop(record.name, None)
            except MooringError as err:
                agreed = False
                if record.name not in self._trouble:
                    log.warning("a volume in use is not as it should be", volume=record.name, error=str(err))
                self._trouble[record.name] = str(err)
        mounted = {mount.key for mount, _ in self._attachments.mounts()}
        self._key_from = {key: since for key, since in self._key_from.items() if key in mounted}
        return agreed

    async def _agree_on(self, name: str) -> None:
        async with self._lock(name):
            record = self._book.get(name)
            if record is None or self._calls[name] or name in self._attaching:
                return
            attached = self._attachment(name)
            if not record.references:
                if attached is not None:
                    await self._detach(name)
                return
            task = None
            if attached is not None:
                self._established.add(name)
            elif name in self._established:
                self._established.discard(name)
                await self._book.forget_all(name)
                log.info("a volume was detached by somebody else: no engine holds it any more", volume=name)
                return
            else:
                task = self._attach_task(record)
        if task is not None:
            await asyncio.shield(task)
        elif attached is not None:
            await self._use_fresh_key(record, attached[0])

    async def _use_fresh_key(self, record: VolumeRecord, item: AttachmentRecord) -> None:
        """An operator who replaced the credential file need not stop containers: their mount gets the new one."""
        place = self._place(record)
        if place.plan.key != item.key:
            return  # the configuration says something else by now; it counts from the next mount on
        try:
            changed = place.credential_file.stat().st_ctime
        except OSError:
            return  # the mount has what it needs; the next one will complain
        if changed <= self._key_from.get(item.key, item.since):
            return
        begun = time.time()
        await self._attachments.renew_order(self._order(record, place))
        self._key_from[item.key] = begun
        log.info("a volume uses its new credential", volume=record.name, credential=place.credential_name)

    # --- plumbing -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _lock(self, name: str) -> AsyncIterator[None]:
        async with self._locks.setdefault(name, asyncio.Lock()):
            yield

    def _background(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Its error is for whoever waits for it; one that is not of our tree is logged as well."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._running.add(task)

        def ended(_: asyncio.Task[T]) -> None:
            self._running.discard(task)
            error = None if task.cancelled() else task.exception()
            if error is not None and not isinstance(error, MooringError):
                log.error("background task failed", task=name, exc_info=error)

        task.add_done_callback(ended)
        return task


def _session(name: str) -> SessionID:
    """The session of a volume: readable, and never the same for two names."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", name)[:40].strip("-")
    return parse_session_id(f"vol-{readable}-{hashlib.sha256(name.encode()).hexdigest()[:12]}")


def _folder(name: str) -> VFolderID:
    return VFolderID(_SCOPE, uuid.uuid5(_SCOPE.id, name))
