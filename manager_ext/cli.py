"""`mooring manager`: serve, tokens, keys."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

manager = typer.Typer(
    name="manager", help="The manager extension: who owns and who may mount what.", no_args_is_help=True
)
token = typer.Typer(name="token", help="Tokens for its API.", no_args_is_help=True)
keys = typer.Typer(name="keys", help="Keys that encrypt stored credentials.", no_args_is_help=True)
manager.add_typer(token)
manager.add_typer(keys)

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="Configuration file (TOML).", envvar="MOORING_MANAGER_CONFIG", show_default=False
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the sub-commands to the `mooring` command."""
    app.add_typer(manager)


@manager.command()
async def serve(config: ConfigOption = None) -> None:
    """Serve the REST API until SIGTERM or Ctrl-C."""
    from storage_proxy.core.config import load_config

    from .config import ManagerConfig
    from .main import serve as run

    await run(load_config(ManagerConfig, config))


@token.command("issue")
def issue(
    user: Annotated[str, typer.Option("--user", help="UUID of the user; for role agent, the id of the agent.")],
    config: ConfigOption = None,
    role: Annotated[str, typer.Option("--role", help="user, admin or agent.")] = "user",
    project: Annotated[list[str] | None, typer.Option("--project", help="UUID of a project; may be repeated.")] = None,
    lifetime: Annotated[str, typer.Option("--lifetime", help="How long it is good, as in 30m, 1h, 7d.")] = "1h",
) -> None:
    """Print a signed token for the REST API."""
    from storage_proxy.core.config import load_config

    from .config import ManagerConfig
    from .main import api_signer
    from .tokens import issue_token

    signer = api_signer(load_config(ManagerConfig, config))
    text = issue_token(signer, user=user, role=role, projects=project or [], lifetime=lifetime)
    sys.stdout.write(text + "\n")


@keys.command("rotate")
async def rotate(
    config: ConfigOption = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Drop the old keys when no value needs them any more.")
    ] = False,
) -> None:
    """Make a new encryption key and encrypt every stored credential with it. May run beside the server.

    If it is interrupted, run it again: it goes on where it stopped and nothing is lost.
    """
    from storage_proxy.core.config import load_config
    from storage_proxy.db import Database

    from .config import ManagerConfig
    from .services.keys import rotate as run

    settings = load_config(ManagerConfig, config)
    db = Database(settings.database_url)
    try:
        count = await run(db, settings.key_file, prune=prune)
    finally:
        await db.close()
    sys.stdout.write(f"{count} value(s) encrypted again{', old keys dropped' if prune else ''}.\n")
