"""`mooring session`: run a command with folders mounted, on this machine."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import MooringError, TokenExpired, UsageError
from .connection import (
    ManagerUrlOption,
    StateOption,
    TokenFileOption,
    connect_agent,
    connect_manager,
)
from .output import JsonOption, YesOption, print_json, print_line, print_table, say, warn

if TYPE_CHECKING:
    from ..client.agent import AgentClient
    from ..client.manager import ManagerClient, PlannedMount
    from ..core.wire import BindSpec
    from ..embedded.sessions import SessionResult

CLEANUP_SECONDS = 60.0
DEFAULT_TARGET = "/home/work"

AgentSocketOption = Annotated[
    Path | None,
    typer.Option("--agent-socket", help="An agent elsewhere on this machine.", show_default=False),
]


@dataclass(frozen=True, slots=True)
class FolderMount:
    """`NAME[:ro|:rw][:/PATH]`; without a path the folder is at /home/work/NAME."""

    folder: str
    mode: str
    target: str

    @classmethod
    def parse(cls, text: str) -> FolderMount:
        """Read from the right, because a folder name may hold a colon. Raises `UsageError`."""
        rest, mode, target = text, "rw", ""
        head, sep, tail = rest.rpartition(":/")
        if sep:
            rest, target = head, f"/{tail}"
        head, sep, tail = rest.rpartition(":")
        if sep and tail in ("ro", "rw"):
            rest, mode = head, tail
        if not rest or "/" in rest:
            raise UsageError(f"{text!a} names no folder to mount.", hint="Write NAME, NAME:ro or NAME:rw:/path.")
        return cls(rest, mode, target.rstrip("/") or f"{DEFAULT_TARGET}/{rest}")


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Run commands with folders mounted, and end sessions.", no_args_is_help=True)
    app.add_typer(group, name="session")
    group.command("run", context_settings={"allow_interspersed_args": False})(run)
    group.command("ls")(ls)
    group.command("show")(show)
    group.command("end")(end)


async def run(
    command: Annotated[list[str], typer.Argument(metavar="[--] CMD", help="The command and its arguments.")],
    folder: Annotated[
        list[str],
        typer.Option("--folder", "-f", metavar="NAME[:ro|:rw][:/PATH]", help="A folder to mount; may be repeated."),
    ],
    uid: Annotated[int, typer.Option(min=0, help="User that the command runs as, and owner of the files.")] = 1000,
    gid: Annotated[int, typer.Option(min=0, help="Its group.")] = 1000,
    workdir: Annotated[str, typer.Option(help="Directory to start in.")] = "/",
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which the command is ended.")] = 86_400.0,
    state: StateOption = None,
    manager_url: ManagerUrlOption = None,
    token_file: TokenFileOption = None,
    agent_socket: AgentSocketOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a command in a new session: the folders are mounted, it runs, they are unmounted again, whatever happens.

    It runs in a container, or in a mount namespace where no container runtime works. The exit code is the command's
    own; 125 says that the session itself failed.
    """
    from ..client.manager import MountAsked
    from ..core.config import parse_request
    from ..embedded.sessions import SessionCommand, SessionRunner
    from ..embedded.state import StateDirectory

    mounts = [FolderMount.parse(text) for text in folder]
    asked = [parse_request(MountAsked, {"folder": m.folder, "mode": m.mode, "target": m.target}) for m in mounts]
    session_id = f"run-{uuid.uuid4().hex[:16]}"
    async with (
        connect_manager(state, manager_url, token_file) as manager,
        connect_agent(state, agent_socket) as agent,
    ):
        runner = SessionRunner(StateDirectory.open(state))
        choice = await runner.choose()
        try:
            identity = await agent.identity()
            plan = await manager.create_session(identity.agent_id, asked, session_id=session_id, uid=uid, gid=gid)
            binds: list[BindSpec] = [await attach_planned(manager, agent, session_id, mount) for mount in plan.mounts]
            result = await runner.run(
                SessionCommand(
                    argv=command,
                    binds=binds,
                    uid=uid,
                    gid=gid,
                    deadline=timeout,
                    capture=as_json,
                    interactive=not as_json,
                    workdir=workdir,
                )
            )
        finally:
            await _uncancelled(_end(manager, agent, session_id))
    if as_json:
        print_json(_result_json(session_id, choice.runtime.value, binds, result))
    raise typer.Exit(result.exit_code)


async def attach_planned(manager: ManagerClient, agent: AgentClient, session_id: str, mount: PlannedMount) -> BindSpec:
    """Attaches with the grant of the plan, or with a fresh one if the mounts before it took too long."""
    try:
        return await agent.attach(mount.grant)
    except TokenExpired:
        fresh = await manager.renew_grant(session_id, mount.folder_id)
        return await agent.attach(fresh.grant)


def _result_json(session_id: str, runtime: str, binds: list[BindSpec], result: SessionResult) -> dict[str, object]:
    return {
        "session_id": session_id,
        "runtime": runtime,
        "mounts": [{"vfid": b.vfid, "target": b.target, "read_only": b.read_only} for b in binds],
        "exit_code": result.exit_code,
        "stdout": result.stdout,
        "stderr": result.stderr,
        "seconds": round(result.seconds, 3),
    }


async def ls(
    state: StateOption = None,
    agent_socket: AgentSocketOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the sessions that hold mounts on this machine."""
    async with connect_agent(state, agent_socket) as agent:
        attachments = await agent.attachments()
    if as_json:
        print_json([item.model_dump(mode="json") for item in attachments])
        return
    print_table(
        ["session", "folder", "access", "target", "since", "mount"],
        [
            [
                a.session_id,
                a.vfid.rpartition("/")[2],
                a.mode.value if a.mode else "",
                a.target or "",
                f"{a.since:%Y-%m-%d %H:%M:%S}" if a.since else "",
                a.mount_key[:12],
            ]
            for a in attachments
        ],
    )


async def show(
    session_id: Annotated[str, typer.Argument(help="The session.")],
    state: StateOption = None,
    manager_url: ManagerUrlOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a session was permitted to mount."""
    async with connect_manager(state, manager_url, token_file) as manager:
        session = await manager.session(session_id)
    if as_json:
        print_json(session.model_dump(mode="json"))
        return
    print_line(f"{session.session_id} on {session.agent_id}: {session.state.value}, since {session.created_at:%F %T}")
    print_table(["folder", "access", "target"], [[m.name, m.mode.value, m.target] for m in session.mounts])


async def end(
    session_id: Annotated[str, typer.Argument(help="The session.")],
    yes: YesOption = False,
    state: StateOption = None,
    manager_url: ManagerUrlOption = None,
    token_file: TokenFileOption = None,
    agent_socket: AgentSocketOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a session: unmount its folders on this machine and revoke its credentials. Nothing happens if it is gone."""
    from .output import confirm, interactive

    if interactive() and not yes:
        confirm(f"End session {session_id}? What runs in it loses its folders.", yes=yes)
    async with (
        connect_manager(state, manager_url, token_file) as manager,
        connect_agent(state, agent_socket) as agent,
    ):
        detached = await agent.detach_session(session_id)
        await manager.delete_session(session_id)
    if as_json:
        print_json({"session_id": session_id, "detached": detached})
    else:
        print_line(f"Session {session_id} ended; {detached} folders were detached.")


async def _end(manager: ManagerClient, agent: AgentClient, session_id: str) -> None:
    """Both halves are tried; what fails is said and does not hide how the command ended."""
    for what, action in (
        ("Its folders could not be detached", agent.detach_session(session_id)),
        ("Its credentials could not be revoked", manager.delete_session(session_id)),
    ):
        try:
            await asyncio.wait_for(action, CLEANUP_SECONDS)
        except (MooringError, TimeoutError) as err:
            warn(f"{what}: {err} Run: mooring session end {session_id}")


async def _uncancelled(action: Coroutine[Any, Any, None]) -> None:
    """Waits for a clean-up to its end although the command is cancelled meanwhile."""
    task = asyncio.ensure_future(action)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        say("Ending the session ...")
        await asyncio.wait([task], timeout=CLEANUP_SECONDS)
        raise
