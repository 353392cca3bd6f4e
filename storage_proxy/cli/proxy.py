"""`mooring proxy`: the storage proxy as a process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Run the storage proxy.", no_args_is_help=True)
    app.add_typer(group, name="proxy")
    group.command("serve")(serve)


async def serve(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="Configuration file; see `mooring config sample proxy`.")
    ],
) -> None:
    """Serve the manager, client and internal APIs until SIGTERM or Ctrl-C."""
    from ..config import ProxyConfig
    from ..core.config import load_config
    from ..main import serve as serve_proxy

    await serve_proxy(load_config(ProxyConfig, config))
