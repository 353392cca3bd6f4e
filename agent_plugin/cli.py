"""The commands of the agent: `mooring agent`, `mooring mounts`, `mooring mount`, `mooring umount`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from storage_proxy.client.agent import AgentClient

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
SocketOption = Annotated[
    Path | None,
    typer.Option(
        "--socket",
        envvar="MOORING_AGENT_SOCKET",
        help="Socket of the agent. Default: the one of the running stack, else /run/mooring/agent/agent.sock.",
        show_default=False,
    ),
]
StateOption = Annotated[
    Path | None,
    typer.Option("--state", envvar="MOORING_STATE", help="State directory of the running stack.", show_default=False),
]


def register(app: typer.Typer) -> None:
    agent = typer.Typer(help="Run and look at the agent of this node.", no_args_is_help=True)
    agent.command("serve")(serve)
    agent.command("status")(status)
    app.add_typer(agent, name="agent")
    mounts = typer.Typer(help="Look at the mounts of this node.", no_args_is_help=True)
    mounts.command("ls")(list_mounts)
    mounts.command("gc")(collect)
    app.add_typer(mounts, name="mounts")
    app.command("mount")(mount)
    app.command("umount")(umount)


async def serve(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="Configuration file; see `mooring config sample agent`.")
    ],
) -> None:
    """Serve the API on the unix socket and keep the mounts, until SIGTERM or Ctrl-C."""
    from storage_proxy.core.config import load_config

    from .config import AgentConfig
    from .main import serve as serve_agent

    await serve_agent(load_config(AgentConfig, config))


async def status(as_json: JsonOption = False, socket: SocketOption = None, state: StateOption = None) -> None:
    """Show what the agent does, and what is wrong with it."""
    from .api import NodeStatus

    async with _client(socket, state) as client:
        node = await client.get("/v1/status", NodeStatus)
    if as_json:
        _print(node.model_dump_json(indent=2))
        return
    states = ", ".join(f"{count} {name}" for name, count in sorted(node.mounts_by_state.items()))
    _table(
        [
            ("agent", f"{node.agent_id} (version {node.version}, pid {node.pid}, up {node.uptime_seconds:.0f} s)"),
            ("status", node.status),
            ("mounts", f"{node.mounts} of at most {node.max_mounts}" + (f": {states}" if states else "")),
            ("attachments", str(node.attachments)),
            *(
                (f"driver {driver.name}", driver.version if driver.available else f"missing: {driver.error}")
                for driver in node.drivers
            ),
            *([("redis", f"does not answer: {node.redis_error}")] if node.redis_error else []),
            *(("warning", text) for text in node.warnings),
        ]
    )


async def list_mounts(as_json: JsonOption = False, socket: SocketOption = None, state: StateOption = None) -> None:
    """List the mounts: state, place, mode, who holds them."""
    async with _client(socket, state) as client:
        mounts = await client.mounts()
    if as_json:
        _print(json.dumps([mount.model_dump(mode="json") for mount in mounts], indent=2))
        return
    if not mounts:
        _print("No mounts.")
        return
    rows = [
        (
            item.key[:12],
            item.state.value,
            item.mode.value,
            item.driver,
            str(item.pid or "-"),
            str(len(item.sessions)),
            f"s3://{item.bucket}/{item.prefix}",
        )
        for item in mounts
    ]
    _table([("KEY", "STATE", "MODE", "DRIVER", "PID", "SESSIONS", "PLACE"), *rows])
    for item in mounts:
        if item.last_error:
            _print(f"{item.key[:12]}: {item.last_error}")


async def collect(
    grace: Annotated[float, typer.Option("--grace", min=0, help="Only mounts unused for this many seconds.")] = 0.0,
    as_json: JsonOption = False,
    socket: SocketOption = None,
    state: StateOption = None,
) -> None:
    """Take down the mounts that no session uses, without waiting for the end of their grace period."""
    async with _client(socket, state) as client:
        count = await client.gc(grace)
    _print(json.dumps({"drained": count}) if as_json else f"{count} mounts taken down.")


async def mount(
    place: Annotated[str, typer.Argument(metavar="s3://BUCKET[/PREFIX]", help="What to mount.")],
    directory: Annotated[str, typer.Argument(metavar="DIR", help="An empty directory.")],
    endpoint: Annotated[str, typer.Option("--endpoint", envvar="AWS_ENDPOINT_URL", help="URL of the S3 server.")],
    driver: Annotated[str, typer.Option("--driver", help="Mount driver.")] = "s3fs",
    read_only: Annotated[bool, typer.Option("--read-only", "-r", help="Refuse writes.")] = False,
    region: Annotated[str, typer.Option("--region", help="Region of the bucket.")] = "us-east-1",
    uid: Annotated[int | None, typer.Option("--uid", min=0, help="Owner of all files. Default: yours.")] = None,
    gid: Annotated[int | None, typer.Option("--gid", min=0, help="Group of all files. Default: yours.")] = None,
    umask: Annotated[str, typer.Option("--umask", help="Permission bits taken from all files, octal.")] = "022",
    credential_file: Annotated[
        Path | None,
        typer.Option(
            "--access-key-file",
            "--credential-file",
            help="Private file (0600) with the keys: two lines, or JSON with access_key and secret_key. "
            "Default: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY from the environment.",
        ),
    ] = None,
    ca_file: Annotated[Path | None, typer.Option("--ca-file", help="Authorities of the server's certificate.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Mount a bucket, or a directory of one, in the foreground; Ctrl-C unmounts. Needs no agent."""
    from storage_proxy.core.errors import UsageError
    from storage_proxy.core.ids import AccessMode
    from storage_proxy.core.wire import Ownership

    from . import foreground
    from .main import harden_process

    try:
        mask = int(umask, 8)
    except ValueError:
        mask = -1
    if not 0 <= mask <= 0o777:
        raise UsageError(f"{umask!r} is not a umask.", hint="Write it in octal, as in 022.")
    location = foreground.parse_place(place, endpoint=endpoint, region=region)
    owner = Ownership(uid=os.geteuid() if uid is None else uid, gid=os.getegid() if gid is None else gid, umask=mask)
    mode = AccessMode.READ_ONLY if read_only else AccessMode.READ_WRITE
    credential = foreground.find_credential(credential_file, os.environ)

    def announce(done: foreground.Mounted) -> None:
        if as_json:
            report = {"mounted": str(done.directory), "place": done.place, "pid": done.pid, "seconds": done.seconds}
            _print(json.dumps(report))
        else:
            _print(f"mounted {done.place} at {done.directory} in {done.seconds:.2f} s; Ctrl-C unmounts")

    harden_process()
    plan = foreground.make_plan(location, mode, owner, driver)
    await foreground.run(foreground.ForegroundMount(plan, Path(directory), credential, ca_file), announce)


async def umount(
    # Text, not a path: typer would stat it, and a stat of a dead or frozen mount fails or hangs.
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Where something is mounted.")],
    lazy: Annotated[bool, typer.Option("--lazy", "-l", help="Also when programs still use it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Unmount a directory, also one whose mount process is dead or hangs."""
    from . import foreground

    count = await foreground.unmount_directory(Path(directory), lazy=lazy)
    _print(json.dumps({"unmounted": count}) if as_json else f"unmounted {directory}")


def _client(socket: Path | None, state: Path | None) -> AgentClient:
    from storage_proxy.client.agent import AgentClient

    return AgentClient(socket or _stack_socket(state) or Path("/run/mooring/agent/agent.sock"))


def _stack_socket(state: Path | None) -> Path | None:
    """The socket that `mooring up` has written down, if it runs."""
    if state is None:
        home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        state = Path("/var/lib/mooring") if os.geteuid() == 0 else home / "mooring"
    try:
        return Path(json.loads((state / "endpoints.json").read_text(encoding="utf-8"))["agent"]["socket"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _table(rows: Iterable[Sequence[str]]) -> None:
    table = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        _print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
