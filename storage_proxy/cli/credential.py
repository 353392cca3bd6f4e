"""`mooring credential`: key pairs that folders are bound with, kept encrypted by the manager extension."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import RecordNotFound, UsageError
from .connection import ManagerUrlOption, StateOption, TokenFileOption, connect_manager
from .output import JsonOption, YesOption, confirm, print_json, print_line, print_table, resolve_secret

if TYPE_CHECKING:
    from ..client.manager import Credential, ManagerClient


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Keep the key pairs that buckets are bound with.", no_args_is_help=True)
    app.add_typer(group, name="credential")
    group.command("add")(add)
    group.command("ls")(ls)
    group.command("rm")(rm)


async def add(
    name: Annotated[str, typer.Argument(help="A name for the key pair.")],
    access_key: Annotated[str | None, typer.Option(help="The access key (it is no secret).")] = None,
    access_key_file: Annotated[
        Path | None, typer.Option(help="Both keys: a 0600 file with JSON (access_key, secret_key) or two lines.")
    ] = None,
    secret_key_file: Annotated[
        Path | None,
        typer.Option(help="File (mode 0600) with the secret key; else it is asked for, or read from standard input."),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Its object store, if it is not that of the volume.", metavar="URL")
    ] = None,
    project: Annotated[str | None, typer.Option(help="Keep it for this project (a UUID), not for you.")] = None,
    state: StateOption = None,
    manager_url: ManagerUrlOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store a key pair. The secret key is never taken from the command line, where other users could read it."""
    from ..core.secrets import Secret
    from ..core.wire import S3Credential

    if (access_key is None) == (access_key_file is None):
        raise UsageError("Which key?", hint="Give --access-key-file, or --access-key and --secret-key-file.")
    if access_key_file is not None:
        pair = S3Credential.read(access_key_file)
        if pair.session_token is not None:
            raise UsageError("A temporary key cannot be stored: it expires.", hint="Make one without session token.")
        key, secret = pair.access_key, pair.secret_key
    else:
        key, secret = access_key or "", Secret(resolve_secret(secret_key_file, "Secret key"))
    scope = f"project:{project}" if project else None
    async with connect_manager(state, manager_url, token_file) as manager:
        made = await manager.create_credential(name, key, secret, endpoint=endpoint, quota_scope=scope)
    if as_json:
        print_json(made.model_dump(mode="json"))
    else:
        print_line(f"Credential {made.name} stored: {made.id}")


async def ls(
    state: StateOption = None,
    manager_url: ManagerUrlOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the stored key pairs (never the keys)."""
    async with connect_manager(state, manager_url, token_file) as manager:
        found = await _all(manager)
    if as_json:
        print_json([item.model_dump(mode="json") for item in found])
        return
    print_table(
        ["name", "id", "access key", "endpoint", "for", "created"],
        [
            [c.name, c.id, c.access_key_hint, c.endpoint or "", c.quota_scope, f"{c.created_at:%Y-%m-%d %H:%M}"]
            for c in found
        ],
    )


async def rm(
    name: Annotated[str, typer.Argument(help="Name or id.")],
    yes: YesOption = False,
    state: StateOption = None,
    manager_url: ManagerUrlOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Forget a key pair. Refused while a folder is bound with it."""
    async with connect_manager(state, manager_url, token_file) as manager:
        found = find(name, await _all(manager))
        confirm(f"Forget credential {found.name} ({found.access_key_hint})?", yes=yes)
        await manager.delete_credential(found.id)
    if as_json:
        print_json({"deleted": found.id})
    else:
        print_line(f"Credential {found.name} forgotten.")


async def find_credential(manager: ManagerClient, name: str) -> Credential:
    return find(name, await _all(manager))


def find(name: str, known: list[Credential]) -> Credential:
    """By id or name. Raises `RecordNotFound`."""
    for credential in known:
        if name in (credential.id, credential.name):
            return credential
    raise RecordNotFound(f"There is no credential {name!a}.", hint="See `mooring credential ls`.")


async def _all(manager: ManagerClient) -> list[Credential]:
    found: list[Credential] = []
    cursor: str | None = None
    while True:
        page = await manager.credentials_page(cursor=cursor)
        found += page.items
        if not page.next_cursor:
            return found
        cursor = page.next_cursor
