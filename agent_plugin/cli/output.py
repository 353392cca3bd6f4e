"""What the agent's commands share: their options, the way to the agent, and how things are shown to people."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
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


def connect(socket: Path | None, state: Path | None) -> AgentClient:
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


def show(text: str) -> None:
    """One line on standard output; control characters (S3 names and drivers' words may hold them) as escapes."""
    sys.stdout.write("".join(char if char.isprintable() else ascii(char)[1:-1] for char in text) + "\n")
    sys.stdout.flush()


def show_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")
    sys.stdout.flush()


def remark(text: str) -> None:
    """Said on the way, on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def table(rows: Iterable[Sequence[str]]) -> None:
    cells = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        show("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def since(moment: datetime) -> str:
    """How long ago, in the largest unit that leaves a number of two digits."""
    return duration((datetime.now(UTC) - moment).total_seconds())


def duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
