"""`mooring volume`: the object stores behind the folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import VolumeNotFound
from .connection import StateOption, connect_proxy
from .output import JsonOption, print_fields, print_json, print_table

if TYPE_CHECKING:
    from ..client.proxy import ProxyClient, VolumeInfo

ProxyUrlOption = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Manager-facing port of a storage proxy elsewhere.", show_default=False),
]
SecretFileOption = Annotated[
    Path | None, typer.Option(help="File (mode 0600) with its manager secret.", show_default=False)
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Show the volumes of the storage proxy.", no_args_is_help=True)
    app.add_typer(group, name="volume")
    group.command("ls")(ls)
    group.command("show")(show)


async def ls(
    state: StateOption = None,
    proxy_url: ProxyUrlOption = None,
    secret_file: SecretFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the volumes with their health."""
    async with connect_proxy(state, proxy_url, secret_file) as proxy:
        volumes = [await _describe(proxy, volume) for volume in await proxy.volumes()]
    if as_json:
        print_json(volumes)
        return
    print_table(
        ["name", "backend", "status", "endpoint", "capabilities"],
        [[v["name"], v["backend"], v["status"], v["endpoint"], " ".join(v["capabilities"])] for v in volumes],
    )


async def show(
    name: Annotated[str, typer.Argument(help="Name of the volume.")],
    state: StateOption = None,
    proxy_url: ProxyUrlOption = None,
    secret_file: SecretFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one volume: endpoint, health, capabilities."""
    async with connect_proxy(state, proxy_url, secret_file) as proxy:
        known = {volume.name: volume for volume in await proxy.volumes()}
        if name not in known:
            raise VolumeNotFound(
                f"There is no volume {name!r}.", hint=f"Known: {', '.join(sorted(known)) or 'none is configured'}."
            )
        volume = await _describe(proxy, known[name])
    if as_json:
        print_json(volume)
        return
    metadata = volume.pop("metadata")
    print_fields({**volume, "capabilities": " ".join(volume["capabilities"]), **metadata})


async def _describe(proxy: ProxyClient, volume: VolumeInfo) -> dict[str, Any]:  # Any: JSON
    health = await proxy.hwinfo(volume.name)
    return {
        "name": volume.name,
        "backend": volume.backend,
        "endpoint": volume.endpoint,
        "path": volume.path,
        "status": health.status,
        "status_info": health.status_info,
        "capabilities": volume.capabilities,
        "metadata": health.metadata,
    }
