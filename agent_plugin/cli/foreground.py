"""`mooring mount` and `mooring umount`: a mount in the foreground, without an agent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from .output import JsonOption, show


def register(app: typer.Typer) -> None:
    app.command("mount")(mount)
    app.command("umount")(umount)


async def mount(
    place: Annotated[str, typer.Argument(metavar="s3://BUCKET[/PREFIX]", help="What to mount.")],
    directory: Annotated[str, typer.Argument(metavar="DIR", help="An empty directory.")],
    endpoint: Annotated[str, typer.Option("--endpoint", envvar="AWS_ENDPOINT_URL", help="URL of the S3 server.")],
    driver: Annotated[str, typer.Option("--driver", help="Mount driver.")] = "s3fs",
    read_only: Annotated[bool, typer.Option("--read-only", "-r", help="Refuse writes.")] = False,
    region: Annotated[str, typer.Option("--region", help="Region of the bucket.")] = "us-east-1",
    uid: Annotated[int | None, typer.Option("--uid", min=0, help="Owner of all files. Default: yours.")] = None,
    gid: Annotated[int | None, typer.Option("--gid", min=0, help="Group of all files. Default: yours.")] = None,
    umask: Annotated[str, typer.Option("--umask", help="Permission bits taken from all files, octal.")] = "022",
    credential_file: Annotated[
        Path | None,
        typer.Option(
            "--access-key-file",
            "--credential-file",
            help="Private file (0600) with the keys: two lines, or JSON with access_key and secret_key. "
            "Default: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY from the environment.",
        ),
    ] = None,
    ca_file: Annotated[Path | None, typer.Option("--ca-file", help="Authorities of the server's certificate.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Mount a bucket, or a directory of one, in the foreground; Ctrl-C unmounts. Needs no agent."""
    from storage_proxy.core.errors import UsageError
    from storage_proxy.core.ids import AccessMode
    from storage_proxy.core.wire import Ownership

    from .. import foreground
    from ..main import harden_process

    try:
        mask = int(umask, 8)
    except ValueError:
        mask = -1
    if not 0 <= mask <= 0o777:
        raise UsageError(f"{umask!r} is not a umask.", hint="Write it in octal, as in 022.")
    location = foreground.parse_place(place, endpoint=endpoint, region=region)
    owner = Ownership(uid=os.geteuid() if uid is None else uid, gid=os.getegid() if gid is None else gid, umask=mask)
    mode = AccessMode.READ_ONLY if read_only else AccessMode.READ_WRITE
    credential = foreground.find_credential(credential_file, os.environ)

    def announce(done: foreground.Mounted) -> None:
        if as_json:
            report = {"mounted": str(done.directory), "place": done.place, "pid": done.pid, "seconds": done.seconds}
            show(json.dumps(report))
        else:
            show(f"mounted {done.place} at {done.directory} in {done.seconds:.2f} s; Ctrl-C unmounts")

    harden_process()
    plan = foreground.make_plan(location, mode, owner, driver)
    await foreground.run(foreground.ForegroundMount(plan, Path(directory), credential, ca_file), announce)


async def umount(
    # Text, not a path: typer would stat it, and a stat of a dead or frozen mount fails or hangs.
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Where something is mounted.")],
    lazy: Annotated[bool, typer.Option("--lazy", "-l", help="Also when programs still use it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Unmount a directory, also one whose mount process is dead or hangs."""
    from .. import foreground

    count = await foreground.unmount_directory(Path(directory), lazy=lazy)
    show(json.dumps({"unmounted": count}) if as_json else f"unmounted {directory}")
