"""The single checks of `mooring doctor`: each answers with findings and never raises for what it looks for.

Mounts are looked at in the kernel's tables only: a call into a dead mount may never return.
"""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import DriverMissing, MooringError, MountError, ServiceUnavailable, Unsupported

if TYPE_CHECKING:
    from ..core.wire import S3Credential
    from ..embedded.endpoints import Endpoints
    from ..s3 import Endpoint
    from ..s3.probe import Capabilities

CHECK_SECONDS = 15.0
PROGRAM_SECONDS = 5.0
MIN_OPEN_FILES = 4096
CAP_SYS_ADMIN = 21
MAX_SKEW_SECONDS = 900
WARN_SKEW_SECONDS = 60
TESTED_S3FS = (1, 90)
OUR_MOUNTS = ("fuse.s3fs", "fuse.mooring")


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table. `remedy` says what to do about a warning or failure."""

    check: str
    status: Status
    message: str
    remedy: str = ""
    exit_code: int = 1

    def to_json(self) -> dict[str, object]:
        found = asdict(self)
        found.pop("exit_code")
        return found


def ok(check: str, message: str) -> Finding:
    return Finding(check, Status.OK, message)


def warning(check: str, message: str, remedy: str) -> Finding:
    return Finding(check, Status.WARN, message, remedy)


def failure(check: str, err: BaseException) -> Finding:
    """What an error of the tree says; anything else is a bug of the check and said as such."""
    if isinstance(err, MooringError):
        return Finding(check, Status.FAIL, err.message, err.hint or "", err.exit_code)
    if isinstance(err, TimeoutError):
        return Finding(check, Status.FAIL, f"No answer within {CHECK_SECONDS:g} s.", "Look into its log.", 9)
    return Finding(check, Status.FAIL, f"The check itself failed: {type(err).__name__}: {err}", "Please report it.")


async def guarded(check: str, action: Callable[[], Awaitable[list[Finding]]]) -> list[Finding]:
    """Runs one check with a deadline; whatever it raises becomes a failed finding."""
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            return await action()
    except Exception as err:
        return [failure(check, err)]


# --- this machine -----------------------------------------------------------------------------------------------------


async def fuse() -> list[Finding]:
    from ..embedded.preflight import check_fuse_device

    check_fuse_device()
    found = [ok("fuse device", "/dev/fuse opens")]
    helper = shutil.which("fusermount3") or shutil.which("fusermount")
    if helper:
        found.append(ok("fusermount", helper))
    elif os.geteuid() == 0:
        found.append(
            warning("fusermount", "neither fusermount3 nor fusermount is installed", "Run: apt-get install fuse3")
        )
    else:
        err = DriverMissing("Only root can mount without fusermount3.", hint="Run: apt-get install fuse3")
        found.append(failure("fusermount", err))
    return found


async def s3fs() -> list[Finding]:
    path = shutil.which("s3fs")
    if path is None:
        raise DriverMissing("The mount driver s3fs is not installed.", hint="Run: apt-get install s3fs")
    words = (await _output("s3fs", "--version")).split("\n", 1)[0]
    numbers = "".join(char if char.isdigit() or char == "." else " " for char in words.rpartition("V")[2]).split()
    version = tuple(int(part) for part in numbers[0].split(".") if part) if numbers else ()
    if version < TESTED_S3FS:
        return [warning("s3fs", f"{path}: {words or 'no version'}", "Versions from 1.90 on are tested.")]
    return [ok("s3fs", f"{path}, version {'.'.join(map(str, version))}")]


async def mount_right() -> list[Finding]:
    """A real trial in a mount namespace of its own."""
    import tempfile

    from ..embedded.preflight import _try_mount as try_mount

    with tempfile.TemporaryDirectory(prefix="mooring-doctor-") as place:
        await try_mount(Path(place))
    return [ok("right to mount", f"uid {os.geteuid()} may mount file systems")]


async def open_files() -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < MIN_OPEN_FILES:
        remedy = f"Raise it: ulimit -n {MIN_OPEN_FILES}, or LimitNOFILE= in the systemd unit."
        return [warning("open files", f"only {soft} are allowed (hard limit {hard})", remedy)]
    return [ok("open files", f"{soft} are allowed")]


async def containers() -> list[Finding]:
    if shutil.which("podman") is None:
        return [
            warning("podman", "not installed; sessions run in a mount namespace", "Run: apt-get install podman runc")
        ]
    version = (await _output("podman", "--version")).strip().rpartition(" ")[2]
    drivers = [name for name in ("crun", "runc") if shutil.which(name)]
    if not drivers:
        return [warning("podman", f"{version}, but neither crun nor runc is installed", "Run: apt-get install runc")]
    return [ok("podman", f"{version} with {' and '.join(drivers)}")]


async def mounts(known: dict[str, list[str]] | None = None) -> list[Finding]:
    """FUSE mounts of ours and of s3fs: does a process still serve each? What is covered by another does not count: a
    repaired mount lies on its dead predecessor as long as a session holds it."""
    from ..embedded.residue import mounts_below

    servers = await asyncio.to_thread(fuse_servers)
    found = []
    seen = {mount.path: mount for mount in mounts_below(Path("/"))}  # of several at a path the last one
    ours = [mount for mount in seen.values() if mount.is_fuse and mount.fs_type in ("fuse.s3fs", "fuse.mooring")]
    for device in dict.fromkeys(mount.device for mount in ours):
        paths = [mount.path for mount in ours if mount.device == device]
        minor = int(device.partition(":")[2])
        if servers is None:
            found.append(warning("mounts", f"{paths[0]}: unknown whether it is served", "Run doctor as root."))
        elif minor not in servers:
            err = MountError(
                f"{paths[0]} is dead: no process serves it ({len(paths)} mount points).",
                hint=f"An agent's mount it repairs itself (mooring mounts ls); else run: umount --lazy {paths[0]}",
            )
            found.append(failure("mounts", err))
    if not found:
        count = len({mount.device for mount in ours})
        found.append(ok("mounts", f"{count} S3 mounts, each served by a process" if count else "no S3 mounts"))
    return found


def fuse_servers() -> dict[int, int] | None:
    """Minor number of each FUSE connection -> pid of a process that serves it; None if that cannot be known here.

    The kernel says it in fdinfo of /dev/fuse since Linux 6.10; older ones do not, then None.
    """
    served: dict[int, int] = {}
    hidden = silent = 0
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        folder = Path("/proc") / entry
        try:
            names = os.listdir(folder / "fd")
        except PermissionError:
            hidden += 1
            continue
        except OSError:
            continue
        for name in names:
            try:
                if os.readlink(folder / "fd" / name) != "/dev/fuse":  # noqa: PTH115  # many calls: Path is slow here
                    continue
                text = (folder / "fdinfo" / name).read_text(encoding="ascii", errors="replace")
            except OSError:
                continue
            line = next((line for line in text.splitlines() if line.startswith("fuse_connection:")), None)
            if line is None:
                silent += 1
            else:
                served[int(line.split(":")[1])] = int(entry)
    return None if silent or (hidden and os.geteuid() != 0) else served


async def _output(*argv: str) -> str:
    """Standard output of a small program; empty if it fails or takes too long."""
    from ..embedded.process import child_environment

    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=child_environment(),
    )
    try:
        async with asyncio.timeout(PROGRAM_SECONDS):
            words, _ = await process.communicate()
    except TimeoutError:
        return ""
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return words.decode("utf-8", "replace")


# --- the object store -------------------------------------------------------------------------------------------------


async def object_store(endpoint: Endpoint, credential: S3Credential, bucket: str | None) -> AsyncIterator[Finding]:
    """Reachable, key known, clock right, bucket there, and what the server can do."""
    from ..s3 import S3Client
    from ..s3.probe import probe

    try:
        async with S3Client(endpoint, credential) as client:
            if bucket is None:
                names = await client.list_buckets()
                yield ok("object store", f"{endpoint.url} answers; the key sees {len(names)} buckets")
                yield warning(
                    "capabilities", "not probed", "Add --bucket NAME (an object is written and removed there)."
                )
                return
            await client.head_bucket(bucket)
            yield ok("object store", f"{endpoint.url} answers; bucket {bucket} is there")
            found = await probe(client, bucket)
    except MooringError as err:
        yield failure("object store", err)
        return
    for finding in describe_capabilities(found):
        yield finding


def describe_capabilities(found: Capabilities) -> list[Finding]:
    """Clock, the core profile that a volume needs, and the extras."""
    from dataclasses import fields

    from ..s3.probe import CORE

    findings = []
    seconds = abs(found.clock_skew)
    if seconds > WARN_SKEW_SECONDS:
        remedy = f"Set the clock (NTP): from {MAX_SKEW_SECONDS // 60} minutes on every request is refused."
        findings.append(warning("clock", f"differs by {seconds:.0f} s from the object store's", remedy))
    else:
        findings.append(ok("clock", f"within {max(1, round(seconds))} s of the object store's"))
    if found.missing_core:
        reasons = "; ".join(f"{name}: {found.notes.get(name, 'does not work')}" for name in found.missing_core)
        err = Unsupported(f"The object store lacks what a volume needs: {reasons}", hint="Use another server.")
        findings.append(failure("core profile", err))
    else:
        findings.append(ok("core profile", ", ".join(CORE).replace("_", "-")))
    extras = [item.name for item in fields(found) if item.type == "bool" and item.name not in CORE]
    have = [name.replace("_", "-") for name in extras if getattr(found, name)]
    lack = [name.replace("_", "-") for name in extras if not getattr(found, name)]
    findings.append(ok("extras", ", ".join(have) or "none"))
    if lack:
        findings.append(ok("not offered", f"{', '.join(lack)} (done without)"))
    if left := found.notes.get("clean"):
        findings.append(warning("probe", left, "Remove it by hand."))
    return findings


# --- the running stack ------------------------------------------------------------------------------------------------


async def service(name: str, url: str) -> list[Finding]:
    """GET /readyz of a listener."""
    from ..client.http import HttpService

    async with HttpService(url, service=name, remedy="Look into its log.", timeout=CHECK_SECONDS / 2) as client:
        await client.call("GET", "/readyz")
    return [ok(name, f"ready at {url}")]


async def client_port(url: str) -> list[Finding]:
    from ..client.http import HttpService

    async with HttpService(url, service="client API", remedy="Look into the log of the storage proxy.") as client:
        await client.call("GET", "/", timeout=CHECK_SECONDS / 2)
    return [ok("client API", f"answers at {url}")]


async def agent(socket: Path) -> list[Finding]:
    from ..client.agent import AgentClient

    async with AgentClient(socket, timeout=CHECK_SECONDS / 2) as client:
        status = await client.status()
        listed = await client.mounts()
    found = [ok("agent", f"{status.agent_id}: {status.mounts} mounts, {status.attachments} attachments")]
    found += [warning("agent", text, "See `mooring mounts ls`.") for text in status.warnings]
    for mount in listed:
        if mount.state.value in ("dead", "failed"):
            what = f"{mount.bucket}/{mount.prefix} is {mount.state.value}: {mount.last_error or 'no reason known'}"
            found.append(warning("agent", what, "The agent repairs it while a session holds it; look into its log."))
    return found


async def redis(url: str) -> list[Finding]:
    from redis.asyncio import Redis
    from redis.exceptions import RedisError

    client = Redis.from_url(url, socket_timeout=3, socket_connect_timeout=3)
    try:
        info = await client.info("server")
    except (RedisError, OSError) as err:
        raise ServiceUnavailable(
            f"Redis does not answer ({type(err).__name__}).", hint="Check that it runs; no data is lost without it."
        ) from None
    finally:
        await client.aclose()
    return [ok("redis", f"version {info['redis_version']}")]


async def disk(path: Path) -> list[Finding]:
    from ..core.ids import ByteSize
    from ..embedded.state import MIN_FREE_BYTES, check_free_space

    free = check_free_space(path, MIN_FREE_BYTES, "a stack")
    if free < 10 * MIN_FREE_BYTES:
        return [warning("disk", f"{ByteSize(free)} free at {path}", "Free space there.")]
    return [ok("disk", f"{ByteSize(free)} free at {path}")]


async def databases(endpoints: Endpoints) -> list[Finding]:
    """Each package's tables stand at the newest revision that its code knows."""
    from importlib.metadata import entry_points

    import tomlkit

    from ..db import Database
    from ..db.migrate import current_revision, head_revision

    found = []
    for point in sorted(entry_points(group="mooring.migrations")):
        config = endpoints.state / "config" / f"{point.name}.toml"
        check = f"database of the {point.name}"
        try:
            url = str(tomlkit.parse(config.read_text(encoding="utf-8")).unwrap()["database"]["url"])
            tables = point.load()
            database = Database(url)
            try:
                current = await current_revision(database.engine, tables.VERSION_TABLE)
            finally:
                await database.close()
            newest = head_revision(tables.MIGRATIONS)
        except OSError as err:
            found.append(warning(check, f"{config} cannot be read ({err.strerror})", "Run doctor as the stack's user."))
            continue
        if current == newest:
            found.append(ok(check, f"at revision {current}"))
        else:
            found.append(
                warning(check, f"at revision {current}, the newest is {newest}", "Restart it: it migrates at start.")
            )
    return found
