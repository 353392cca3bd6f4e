"""Which services a command talks to: those of the running stack (`endpoints.json`), or the ones named on the command
line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import ServiceUnavailable, UsageError

if TYPE_CHECKING:
    from ..client.agent import AgentClient
    from ..client.manager import ManagerClient
    from ..client.proxy import ProxyClient
    from ..embedded.endpoints import Endpoints

StateOption = Annotated[
    Path | None,
    typer.Option("--state", envvar="MOORING_STATE", help="State directory of the running stack.", show_default=False),
]
ManagerUrlOption = Annotated[
    str | None,
    typer.Option(
        "--manager-url",
        envvar="MOORING_MANAGER_URL",
        metavar="URL",
        help="A manager extension elsewhere, instead of the running stack's.",
        show_default=False,
    ),
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        envvar="MOORING_TOKEN_FILE",
        help="File (mode 0600) with the API token for --manager-url.",
        show_default=False,
    ),
]


def running_stack(state: Path | None) -> Endpoints:
    """Raises `ServiceUnavailable` when no stack runs there."""
    from ..embedded.endpoints import find_endpoints

    return find_endpoints(state)


def connect_manager(state: Path | None, manager_url: str | None, token_file: Path | None) -> ManagerClient:
    """The manager extension that was named, else the running stack's."""
    from ..client.manager import ManagerClient
    from ..core.secrets import read_secret

    if manager_url is not None:
        if token_file is None:
            raise UsageError("--manager-url needs an API token.", hint="Add --token-file FILE (mode 0600).")
        return ManagerClient(manager_url, read_secret(token_file))
    try:
        found = running_stack(state)
    except ServiceUnavailable as err:
        raise ServiceUnavailable(
            err.message, hint=f"{err.hint}, or name one elsewhere with --manager-url and --token-file."
        ) from None
    token = read_secret(token_file) if token_file is not None else found.manager.token
    return ManagerClient(found.manager.url, token)


def connect_proxy(state: Path | None, proxy_url: str | None, secret_file: Path | None) -> ProxyClient:
    """The manager-facing port of the storage proxy that was named, else of the running stack."""
    from ..client.proxy import ProxyClient
    from ..core.secrets import read_secret

    if proxy_url is not None:
        if secret_file is None:
            raise UsageError("--proxy-url needs the manager secret.", hint="Add --secret-file FILE (mode 0600).")
        return ProxyClient(proxy_url, read_secret(secret_file))
    found = running_stack(state)
    return ProxyClient(found.proxy.manager_url, found.proxy.secret)


def connect_agent(state: Path | None, socket: Path | None) -> AgentClient:
    """The agent at `socket`, else the running stack's."""
    from ..client.agent import AgentClient

    return AgentClient(socket if socket is not None else running_stack(state).agent.socket)
