"""`mooring up`: the one-machine stack in the foreground, and the job that proves it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import MooringError, UsageError
from .output import JsonOption, one_line, print_fields, print_json, print_table, say, warn

if TYPE_CHECKING:
    from ..core.secrets import Secret
    from ..embedded.job import JobResult
    from ..embedded.running import Ready, Report, Run
    from ..embedded.stack import OwnS3


def register(app: typer.Typer) -> None:
    app.command("up")(up)


async def up(
    state: Annotated[
        Path | None,
        typer.Option(
            "--state",
            envvar="MOORING_STATE",
            help="Where everything is kept. Default: /var/lib/mooring for root, else ~/.local/state/mooring.",
        ),
    ] = None,
    port_base: Annotated[int, typer.Option("--port-base", help="Ports are counted from here.")] = 6020,
    once: Annotated[bool, typer.Option("--once", help="Run the job, print the result, stop.")] = False,
    no_job: Annotated[bool, typer.Option("--no-job", help="Only start the stack.")] = False,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", help="Use this S3 server instead of the embedded one.")
    ] = None,
    access_key_file: Annotated[
        Path | None,
        typer.Option(
            "--access-key-file", help="Its keys: a 0600 file with JSON (access_key, secret_key) or two lines."
        ),
    ] = None,
    bucket: Annotated[str, typer.Option("--bucket", help="Its bucket for folders; it must exist.")] = "mooring",
    region: Annotated[str, typer.Option("--region", help="Its region name.")] = "us-east-1",
    ca_file: Annotated[
        Path | None, typer.Option("--ca-file", help="Certificates to trust for it instead of the system's.")
    ] = None,
    allow_plain_http: Annotated[
        bool, typer.Option("--allow-plain-http", help="Allow an http endpoint on another machine.")
    ] = False,
    redis_url: Annotated[
        str | None, typer.Option("--redis-url", help="Use this Redis; @FILE reads the URL from a 0600 file.")
    ] = None,
    database_url: Annotated[
        str | None,
        typer.Option("--database-url", help="Use this PostgreSQL, not SQLite; @FILE reads the URL from a 0600 file."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Start the one-machine stack: S3, Redis, storage proxy, manager extension, agent; then run the job on it.

    Stays in the foreground until Ctrl-C. With --once it ends after the job: 0 when every byte was right.
    """
    from ..embedded.ports import PortPlan
    from ..embedded.running import Run
    from ..embedded.stack import StackOptions

    own = _own_s3(endpoint, access_key_file, bucket, region, ca_file, allow_plain_http)
    options = StackOptions(
        s3=own,
        redis_url=_url("--redis-url", redis_url),
        database_url=_url("--database-url", database_url),
    )
    run = Run(state, PortPlan(port_base), options, once=once, with_job=not no_job)
    run.report = _json_report(once) if as_json else _text_report(run)
    stopped_by = await _until_signal(run)
    if once and run.result is not None:
        if as_json:
            print_json({**run.result.to_json(), "timings": run.timings, "stack": run.summary})
        else:
            _show_result(run.result, run.timings)
        if not run.result.ok and run.exit_code == 0:
            run.exit_code = 1
    elif as_json and (once or run.is_ready):
        _line({"event": "stopped", "timings": run.timings})
    if stopped_by and (once or not run.is_ready):
        raise typer.Exit(128 + stopped_by)
    raise typer.Exit(run.exit_code)


async def _until_signal(run: Run) -> int:
    """Runs; the first Ctrl-C, SIGTERM or SIGHUP stops the stack in order, further ones change nothing.

    Returns the signal's number, or 0.
    """
    import asyncio
    import signal

    received = 0
    task = asyncio.ensure_future(run.run())

    def stop(number: int) -> None:
        nonlocal received
        if not received:
            received = number
            task.cancel()

    loop = asyncio.get_running_loop()
    for item in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(item, stop, int(item))
    try:
        await task
    except asyncio.CancelledError:
        if not received:
            raise
    return received


def _own_s3(
    endpoint: str | None,
    access_key_file: Path | None,
    bucket: str,
    region: str,
    ca_file: Path | None,
    allow_plain_http: bool,
) -> OwnS3 | None:
    from ..config import VolumeOptions, refuse_plain_http
    from ..core.ids import parse_bucket_name
    from ..embedded.stack import OwnS3
    from ..s3 import Endpoint

    if endpoint is None:
        if access_key_file is not None:
            raise UsageError("--access-key-file needs --endpoint.", hint="Give the URL of your S3 server.")
        return None
    if access_key_file is None:
        raise UsageError("--endpoint needs --access-key-file.", hint="Give a 0600 file with the two keys.")
    where = Endpoint(endpoint, region, ca_file=ca_file)
    if not allow_plain_http:
        try:
            refuse_plain_http(endpoint)
        except ValueError:
            raise UsageError(
                f"{endpoint} sends keys and data in clear.", hint="Use https, or add --allow-plain-http."
            ) from None
    credential = VolumeOptions(minio_credential_file=access_key_file).credential()
    return OwnS3(where, credential, parse_bucket_name(bucket), allow_plain_http)


def _url(option: str, text: str | None) -> Secret | None:
    """A URL that may hold a password: better in a file than on a command line that `ps` shows."""
    from urllib.parse import urlsplit

    from ..core.secrets import Secret, read_secret

    if text is None:
        return None
    if text.startswith("@"):
        return read_secret(Path(text[1:]))
    try:
        has_password = urlsplit(text).password is not None
    except ValueError:
        raise UsageError(f"The URL of {option} does not parse.") from None
    if has_password:
        warn(f"the password in {option} is visible to other users in the process list; give {option} @FILE instead")
    return Secret(text)


# --- showing ----------------------------------------------------------------------------------------------------------


def _line(value: dict[str, Any]) -> None:  # Any: JSON
    sys.stdout.write(json.dumps(value, default=str) + "\n")
    sys.stdout.flush()


def _json_report(once: bool) -> Report:
    """With `--once` standard output holds the result object only; else one object a line, as things happen."""
    from ..embedded.running import Report

    if once:
        return Report()
    return Report(
        ready=lambda ready: _line({"event": "ready", "warnings": ready.warnings, "stack": ready.summary}),
        job=lambda result: _line({"event": "job", **result.to_json()}),
        job_failed=lambda err: _line({"event": "job", "ok": False, "error": err.to_problem()}),
    )


def _text_report(run: Run) -> Report:
    from ..embedded.running import Report

    def ready(what: Ready) -> None:
        _show_stack(what, serving=not run.once)
        for sentence in what.warnings:
            warn(sentence)
        if not run.once and not run.with_job:
            say("Running until Ctrl-C.")

    def job(result: JobResult) -> None:
        if not run.once:
            _show_result(result, result.timings)
            say("Running until Ctrl-C.")

    def failed(err: MooringError) -> None:
        sys.stderr.write(f"error: {one_line(str(err))}\n")
        say("The stack stays up so that you can look; Ctrl-C stops it.")

    def speak(sentence: str) -> None:
        say(f"{sentence} ...")

    return Report(say=speak, ready=ready, job=job, job_failed=failed)


def _show_stack(ready: Ready, *, serving: bool) -> None:
    print_table(
        ("part", "where", "pid", "log"),
        [(part.name, part.where, part.pid or "-", part.log_file or "-") for part in ready.parts],
    )
    state = ready.endpoints.state
    print_fields({"state": state, "endpoints": state / "endpoints.json", "up in": f"{ready.seconds:.1f} s"})
    if not serving:
        sys.stdout.write("\n")
        sys.stdout.flush()
        return
    sys.stdout.write("\nTry next, in another terminal:\n")
    from ..embedded.state import default_state_path

    where = "" if state == default_state_path({}) else f"MOORING_STATE={state} "
    for command in _NEXT if not ready.warnings else _NEXT[:2]:
        sys.stdout.write(f"  {where}{command}\n")
    sys.stdout.write("\n")
    sys.stdout.flush()


_NEXT = (
    "mooring folder create notes",
    "mooring folder put README.md notes:",
    "mooring session run --folder notes -- ls -l /home/work/notes",
)


def _show_result(result: JobResult, timings: dict[str, float]) -> None:
    from ..core.ids import ByteSize

    if not result.files_checked:
        done = "a folder was made and filled, a bucket directory bound"
        print_fields({"job": "not whole", "done": done, "session": f"skipped: {result.runtime_reason}"})
        return
    print_fields(
        {
            "job": "ok" if result.ok else "not ok",
            "files checked": f"{result.files_checked} ({ByteSize(result.bytes)}), "
            f"{result.sha256_mismatches} sha256 mismatches",
            "read-only folder": "refused every write" if result.write_refused_on_read_only else "took a write",
            "its key": result.read_only_credential,
            "files written": f"{result.written_files_verified} verified in S3",
            "session": f"{result.runtime} ({result.runtime_reason})",
            "left behind": "; ".join(result.residue) or "nothing",
            "took": f"{timings.get('total', timings.get('job', 0.0)):.1f} s",
        }
    )
    sys.stdout.flush()
