"""`mooring folder`: make, bind, look into and remove folders. The transfers are in `cli.copying`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import FileNotFound, NotEmpty, NotFound, UsageError
from . import copying
from .connection import ManagerUrlOption, StateOption, TokenFileOption, connect_manager, running_stack
from .output import (
    DryRunOption,
    JsonOption,
    YesOption,
    confirm,
    count,
    print_fields,
    print_json,
    print_line,
    print_table,
    resolve_secret,
)
from .remote import Remote

if TYPE_CHECKING:
    from ..client.manager import Folder, ManagerClient

VolumeOption = Annotated[
    str | None, typer.Option("--volume", help="The volume it lives on; needed if there are several.")
]
ProjectOption = Annotated[str | None, typer.Option("--project", help="Make it for this project (a UUID), not for you.")]
PlaceArgument = Annotated[str, typer.Argument(metavar="NAME[:/PATH]", help="Folder, and a path in it.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name or id of the folder.")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Make, bind, fill, read and remove folders.", no_args_is_help=True)
    app.add_typer(group, name="folder")
    group.command("create")(create)
    group.command("bind")(bind)
    group.command("ls")(ls)
    group.command("show")(show)
    copying.register(group)
    group.command("mkdir")(mkdir)
    group.command("rm")(rm)
    group.command("usage")(usage)
    group.command("delete")(delete)


async def create(
    name: NameArgument,
    volume: VolumeOption = None,
    project: ProjectOption = None,
    state: StateOption = None,
    manager_url: ManagerUrlOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an empty folder on a volume."""
    async with connect_manager(state, manager_url, token_file) as manager:
        scope = f"project:{project}" if project else None
        made = await manager.create_folder(name, volume or _only_volume(state, manager_url), quota_scope=scope)
    _show_folder(made, as_json, f"Folder {made.name} created.")


async def bind(
    name: NameArgument,
    bucket: Annotated[str, typer.Option(help="The existing bucket.")],
    prefix: Annotated[str, typer.Option(help="A directory of the bucket.")] = "",
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse every write.")] = False,
    credential: Annotated[str | None, typer.Option(help="Name or id of a stored credential.")] = None,
    access_key: Annotated[str | None, typer.Option(help="Or an access key, with its secret in a file.")] = None,
    secret_key_file: Annotated[Path | None, typer.Option(help="File (mode 0600) with the secret key.")] = None,
    endpoint: Annotated[str | None, typer.Option(metavar="URL", help="Object store, if not the volume's.")] = None,
    region: Annotated[str | None, typer.Option(help="Its region.")] = None,
    uid: Annotated[int | None, typer.Option(min=0, help="Owner of its files in sessions.")] = None,
    gid: Annotated[int | None, typer.Option(min=0, help="Group of its files in sessions.")] = None,
    volume: VolumeOption = None,
    project: ProjectOption = None,
    state: StateOption = None,
    manager_url: ManagerUrlOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a folder of an existing bucket, or of a directory of one. Its objects stay where they are."""
    from ..core.secrets import Secret
    from .credential import find_credential

    if (credential is None) == (access_key is None):
        raise UsageError(
            "A folder is bound with one credential.", hint="Give --credential NAME, or --access-key with its secret."
        )
    secret = Secret(resolve_secret(secret_key_file, "Secret key")) if access_key is not None else None
    async with connect_manager(state, manager_url, token_file) as manager:
        stored = await find_credential(manager, credential) if credential is not None else None
        made = await manager.bind_folder(
            name,
            volume or _only_volume(state, manager_url),
            bucket,
            prefix=prefix if not prefix or prefix.endswith("/") else f"{prefix}/",
            read_only=read_only,
            credential_id=stored.id if stored else None,
            access_key=access_key,
            secret_key=secret,
            endpoint=endpoint,
            region=region,
            quota_scope=f"project:{project}" if project else None,
            uid=uid,
            gid=gid,
        )
    _show_folder(made, as_json, f"Folder {made.name} bound to s3://{made.bucket}/{made.prefix or ''}.")


async def ls(
    place: Annotated[
        str | None, typer.Argument(metavar="[NAME[:/PATH]]", help="Folder, and a path in it; without: all folders.")
    ] = None,
    recursive: Annotated[bool, typer.Option("--recursive", "-R", help="Also what is in its directories.")] = False,
    state: StateOption = None,
    manager_url: ManagerUrlOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the folders, or the files of one."""
    async with connect_manager(state, manager_url, token_file) as manager:
        if place is None:
            folders = [folder async for folder in manager.folders()]
            if as_json:
                print_json([_folder_json(folder) for folder in folders])
            else:
                print_table(["name", "kind", "access", "volume", "place", "for", "created"], map(_folder_row, folders))
            return
        remote = Remote.parse(place)
        entries = await _entries(manager, remote.folder, remote.path, recursive)
    if as_json:
        print_json(entries)
        return
    print_table(
        ["size", "modified", "name"],
        [
            [
                "" if entry["type"] == "DIRECTORY" else entry["size"],
                "" if entry["type"] == "DIRECTORY" else (entry["modified"] or "")[:19].replace("T", " "),
                entry["path"] + ("/" if entry["type"] == "DIRECTORY" else ""),
            ]
            for entry in entries
        ],
        right=["size"],
    )


async def show(
    name: NameArgument,
    state: StateOption = None,
    manager_url: ManagerUrlOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is known of a folder."""
    async with connect_manager(state, manager_url, token_file) as manager:
        folder = await manager.folder(Remote.parse(name).folder)
    if as_json:
        print_json(_folder_json(folder))
    else:
        print_fields(_folder_json(folder))


async def mkdir(
    place: PlaceArgument,
    parents: Annotated[
        bool, typer.Option("--parents", "-p", help="Make what is missing above, and accept an existing one.")
    ] = False,
    state: StateOption = None,
    manager_url: ManagerUrlOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a directory in a folder."""
    remote = Remote.parse(place)
    if not remote.path:
        raise UsageError(f"{place!a} names no directory.", hint="Write NAME:/path.")
    async with connect_manager(state, manager_url, token_file) as manager:
        await manager.mkdir(remote.folder, remote.path, parents=parents, exist_ok=parents)
    if as_json:
        print_json({"created": str(remote)})
    else:
        print_line(f"{remote} created.")


async def rm(
    places: Annotated[list[str], typer.Argument(metavar="NAME:/PATH...", help="What to remove.")],
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Also directories, with all in them.")] = False,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    state: StateOption = None,
    manager_url: ManagerUrlOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove files and directories of a folder."""
    from ..core.ids import ByteSize

    remotes = [Remote.parse(place) for place in places]
    for remote in remotes:
        if not remote.path:
            raise UsageError(
                f"{remote} is the whole folder.", hint=f"To remove it: mooring folder delete {remote.folder}"
            )
    async with connect_manager(state, manager_url, token_file) as manager:
        plans = [await _removal(manager, remote, recursive) for remote in remotes]
        files, size = sum(plan["files"] for plan in plans), sum(plan["bytes"] for plan in plans)
        if not dry_run:
            names = ", ".join(map(str, remotes[:3])) + (f" and {len(remotes) - 3} more" if len(remotes) > 3 else "")
            confirm(f"Remove {names} ({count(files)}, {ByteSize(size)})?", yes=yes)
            for remote, plan in zip(remotes, plans, strict=True):
                await manager.delete_files(remote.folder, [remote.path], recursive=plan["type"] == "DIRECTORY")
    if as_json:
        print_json({"removed": plans, "files": files, "bytes": size, "dry_run": dry_run})
        return
    verb = "Would remove" if dry_run else "Removed"
    for plan in plans:
        print_line(f"{verb} {plan['path']} ({count(plan['files'])}, {ByteSize(plan['bytes'])}).")


async def usage(
    name: NameArgument,
    state: StateOption = None,
    manager_url: ManagerUrlOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how many files and bytes a folder holds, and when that was true."""
    from ..core.ids import ByteSize

    async with connect_manager(state, manager_url, token_file) as manager:
        found = await manager.usage(Remote.parse(name).folder)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    bound = ByteSize(found.error_bound_bytes) if found.error_bound_bytes is not None else "unknown"
    print_fields(
        {
            "files": found.file_count,
            "used": f"{ByteSize(found.used_bytes)} ({found.used_bytes} bytes)",
            "as of": f"{found.as_of:%Y-%m-%d %H:%M:%S %Z}" if found.as_of else "unknown",
            "error at most": bound,
        }
    )


async def delete(
    name: NameArgument,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    state: StateOption = None,
    manager_url: ManagerUrlOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a folder with its files. A bound one is only unbound: its bucket stays as it is."""
    from ..client.manager import FolderKind
    from ..core.ids import ByteSize

    async with connect_manager(state, manager_url, token_file) as manager:
        folder = await manager.folder(Remote.parse(name).folder)
        result: dict[str, Any] = {"folder": folder.name, "id": folder.id, "dry_run": dry_run}  # Any: JSON
        if folder.kind is FolderKind.BOUND:
            question = f"Unbind folder {folder.name}? The objects in s3://{folder.bucket}/{folder.prefix or ''} stay."
            result |= {"files": 0, "bytes": 0}
        else:
            held = await manager.usage(folder.id)
            question = f"Delete folder {folder.name} with {count(held.file_count)} ({ByteSize(held.used_bytes)})?"
            result |= {"files": held.file_count, "bytes": held.used_bytes}
        if not dry_run:
            confirm(question, yes=yes)
            await manager.delete_folder(folder.id)
    if as_json:
        print_json(result)
    elif dry_run:
        print_line(
            question.replace("?", ".", 1).replace("Delete", "Would delete", 1).replace("Unbind", "Would unbind", 1)
        )
    else:
        print_line(f"Folder {folder.name} {'unbound' if folder.kind is FolderKind.BOUND else 'deleted'}.")


# --- parts ------------------------------------------------------------------------------------------------------------


def _only_volume(state: Path | None, manager_url: str | None) -> str:
    """The volume of a stack that has one. Raises `UsageError` where somebody must choose."""
    names = running_stack(state).volumes if manager_url is None else []
    if len(names) != 1:
        raise UsageError(
            "The volume must be named.", hint=f"Add --volume NAME{' (' + ', '.join(names) + ')' if names else ''}."
        )
    return names[0]


async def _entries(manager: ManagerClient, folder: str, path: str, recursive: bool) -> list[dict[str, Any]]:
    """Entries with their paths below `path`; directories before what is in them."""
    found: list[dict[str, Any]] = []
    todo = [""]
    while todo:
        below = todo.pop()
        directory = "/".join(part for part in (path, below) if part)
        cursor: str | None = None
        while True:
            page = await manager.files(folder, directory or ".", cursor=cursor)
            for entry in page.items:
                relpath = f"{below}/{entry.name}" if below else entry.name
                found.append(
                    {
                        "path": relpath,
                        "type": entry.type.value,
                        "size": entry.stat.size,
                        # A directory is only a common prefix: the store knows no time for it.
                        "modified": entry.stat.modified.isoformat()
                        if entry.stat.modified and entry.type.value != "DIRECTORY"
                        else None,
                    }
                )
                if recursive and entry.type.value == "DIRECTORY":
                    todo.append(relpath)
            if not page.next_cursor:
                break
            cursor = page.next_cursor
    return sorted(found, key=lambda entry: entry["path"]) if recursive else found


async def _removal(manager: ManagerClient, remote: Remote, recursive: bool) -> dict[str, Any]:
    """What removing it means. Raises `FileNotFound`; `NotEmpty` for a directory without --recursive."""
    from ..client.transfer import TransferClient

    async with TransferClient(manager) as transfer:
        if await transfer.is_directory(remote.folder, remote.path):
            if not recursive:
                raise NotEmpty(f"{remote} is a directory.", hint="Add --recursive to remove it with all in it.")
            scan = await transfer.scan_remote(remote.folder, remote.path)
            return {"path": str(remote), "type": "DIRECTORY", "files": len(scan.files), "bytes": scan.bytes}
        try:
            size = await transfer.size(remote.folder, remote.path)
        except NotFound:
            raise FileNotFound(f"{remote} does not exist.", hint="See `mooring folder ls`.") from None
    return {"path": str(remote), "type": "FILE", "files": 1, "bytes": size}


def _folder_json(folder: Folder) -> dict[str, Any]:
    return folder.model_dump(mode="json", exclude_none=True)


def _folder_row(folder: Folder) -> list[object]:
    place = f"s3://{folder.bucket}/{folder.prefix or ''}" if folder.bucket else ""
    owner, _, number = folder.quota_scope.partition(":")
    access = "read-only" if folder.read_only else "read-write"
    created = f"{folder.created_at:%Y-%m-%d %H:%M}"
    return [folder.name, folder.kind.value, access, folder.volume, place, f"{owner} {number[:8]}", created]


def _show_folder(folder: Folder, as_json: bool, sentence: str) -> None:
    if as_json:
        print_json(_folder_json(folder))
    else:
        print_line(sentence)
