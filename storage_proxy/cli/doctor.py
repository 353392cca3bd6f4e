"""`mooring doctor`: what works on this machine and what does not, with a remedy for each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import MooringError, ServiceUnavailable, UsageError
from .connection import StateOption, running_stack
from .output import JsonOption, print_json, print_table

if TYPE_CHECKING:
    from ..core.wire import S3Credential
    from ..embedded.endpoints import Endpoints
    from ..s3 import Endpoint
    from .checks import Finding

_MARKS = {"ok": "ok", "warn": "WARN", "fail": "FAIL"}


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


async def doctor(
    endpoint: Annotated[str | None, typer.Option(metavar="URL", help="Check this object store.")] = None,
    access_key_file: Annotated[
        Path | None, typer.Option(help="Its keys: a 0600 file with JSON (access_key, secret_key) or two lines.")
    ] = None,
    bucket: Annotated[
        str | None, typer.Option(help="A bucket to probe its abilities in; small objects are written and removed.")
    ] = None,
    region: Annotated[str, typer.Option(help="Its region.")] = "us-east-1",
    ca_file: Annotated[Path | None, typer.Option(help="Certificates to trust for it.")] = None,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check this machine, the running stack if there is one, and an object store.

    Ends with 0 when nothing failed; warnings do not count. Mount points are not touched: a dead one could hang.
    """
    from .checks import Status

    if (endpoint is None) != (access_key_file is None):
        raise UsageError("--endpoint and --access-key-file belong together.", hint="Give both or neither.")
    found: list[Finding] = []
    stack = _find_stack(state, found, optional=endpoint is not None)
    findings = [
        *found,
        *await _machine(),
        *await _stack(stack),
        *await _store(stack, endpoint, access_key_file, bucket, region, ca_file),
    ]
    failed = [finding for finding in findings if finding.status is Status.FAIL]
    if as_json:
        print_json(
            {
                "ok": not failed,
                "counts": {status.value: sum(f.status is status for f in findings) for status in Status},
                "findings": [finding.to_json() for finding in findings],
            }
        )
    else:
        print_table(
            ["", "check", "found", "what to do"],
            [[_MARKS[f.status.value], f.check, f.message, f.remedy] for f in findings],
        )
        warned = sum(finding.status is Status.WARN for finding in findings)
        sys.stdout.write(f"{len(findings)} checks, {warned} warnings, {len(failed)} failures.\n")
    if failed:
        raise typer.Exit(failed[0].exit_code)


def _find_stack(state: Path | None, found: list[Finding], *, optional: bool) -> Endpoints | None:
    """No stack is a fact, not a failure, unless its state directory was named."""
    from .checks import failure, ok

    try:
        return running_stack(state)
    except ServiceUnavailable as err:
        if state is None or optional:
            found.append(ok("stack", err.message))
        else:
            found.append(failure("stack", err))
    except MooringError as err:
        found.append(failure("stack", err))
    return None


async def _machine() -> list[Finding]:
    from . import checks

    findings: list[Finding] = []
    for name, check in (
        ("fuse device", checks.fuse),
        ("s3fs", checks.s3fs),
        ("right to mount", checks.mount_right),
        ("open files", checks.open_files),
        ("podman", checks.containers),
        ("mounts", checks.mounts),
    ):
        findings += await checks.guarded(name, check)
    return findings


async def _stack(stack: Endpoints | None) -> list[Finding]:
    from . import checks

    if stack is None:
        return []
    findings = [checks.ok("stack", f"runs on {stack.state} (pid {stack.pid})")]
    proxy, manager = stack.proxy, stack.manager
    for name, check in (
        ("disk", lambda: checks.disk(stack.state)),
        ("manager API", lambda: checks.service("manager API", proxy.manager_url)),
        ("storage proxy", lambda: checks.service("storage proxy", proxy.internal_url)),
        ("client API", lambda: checks.client_port(proxy.client_url)),
        ("manager extension", lambda: checks.service("manager extension", manager.url)),
        ("agent", lambda: checks.agent(stack.agent.socket)),
        ("redis", lambda: checks.redis(stack.redis_url.reveal())),
        ("databases", lambda: checks.databases(stack)),
    ):
        findings += await checks.guarded(name, check)
    return findings


async def _store(
    stack: Endpoints | None,
    url: str | None,
    access_key_file: Path | None,
    bucket: str | None,
    region: str,
    ca_file: Path | None,
) -> list[Finding]:
    from ..s3 import Endpoint
    from . import checks

    where: Endpoint
    credential: S3Credential
    if url is not None and access_key_file is not None:
        from ..config import VolumeOptions

        try:
            where = Endpoint(url, region, ca_file=ca_file)
            credential = VolumeOptions(minio_credential_file=access_key_file).credential()
        except MooringError as err:
            return [checks.failure("object store", err)]
    elif stack is not None:
        from ..core.wire import S3Credential as Credential

        where = Endpoint(stack.s3.url, stack.s3.region)
        credential = Credential(access_key=stack.s3.access_key, secret_key=stack.s3.secret_key)
        bucket = bucket or stack.s3.bucket
    else:
        return []

    async def run() -> list[Finding]:
        return [finding async for finding in checks.object_store(where, credential, bucket)]

    return await checks.guarded("object store", run)
