"""The commands of the agent: `mooring agent`, `mooring mounts`, `mooring mount`, `mooring umount`."""

from __future__ import annotations

import typer

from . import agent, foreground, mounts

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    for part in (agent, mounts, foreground):
        part.register(app)
