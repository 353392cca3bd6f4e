"""What can be known to fail is found before anything is started, and said in one sentence with its remedy."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
from pathlib import Path

from ..core.errors import DriverMissing, MountError, MountNotPermitted, ServiceUnavailable
from ..core.wire import S3Credential
from ..s3 import Endpoint, S3Client
from .process import child_environment

FUSE_DEVICE = Path("/dev/fuse")
FUSE_NUMBER = (10, 229)  # Documentation/admin-guide/devices.txt
S3_ATTEMPTS = 2
S3_DEADLINE_SECONDS = 6.0
TRIAL_DEADLINE_SECONDS = 5.0
DATABASE_DEADLINE_SECONDS = 5.0
PROBE_KEY = ".mooring/preflight"


async def check_mounting(trial_dir: Path, driver: str = "s3fs") -> None:
    """Raises `MountNotPermitted` or `DriverMissing` when this process could not mount a folder. Leaves nothing."""
    check_fuse_device()
    if shutil.which(driver) is None:
        raise DriverMissing(f"The mount driver {driver} is not installed.", hint=f"Run: apt-get install {driver}.")
    await _try_mount(trial_dir)


def check_fuse_device(device: Path = FUSE_DEVICE) -> None:
    """Raises `MountNotPermitted` unless the device is there and opens."""
    try:
        info = device.stat()
        if not stat.S_ISCHR(info.st_mode) or (os.major(info.st_rdev), os.minor(info.st_rdev)) != FUSE_NUMBER:
            raise MountNotPermitted(
                f"{device} is not the FUSE device, so no folder can be mounted.",
                hint="Load the fuse module (modprobe fuse), or give the container --device /dev/fuse.",
            )
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise MountNotPermitted(
            f"This machine has no {device}, so no folder can be mounted.",
            hint="Load the fuse module (modprobe fuse), or give the container --device /dev/fuse.",
        ) from None
    except OSError as err:
        raise MountNotPermitted(
            f"{device} cannot be opened ({err.strerror}), so no folder can be mounted.",
            hint="Run as root, or give the container --device /dev/fuse.",
        ) from None


async def _try_mount(trial_dir: Path) -> None:
    """A real mount, in a mount namespace of its own that ends with the trial."""
    argv = ["unshare", "--mount", "--propagation", "private", "mount", "-t", "tmpfs", "mooring-trial", str(trial_dir)]
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=child_environment(),
        )
    except OSError as err:
        raise MountError(
            f"The program {argv[0]} cannot be started ({err.strerror}).", hint="Run: apt-get install util-linux mount."
        ) from None
    try:
        async with asyncio.timeout(TRIAL_DEADLINE_SECONDS):
            _, words = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        reason = words.decode("utf-8", "replace").strip().splitlines()
        raise MountNotPermitted(
            f"This user may not mount file systems ({reason[-1][:160] if reason else 'refused'}).",
            hint="Run as root with CAP_SYS_ADMIN (in a container: --cap-add SYS_ADMIN --device /dev/fuse).",
        )


async def check_s3(endpoint: Endpoint, credential: S3Credential, bucket: str) -> None:
    """The operator's S3: it answers, knows the key, has the bucket, and lets the key write there.

    Raises `S3Unavailable`, `S3BadCredential`, `S3ClockSkew`, `S3AccessDenied` or `BucketNotFound`.
    """
    patient = Endpoint(
        endpoint.url,
        endpoint.region,
        endpoint.path_style,
        endpoint.ca_file,
        connect_timeout=3.0,
        attempts=S3_ATTEMPTS,
        deadline=S3_DEADLINE_SECONDS,
    )
    async with S3Client(patient, credential) as client:
        await client.head_bucket(bucket)
        key = f"{PROBE_KEY}-{os.getpid()}"
        await client.put(bucket, key, b"mooring")
        await client.delete(bucket, key)


async def check_database(url: str) -> None:
    """Raises `ServiceUnavailable` when the database does not answer, `ConfigError` for a URL that is none."""
    from ..db import Database  # SQLAlchemy takes a third of a second, and most stacks use SQLite

    database = Database(url)
    try:
        async with asyncio.timeout(DATABASE_DEADLINE_SECONDS):
            await database.check()
    except TimeoutError:
        raise ServiceUnavailable(
            f"The database did not answer within {DATABASE_DEADLINE_SECONDS:g} s.", hint="Check --database-url."
        ) from None
    finally:
        await database.close()
