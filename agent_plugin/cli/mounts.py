"""`mooring mounts`: what is mounted on this node, what becomes of it, and what can be done about it."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated

import typer

from storage_proxy.core.errors import DeadlineExceeded, UsageError

from .output import JsonOption, SocketOption, StateOption, connect, count, remark, show, show_json, since, table

if TYPE_CHECKING:
    from storage_proxy.client.agent import AgentClient, MountInfo
    from storage_proxy.client.mounts import DrainStatus, MountUsage, MountView
    from storage_proxy.client.storages import MountEvent

_STEP_SECONDS = 2.0  # between two words on the progress of a drain

KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="Key of the mount, or its first 6 or more digits.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", "-n", help="Only show what would be done.")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Look at the mounts of this node, repair and drain them.", no_args_is_help=True)
    group.command("ls")(list_mounts)
    group.command("show")(show_mount)
    group.command("repair")(repair)
    group.command("drain")(drain)
    group.command("gc")(collect)
    group.command("events")(events)
    app.add_typer(group, name="mounts")


# --- looking ----------------------------------------------------------------------------------------------------------


async def list_mounts(as_json: JsonOption = False, socket: SocketOption = None, state: StateOption = None) -> None:
    """List the mounts: state, place, mode, how many sessions hold them, and what is wrong with them."""
    async with connect(socket, state) as client:
        mounts = await client.mounts()
    if as_json:
        show_json([mount.model_dump(mode="json") for mount in mounts])
        return
    if not mounts:
        show("No mounts.")
        return
    rows = [
        (
            item.key[:12],
            item.state.value,
            since(item.since) if item.since else "-",
            item.mode.value,
            item.driver,
            str(item.pid or "-"),
            str(len(item.sessions)),
            f"s3://{item.bucket}/{item.prefix}",
        )
        for item in mounts
    ]
    table([("KEY", "STATE", "SINCE", "MODE", "DRIVER", "PID", "SESSIONS", "PLACE"), *rows])
    for item in mounts:
        for problem in _problems(item):
            show(f"{item.key[:12]}: {problem}")


def _problems(item: MountInfo | MountView) -> list[str]:
    return [text for text in (item.last_error, item.unresponsive, item.trouble) if text]


async def show_mount(
    key: KeyArgument, as_json: JsonOption = False, socket: SocketOption = None, state: StateOption = None
) -> None:
    """Show everything about one mount: sessions, containers, process, repairs, and what its driver said last."""
    async with connect(socket, state) as client:
        found = await client.mount(key)
    if as_json:
        show_json(found.model_dump(mode="json"))
        return
    owner = f"{found.ownership.uid}:{found.ownership.gid}, umask {found.ownership.umask:04o}"
    expires = f", ends {found.credential_expires_at:%F %T}" if found.credential_expires_at else ""
    table(
        [
            ("mount", found.key),
            ("place", f"{found.place} at {found.endpoint} (volume {found.volume})"),
            (
                "state",
                f"{found.state.value}, for {since(found.since)}" + (", being repaired" if found.repairing else ""),
            ),
            *(("problem", text) for text in _problems(found)),
            *([("drained", "takes no new attachments")] if found.refuses else []),
            ("access", f"{found.mode.value}, owner {owner}"),
            ("credential", f"{found.credential_id}{expires}"),
            ("process", _process(found)),
            *([("cost", _cost(found.usage))] if found.usage else []),
            ("repairs", str(found.repairs) + (f", {found.failures} failed attempts" if found.failures else "")),
            *(
                [("former", ", ".join(f"{f.token[:8]} (pid {f.pid or '-'})" for f in found.former))]
                if found.former
                else []
            ),
            ("path", f"{found.path} ({count(found.layers, 'layer')})"),
            *([("it said", found.last_words)] if found.last_words else []),
        ]
    )
    show("")
    if found.attachments:
        rows = [
            (item.session_id, item.target, item.state, since(item.since), str(item.layers), item.source)
            for item in found.attachments
        ]
        table([("SESSION", "TARGET", "STATE", "SINCE", "LAYERS", "SOURCE"), *rows])
    else:
        show("No session holds it.")
    show("")
    if found.holders is None:
        show("Which containers hold it could not be found out in time.")
    elif found.holders:
        holders = [
            (str(h.pid), h.command, "yes" if h.current else "no: end it", " ".join(h.paths)) for h in found.holders
        ]
        table([("PID", "CONTAINER PROCESS", "SEES IT", "PATHS"), *holders])
    else:
        show("No container holds it.")


def _process(found: MountView) -> str:
    text = f"{found.driver}, pid {found.pid}" if found.pid else f"{found.driver}: none runs"
    return f"{text}, start {found.token[:8]}, device {found.device or '-'}"


def _cost(usage: MountUsage) -> str:
    from storage_proxy.core.ids import ByteSize

    parts = [
        f"memory {ByteSize(usage.rss if usage.pss is None else usage.pss)}",
        f"CPU {usage.cpu_seconds:.1f} s",
        f"{usage.threads} threads",
    ]
    if usage.fds is not None:
        parts.append(f"{usage.fds} files")
    if usage.read is not None and usage.written is not None:
        parts.append(f"moved {ByteSize(usage.read)} in, {ByteSize(usage.written)} out")
    return ", ".join(parts) + f" (measured {since(usage.measured_at)} ago)"


async def events(
    after: Annotated[
        str | None,
        typer.Option("--since", metavar="ID", help="Start after this event; 0 for all that are kept. Default: now."),
    ] = None,
    as_json: JsonOption = False,
    socket: SocketOption = None,
    state: StateOption = None,
) -> None:
    """Follow what happens to the mounts, until Ctrl-C or until the agent stops. With --json one object a line."""
    from storage_proxy.client.storages import EventsLost, MountEvent

    async with connect(socket, state) as client, aclosing(client.events(since=after)) as stream:
        async for item in stream:
            if as_json:
                show(item.model_dump_json(exclude_none=True))
            elif isinstance(item, MountEvent):
                show(_line(item))
            elif isinstance(item, EventsLost):
                show(f"-- {item.count or 'some'} events are missing here --")


def _line(event: MountEvent) -> str:
    what = event.kind
    if event.new is not None:
        what = f"{event.old} -> {event.new}"
    place = f"s3://{event.bucket}/{event.prefix or ''}" if event.bucket else "node"
    detail = " ".join(f"{name}={value}" for name, value in event.detail.items())
    return "  ".join(
        part
        for part in (
            f"{event.at.astimezone():%F %T}",
            (event.key or "-" * 12)[:12],
            what.ljust(19),
            place,
            detail,
            event.error or "",
        )
        if part
    )


# --- doing ------------------------------------------------------------------------------------------------------------


async def repair(
    key: KeyArgument,
    force: Annotated[
        bool, typer.Option("--force", help="Also if it lives: its process is killed, files open on it fail.")
    ] = False,
    as_json: JsonOption = False,
    socket: SocketOption = None,
    state: StateOption = None,
) -> None:
    """Repair a dead or failed mount now, without waiting for the agent's next attempt."""
    async with connect(socket, state) as client:
        done = await client.repair(key, force=force)
    if as_json:
        show_json(done.model_dump(mode="json"))
    elif not done.repaired:
        show(f"Mount {done.key[:12]} is {done.state.value}: there is nothing to repair.")
    else:
        show(f"Mount {done.key[:12]} was repaired in {done.seconds:.2f} s; it is {done.state.value}.")


async def drain(
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY]...", help="Only these mounts. Default: the whole node.")
    ] = None,
    wait: Annotated[
        float | None, typer.Option("--wait", "-w", min=0, help="Wait so many seconds until nothing is attached.")
    ] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="Take new attachments again.")] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    socket: SocketOption = None,
    state: StateOption = None,
) -> None:
    """Refuse new attachments until --cancel, also after a restart of the agent. What is attached stays as it is.

    With --wait it ends with exit code 9 if something is still attached then; the drain goes on.
    """
    if cancel and (wait is not None or dry_run):
        raise UsageError("--cancel goes with neither --wait nor --dry-run.")
    async with connect(socket, state) as client:
        if dry_run:
            _show_plan(await _plan(client, keys or []), as_json)
            return
        status = await (client.resume(keys) if cancel else client.drain(keys))
        if wait and not status.done:
            status = await _wait(client, keys, status, wait)
    if as_json:
        show_json(status.model_dump(mode="json"))
    else:
        _show_drain(status, cancelled=cancel)
    if wait is not None and not status.done:
        # With --json the answer was printed, and this is what tells a script apart.
        left = DeadlineExceeded(f"{count(status.attachments, 'attachment')} still there after {wait:g} s.")
        if as_json:
            raise typer.Exit(left.exit_code)
        raise left


async def _wait(client: AgentClient, keys: list[str] | None, status: DrainStatus, seconds: float) -> DrainStatus:
    import time

    end = time.monotonic() + seconds
    # The mounts may go away while they drain, and their keys with them: ask for those there were.
    asked = None if keys is None else [mount.key for mount in status.mounts]
    left = -1
    while not status.done and (rest := end - time.monotonic()) > 0:
        if status.attachments != left:
            left = status.attachments
            sessions = sorted({session for mount in status.mounts for session in mount.sessions})
            remark(
                f"waiting for {count(left, 'attachment')} of {', '.join(sessions[:5])}{' ...' * (len(sessions) > 5)}"
            )
        status = await client.drain(asked, wait=min(rest, _STEP_SECONDS))
    return status


async def _plan(client: AgentClient, keys: list[str]) -> list[MountInfo]:
    """The mounts that a drain would concern."""
    for key in keys:
        await client.mount(key)  # refuses what names no mount, or several
    wanted = tuple(key.lower() for key in keys)
    return [item for item in await client.mounts() if not wanted or item.key.startswith(wanted)]


def _show_plan(mounts: list[MountInfo], as_json: bool) -> None:
    total = sum(item.attachments for item in mounts)
    if as_json:
        show_json(
            {
                "dry_run": True,
                "attachments": total,
                "mounts": [item.model_dump(mode="json", include={"key", "state", "attachments"}) for item in mounts],
            }
        )
        return
    show(
        f"{count(len(mounts), 'mount')} would refuse new attachments; {count(total, 'attachment')} would be waited for."
    )
    for item in mounts:
        if item.attachments:
            show(f"{item.key[:12]}  s3://{item.bucket}/{item.prefix}  {', '.join(item.sessions)}")


def _show_drain(status: DrainStatus, *, cancelled: bool) -> None:
    if cancelled and not status.draining and not status.keys:
        show("New attachments are taken again.")
        return
    what = "The node refuses" if status.draining else f"{count(len(status.keys), 'mount')} refuse"
    show(f"{what} new attachments; {count(status.attachments, 'attachment')} left.")
    for mount in status.mounts:
        if mount.attachments:
            show(f"{mount.key[:12]}  s3://{mount.bucket}/{mount.prefix}  {', '.join(mount.sessions)}")


async def collect(
    grace: Annotated[float, typer.Option("--grace", min=0, help="Only mounts unused for this many seconds.")] = 0.0,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    socket: SocketOption = None,
    state: StateOption = None,
) -> None:
    """Take down the mounts that no session uses, without waiting for the end of their grace period."""
    from datetime import UTC, datetime

    async with connect(socket, state) as client:
        if dry_run:
            now = datetime.now(UTC)
            unused = [
                item
                for item in await client.mounts()
                if not item.attachments
                and item.state.value in ("draining", "failed")
                and (item.since is None or (now - item.since).total_seconds() >= grace)
            ]
        else:
            taken = await client.gc(grace)
    if dry_run:
        if as_json:
            show_json({"dry_run": True, "mounts": [item.key for item in unused]})
        else:
            show(f"{count(len(unused), 'mount')} would be taken down.")
            for item in unused:
                show(f"{item.key[:12]}  s3://{item.bucket}/{item.prefix}")
        return
    if as_json:
        show_json({"drained": taken})
    else:
        show(f"{count(taken, 'mount')} taken down.")
