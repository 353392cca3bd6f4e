"""`mooring folder put` and `mooring folder get`."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import UsageError
from .connection import ManagerUrlOption, StateOption, TokenFileOption, connect_manager
from .output import (
    DryRunOption,
    JsonOption,
    YesOption,
    confirm,
    count,
    interactive,
    one_line,
    print_json,
    print_line,
    progress_bar,
    warn,
)
from .remote import Remote, looks_remote

if TYPE_CHECKING:
    from ..client.transfer import LocalScan, TransferClient, TransferReport

DirectOption = Annotated[
    bool,
    typer.Option(
        "--direct", help="Move the bytes straight from and to the object store, which must be reachable from here."
    ),
]
JobsOption = Annotated[int, typer.Option("--jobs", "-j", min=1, max=64, help="Files at the same time.")]
ChecksumOption = Annotated[bool, typer.Option("--checksum", help="Show the SHA-256 of every file.")]
MAX_SHOWN_PROBLEMS = 20
# An upload beyond either is asked about: it may have been meant for another directory.
ASK_FILES = 1000
ASK_BYTES = 10 * 1024**3


def register(group: typer.Typer) -> None:
    group.command("put")(put)
    group.command("get")(get)


async def put(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="LOCAL...",
            help="Files and directories; `dir/` means what is in it; `-` is standard input.",
        ),
    ],
    target: Annotated[str, typer.Argument(metavar="NAME[:/PATH]", help="Where to; `/` at the end: a directory.")],
    checksum: ChecksumOption = False,
    direct: DirectOption = False,
    jobs: JobsOption = 8,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    state: StateOption = None,
    manager_url: ManagerUrlOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Upload files and directories. A directory goes below the target under its own name, `dir/` without it.

    Symbolic links that lead out of a directory are left out. Each file is compared by its SHA-256 on arrival.
    """
    from ..client.transfer import Mode, TransferClient

    remote = Remote.parse(target)
    mode = Mode.PRESIGNED if direct else Mode.PROXIED
    async with (
        connect_manager(state, manager_url, token_file) as manager,
        TransferClient(manager, mode=mode) as transfer,
    ):
        if sources == ["-"]:
            await _put_stream(transfer, remote, dry_run, as_json)
            return
        folder = await manager.folder(remote.folder)  # wrong names and rights are found before the disk is walked
        as_directory = remote.is_directory or len(sources) > 1 or await transfer.is_directory(folder.id, remote.path)
        scan = await asyncio.to_thread(_scan, sources, remote, as_directory)
        scan.refuse_invalid()
        if dry_run:
            _show_plan(
                [(str(file.path), f"{remote.folder}:/{file.relpath}", file.size) for file in scan.files],
                [(remark.path, remark.reason) for remark in scan.skipped],
                as_json,
            )
            return
        if folder.read_only:
            # The proxy would refuse each file; one sentence before is better.
            from ..core.errors import ReadOnly

            raise ReadOnly(f"Folder {folder.name} is read-only.", hint="Ask its owner for a writable binding.")
        if len(scan.files) > ASK_FILES or scan.bytes > ASK_BYTES:
            _ask(f"Upload {count(len(scan.files))}", scan.bytes, str(remote), yes)
        with progress_bar(f"to {remote.folder}", scan.bytes, enabled=not as_json) as progress:
            report = await transfer.upload_scan(folder.id, scan, concurrency=jobs, progress=progress)
    _finish(report, "Uploaded", as_json, checksum)


async def get(
    source: Annotated[str, typer.Argument(metavar="NAME:/PATH", help="A file or directory; `dir/`: what is in it.")],
    target: Annotated[
        str, typer.Argument(metavar="LOCAL", help="Where to; an existing directory, or `/` at the end: into it.")
    ] = ".",
    checksum: ChecksumOption = False,
    direct: DirectOption = False,
    jobs: JobsOption = 8,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    state: StateOption = None,
    manager_url: ManagerUrlOption = None,
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download a file or a directory. What broke off goes on where it stopped; existing files are replaced at the end.

    Names that could lead out of the local directory are refused.
    """
    from ..client.transfer import Mode, RemoteFile, RemoteScan, TransferClient

    remote = Remote.parse(source)
    local = Path(target)
    mode = Mode.PRESIGNED if direct else Mode.PROXIED
    async with (
        connect_manager(state, manager_url, token_file) as manager,
        TransferClient(manager, mode=mode) as transfer,
    ):
        folder = await manager.folder(remote.folder)
        if not remote.path or await transfer.is_directory(folder.id, remote.path):
            prefix = "" if remote.is_directory else remote.name
            scan = await transfer.scan_remote(folder.id, remote.path, prefix)
        else:
            size = await transfer.size(folder.id, remote.path)
            into = target.endswith("/") or local.is_dir()
            name = remote.name if into else local.name
            scan = RemoteScan(files=[RemoteFile(remote.path, size, name)])
            local = local if into else local.parent
        if dry_run:
            _show_plan(
                [(f"{remote.folder}:/{file.relpath}", str(local / file.target), file.size) for file in scan.files],
                [(remark.path, remark.reason) for remark in scan.refused],
                as_json,
            )
            return
        existing = sum(1 for file in scan.files if (local / file.target).exists())
        if existing:
            _ask(f"Replace {existing} of {count(len(scan.files))}", scan.bytes, str(local), yes)
        with progress_bar(f"from {remote.folder}", scan.bytes, enabled=not as_json) as progress:
            report = await transfer.download_scan(
                folder.id, scan, local, concurrency=jobs, progress=progress, checksum=checksum
            )
    _finish(report, "Downloaded", as_json, checksum)


def _scan(sources: list[str], remote: Remote, as_directory: bool) -> LocalScan:
    """Everything that is to be sent, under its name in the folder. Blocking."""
    from ..client.transfer import LocalScan, scan_file, scan_tree

    whole = LocalScan()
    for source in sources:
        if source == "-":
            raise UsageError("Standard input cannot be sent together with files.", hint="Give '-' alone.")
        if looks_remote(source):
            raise UsageError(
                f"{source!a} is a place in a folder, not a local file.",
                hint="The target comes last; for a local file of that name write ./ before it.",
            )
        path = Path(source)
        below = [remote.path] if remote.path else []
        if path.is_dir():
            contents_only = source.endswith("/") or path.name in ("", "..")
            part = scan_tree(path, "/".join(below if contents_only else [*below, path.name]))
            whole.files += part.files
            whole.empty_dirs += part.empty_dirs
            whole.skipped += part.skipped
            whole.invalid += part.invalid
        else:
            name = "/".join([*below, path.name]) if as_directory else remote.path
            whole.files.append(scan_file(path, name))
    names = Counter(file.relpath for file in whole.files)
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise UsageError(f"Two of the files would both become {twice!a}.", hint="Upload them one after the other.")
    return whole


async def _put_stream(transfer: TransferClient, remote: Remote, dry_run: bool, as_json: bool) -> None:
    if remote.is_directory:
        raise UsageError("Standard input needs a file name.", hint="Write the target as NAME:/path/file.")
    if dry_run:
        _show_plan([("-", str(remote), 0)], [], as_json)
        return
    with progress_bar(f"to {remote.folder}", None, enabled=not as_json) as progress:
        done = await transfer.upload_file(remote.folder, remote.path, sys.stdin.buffer, progress=progress)
    if as_json:
        print_json({"files": 1, "bytes": done.size, "sha256": {done.relpath: done.sha256}, "failures": []})
    else:
        print_line(f"{done.sha256}  {remote}")


def _ask(action: str, size: int, place: str, yes: bool) -> None:
    """A question only where a person sits; a script that says put or get means it."""
    from ..core.ids import ByteSize

    if interactive() and not yes:
        confirm(f"{action} ({ByteSize(size)}), {place}?", yes=yes)


def _show_plan(moves: list[tuple[str, str, int]], left_out: list[tuple[str, str]], as_json: bool) -> None:
    from ..core.ids import ByteSize

    total = sum(size for _, _, size in moves)
    if as_json:
        print_json(
            {
                "dry_run": True,
                "files": len(moves),
                "bytes": total,
                "moves": [{"from": source, "to": target, "size": size} for source, target, size in moves],
                "skipped": [{"path": path, "reason": reason} for path, reason in left_out],
            }
        )
        return
    for source, target, _ in moves:
        print_line(f"{source} -> {target}")
    for path, reason in left_out:
        warn(f"{path} is left out: {reason}")
    print_line(f"Would transfer {count(len(moves))}, {ByteSize(total)}.")


def _finish(report: TransferReport, verb: str, as_json: bool, checksum: bool) -> None:
    """Shows what happened; raises the first failure when something did not arrive."""
    from ..core.ids import ByteSize

    if as_json:
        result: dict[str, Any] = {  # Any: JSON
            "files": report.files,
            "bytes": report.bytes,
            "seconds": round(report.seconds, 3),
            "sha256": report.sha256,
            "skipped": [{"path": remark.path, "reason": remark.reason} for remark in report.skipped],
            "failures": [{"path": failure.path, **failure.error.to_problem()} for failure in report.failures],
        }
        print_json(result)
        if report.failures:
            raise typer.Exit(report.failures[0].error.exit_code)
        return
    for remark in report.skipped[:MAX_SHOWN_PROBLEMS]:
        warn(f"{remark.path} is left out: {remark.reason}")
    if len(report.skipped) > MAX_SHOWN_PROBLEMS:
        warn(f"{len(report.skipped) - MAX_SHOWN_PROBLEMS} more are left out; --json lists all.")
    if checksum:
        for name, digest in sorted(report.sha256.items()):
            print_line(f"{digest}  {name}")
    rate = ByteSize(int(report.bytes / report.seconds)) if report.seconds else ByteSize(0)
    print_line(f"{verb} {count(report.files)}, {ByteSize(report.bytes)} in {report.seconds:.1f} s ({rate}/s).")
    for failure in report.failures[:MAX_SHOWN_PROBLEMS]:
        sys.stderr.write(f"failed: {one_line(failure.path)}: {one_line(str(failure.error))}\n")
    if report.failures:
        total = len(report.failures) + report.files
        sys.stderr.write(
            f"error: {len(report.failures)} of {count(total)} did not arrive. Run it again for the rest.\n"
        )
        raise typer.Exit(report.failures[0].error.exit_code)
