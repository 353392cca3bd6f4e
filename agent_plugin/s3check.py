"""The truth about a place in S3 before anything is mounted on it.

A mount driver finds out late and says little (s3fs exits with 0). One or two LIST requests with the same credential
tell a wrong secret from a missing bucket, a missing directory, a server that is down and a clock that is off, each as
its own error.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from storage_proxy.core.errors import FileNotFound, S3AccessDenied, S3Unavailable
from storage_proxy.core.wire import Location, S3Credential
from storage_proxy.s3 import Endpoint, S3Client

from .drivers import DriverInfo


async def check_place(
    location: Location,
    credential: S3Credential,
    driver: DriverInfo,
    *,
    deadline: float,
    ca_file: Path | None = None,
) -> None:
    """Returns if `credential` can list the place. Raises BucketNotFound, FileNotFound (no such prefix),
    S3BadCredential, S3AccessDenied, S3ClockSkew or S3Unavailable, within `deadline` seconds.
    """
    endpoint = Endpoint(
        location.endpoint,
        region=location.region,
        path_style=location.path_style,
        ca_file=ca_file,
        connect_timeout=min(3.0, deadline),
        read_timeout=deadline,
        max_connections=2,
        attempts=2,
        deadline=deadline,
    )
    try:
        async with asyncio.timeout(deadline), S3Client(endpoint, credential) as client:
            await _check(client, location, driver)
    except TimeoutError:
        raise S3Unavailable(
            f"{location.endpoint} did not answer within {deadline:g} s.",
            hint="Check that the S3 server runs and is reachable.",
        ) from None


async def _check(client: S3Client, location: Location, driver: DriverInfo) -> None:
    page = await client.list_page(location.bucket, location.prefix, max_keys=1)
    if location.prefix and not page.objects and not page.prefixes:
        raise FileNotFound(
            f"There is no directory {location.prefix!r} in bucket {location.bucket!r}.",
            hint="Upload a file into it first, or correct the prefix.",
            detail={"bucket": location.bucket, "prefix": location.prefix},
        )
    if location.prefix and driver.lists_bucket:
        try:
            await client.list_page(location.bucket, max_keys=1)
        except S3AccessDenied as err:
            raise S3AccessDenied(
                f"{driver.name} {driver.version} lists the whole bucket {location.bucket!r} when it starts, and this "
                f"credential may list {location.prefix!r} only.",
                hint="Install s3fs 1.92 or newer, or allow s3:ListBucket with an empty s3:prefix to this access key.",
                detail=err.detail,
            ) from None
