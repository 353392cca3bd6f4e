"""`mooring node`: what the agents of all nodes say of themselves and their mounts, through the storage proxy."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated

import typer

from .connection import StateOption, connect_proxy
from .output import JsonOption, print_fields, print_json, print_line, print_table, warn
from .volume import ProxyUrlOption, SecretFileOption

if TYPE_CHECKING:
    from ..client.storages import MountEvent, MountStatus, NodeStatus, Reading

TypeOption = Annotated[str, typer.Option("--type", help="Backend of the volumes.")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Show the nodes and their mounts, as they reported last.", no_args_is_help=True)
    app.add_typer(group, name="node")
    group.command("ls")(ls)
    group.command("show")(show)
    group.command("events")(events)


async def ls(
    kind: TypeOption = "minio",
    state: StateOption = None,
    proxy_url: ProxyUrlOption = None,
    secret_file: SecretFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the nodes, and the mounts that are not well."""
    from ..client.storages import MountsWanted

    async with connect_proxy(state, proxy_url, secret_file) as proxy:
        found = await proxy.storage_status(kind, mounts=MountsWanted.TROUBLED)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    _warn(found)
    columns = ["node", "state", "heard", "mounts", "attachments", "by state", "notes"]
    print_table(columns, [_row(node) for node in found.nodes], right=["heard", "mounts", "attachments"])
    for mount in found.mounts:
        print_line(f"{mount.agent_id}: {_mount(mount)}: {_problem(mount)}")


async def show(
    agent: Annotated[str, typer.Argument(help="Id of the agent.")],
    kind: TypeOption = "minio",
    state: StateOption = None,
    proxy_url: ProxyUrlOption = None,
    secret_file: SecretFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one node with its mounts and the sessions that hold them."""
    async with connect_proxy(state, proxy_url, secret_file) as proxy:
        found = await proxy.storage_node(agent, kind)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    _warn(found)
    node = found.node
    print_fields(
        {
            "node": node.agent_id,
            "state": node.state.value,
            "heard": f"{node.heartbeat_age_seconds:.0f} s ago (every {node.heartbeat_interval_seconds:g} s)",
            "version": f"{node.version}, pid {node.pid}, started {node.started:%F %T}"
            if node.started
            else node.version,
            "mounts": f"{node.mounts}, {node.attachments} attachments",
            **({"draining": "takes no new attachments"} if node.draining else {}),
            **{f"warning {number}": text for number, text in enumerate(node.warnings, 1)},
        }
    )
    columns = ["mount", "state", "access", "driver", "pid", "sessions", "place", "problem"]
    rows = [
        [
            mount.key[:12],
            mount.state,
            mount.mode,
            mount.driver,
            mount.pid,
            " ".join(mount.sessions),
            f"s3://{mount.bucket}/{mount.prefix}",
            _problem(mount) if mount.troubled else "",
        ]
        for mount in found.mounts
    ]
    print_table(columns, rows, right=["pid"])


async def events(
    after: Annotated[
        str | None,
        typer.Option("--after", metavar="ID", help="Start after this event; 0 for all that are kept. Default: now."),
    ] = None,
    kind: TypeOption = "minio",
    state: StateOption = None,
    proxy_url: ProxyUrlOption = None,
    secret_file: SecretFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Follow what happens to mounts on all nodes, until Ctrl-C. With --json one object a line."""
    import sys

    from ..client.storages import EventsLost, MountEvent

    async with (
        connect_proxy(state, proxy_url, secret_file) as proxy,
        aclosing(proxy.storage_events(kind, after=after)) as stream,
    ):
        async for item in stream:
            if as_json:
                print_line(item.model_dump_json(exclude_none=True))
            elif isinstance(item, MountEvent):
                print_line(_event(item))
            elif isinstance(item, EventsLost):
                print_line(f"-- {item.count or 'some'} events are missing here --")
            else:
                warn("Redis is back." if item.available else "Redis does not answer: events may be late.")
            sys.stdout.flush()


def _row(node: NodeStatus) -> list[object]:
    states = ", ".join(f"{number} {name}" for name, number in node.by_state.items())
    notes = [*(["draining"] if node.draining else []), *([f"{len(node.warnings)} warnings"] if node.warnings else [])]
    heard = f"{node.heartbeat_age_seconds:.0f} s ago"
    return [node.agent_id, node.state.value, heard, node.mounts, node.attachments, states, ", ".join(notes)]


def _mount(mount: MountStatus) -> str:
    return f"s3://{mount.bucket}/{mount.prefix} ({mount.key[:12]}) is {mount.state}"


def _problem(mount: MountStatus) -> str:
    said = mount.last_error or mount.unresponsive or mount.trouble
    return said or ("its node is away" if mount.stale else "no cause is known")


def _warn(found: Reading) -> None:
    if found.stale:
        warn(f"{found.error} This was true {found.age_seconds:.0f} s ago.")
    if found.unreadable:
        warn(f"{found.unreadable} reports could not be read: an agent may be of another version.")


def _event(event: MountEvent) -> str:
    what = f"{event.old} -> {event.new}" if event.new else event.kind
    place = f"s3://{event.bucket}/{event.prefix or ''}" if event.bucket else ""
    detail = " ".join(f"{name}={value}" for name, value in event.detail.items())
    parts = [f"{event.at.astimezone():%F %T}", event.agent_id, what, place, detail, event.error or ""]
    return "  ".join(part for part in parts if part)
