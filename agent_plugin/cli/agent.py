"""`mooring agent`: run the agent of this node, and look at it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import JsonOption, SocketOption, StateOption, connect, duration, show_json, since, table

if TYPE_CHECKING:
    from ..api import NodeStatus


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Run and look at the agent of this node.", no_args_is_help=True)
    group.command("serve")(serve)
    group.command("status")(status)
    app.add_typer(group, name="agent")


async def serve(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="Configuration file; see `mooring config sample agent`.")
    ],
) -> None:
    """Serve the API on the unix socket and keep the mounts, until SIGTERM or Ctrl-C."""
    from storage_proxy.core.config import load_config

    from ..config import AgentConfig
    from ..main import serve as serve_agent

    await serve_agent(load_config(AgentConfig, config))


async def status(as_json: JsonOption = False, socket: SocketOption = None, state: StateOption = None) -> None:
    """Show what the agent does, and what is wrong with it."""
    from ..api import NodeStatus

    async with connect(socket, state) as client:
        node = await client.get("/v1/status", NodeStatus)
    if as_json:
        show_json(node.model_dump(mode="json"))
        return
    states = ", ".join(f"{count} {name}" for name, count in sorted(node.mounts_by_state.items()))
    up = duration(node.uptime_seconds)
    table(
        [
            ("agent", f"{node.agent_id} (version {node.version}, pid {node.pid}, up {up})"),
            ("status", node.status),
            ("mounts", f"{node.mounts} of at most {node.max_mounts}" + (f": {states}" if states else "")),
            ("attachments", str(node.attachments)),
            ("draining", _draining(node)),
            *(
                (f"driver {driver.name}", driver.version if driver.available else f"missing: {driver.error}")
                for driver in node.drivers
            ),
            ("redis", _redis(node)),
            *(("warning", text) for text in node.warnings),
        ]
    )


def _draining(node: NodeStatus) -> str:
    if node.draining:
        return "yes: the node refuses new attachments"
    return f"{node.draining_mounts} of the mounts" if node.draining_mounts else "no"


def _redis(node: NodeStatus) -> str:
    if not node.redis.configured:
        return "not configured: nobody else is told"
    told = f"last told {since(node.redis.told_at)} ago" if node.redis.told_at else "never told"
    return f"does not answer, {told}: {node.redis.error}" if node.redis.error else told
