"""`Inspector`: everything that is known of one mount, from the journal's records, the mount tables and /proc.

Nothing here touches a mount point: a mount that hangs can be looked at like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from storage_proxy.client.mounts import AttachmentView, FormerStart, HolderView, MountUsage, MountView
from storage_proxy.core.errors import InvalidIdentifier, MooringError, NotFound
from storage_proxy.core.ids import MountKey
from storage_proxy.core.logs import get_logger

from .attachments import NODE, Attachments
from .journal import AttachmentRecord, MountRecord
from .kernel import MountEntry, entries_at, read_mountinfo
from .kernel.abandon import off_loop
from .kernel.namespaces import Holder, holders
from .keys import Entry
from .layout import Layout
from .resources import Usage
from .supervisor import last_words

log = get_logger(__name__)

_LOOK_SECONDS = 5.0
_HEX = frozenset("0123456789abcdef")
_SHORTEST = 6


class Inspector:
    """`usage`: the last measurement of the process that serves a key."""

    def __init__(self, attachments: Attachments, layout: Layout, usage: Callable[[MountKey], Usage | None]) -> None:
        self._attachments = attachments
        self._layout = layout
        self._usage = usage

    def find(self, text: str) -> MountKey:
        """The mount whose key begins with these 6 or more hex digits. Raises `InvalidIdentifier`, also when several do,
        and `NotFound`."""
        digits = text.lower()
        if not _SHORTEST <= len(digits) <= 32 or not _HEX.issuperset(digits):
            raise InvalidIdentifier(
                f"{text[:40]!r} is not the key of a mount.",
                hint=f"Give its first {_SHORTEST} or more hex digits; `mooring mounts ls` shows them.",
            )
        found = [record.key for record, _ in self._attachments.mounts() if record.key.startswith(digits)]
        if not found:
            raise NotFound(f"This node has no mount {digits}.", hint="See `mooring mounts ls`.")
        if len(found) > 1:
            raise InvalidIdentifier(f"The keys of {len(found)} mounts begin with {digits}.", hint="Give more digits.")
        return found[0]

    async def look(self, key: MountKey) -> MountView:
        """Raises `NotFound`. Reads the mount tables of all containers: some ten milliseconds on a busy host."""
        entry = self._attachments.entry(key)
        if entry is None or entry.record is None:
            raise NotFound(f"This node has no mount {key}.", hint="See `mooring mounts ls`.")
        record, items = entry.record, list(entry.attachments.values())
        output = self._layout.log(record.token)

        def work() -> tuple[list[MountEntry], str]:
            return read_mountinfo(), last_words(output)

        table, said = await off_loop("a look at a mount", _LOOK_SECONDS, work)
        return self._view(entry, record, items, table, said, await self._holders(record, items, table))

    async def _holders(
        self, record: MountRecord, items: Sequence[AttachmentRecord], table: Sequence[MountEntry]
    ) -> list[HolderView] | None:
        """Namespaces with this mount or one that came before it. None if that takes too long."""
        places = {str(self._layout.bind(item.session, item.vfid)) for item in items}
        devices = {entry.device for entry in table if entry.is_fuse and entry.mount_point in places}
        if record.device is not None:
            devices.add(record.device)

        def work() -> list[HolderView]:
            return [_holder(found, record.device) for found in holders(devices)]

        try:
            return await off_loop("a look at the containers", _LOOK_SECONDS, work)
        except MooringError as err:
            log.info("who holds a mount could not be found out", key=record.key, error=str(err))
            return None

    def _view(
        self,
        entry: Entry,
        record: MountRecord,
        items: Sequence[AttachmentRecord],
        table: Sequence[MountEntry],
        said: str,
        held: list[HolderView] | None,
    ) -> MountView:
        plan, location, pooled = record.plan, record.plan.location, self._layout.pooled(record.key)
        return MountView(
            key=record.key,
            state=record.state,
            since=_time(record.since),
            volume=plan.volume,
            endpoint=location.endpoint,
            region=location.region,
            path_style=location.path_style,
            bucket=location.bucket,
            prefix=location.prefix,
            mode=plan.mode,
            driver=plan.driver,
            ownership=plan.ownership,
            credential_id=plan.credential_id,
            credential_expires_at=None if record.credential_expires is None else _time(record.credential_expires),
            pid=entry.process.pid if entry.process is not None else None,
            token=record.token,
            device=record.device,
            path=str(pooled),
            layers=len(entries_at(pooled, table)),
            last_error=record.last_error,
            trouble=entry.trouble,
            unresponsive=entry.unresponsive,
            repairs=record.repairs,
            failures=entry.failures,
            repairing=entry.repair is not None and not entry.repair.done(),
            refuses=bool({NODE, record.key} & self._attachments.drains),
            attachments=[self._attachment(item, table) for item in items],
            holders=held,
            usage=_usage(self._usage(record.key)),
            former=[
                FormerStart(token=token, pid=None if process is None or process.ended.is_set() else process.pid)
                for token, process in entry.retired.items()
            ],
            last_words=said,
            log=str(self._layout.log(record.token)),
        )

    def _attachment(self, item: AttachmentRecord, table: Sequence[MountEntry]) -> AttachmentView:
        source = self._layout.bind(item.session, item.vfid)
        return AttachmentView(
            session_id=item.session,
            vfid=str(item.vfid),
            target=item.target,
            state=item.state.value,
            since=_time(item.since),
            source=str(source),
            layers=len(entries_at(source, table)),
            held_at=None if item.held is None else _time(item.held),
        )


def _holder(found: Holder, device: str | None) -> HolderView:
    try:
        command = Path(f"/proc/{found.pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        command = ""
    return HolderView(
        namespace=found.namespace,
        pid=found.pid,
        command=command,
        paths=sorted({entry.mount_point for entry in found.entries}),
        current=any(entry.device == device for entry in found.seen()),
    )


def _usage(usage: Usage | None) -> MountUsage | None:
    if usage is None:
        return None
    return MountUsage(
        measured_at=_time(usage.at),
        rss=usage.rss,
        pss=usage.pss,
        fds=usage.fds,
        threads=usage.threads,
        cpu_seconds=usage.cpu_seconds,
        read=usage.read,
        written=usage.written,
    )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
