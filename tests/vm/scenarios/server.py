"""The S3 server of the scenarios; its data, ports and keys are on the disk, so after a power cut it is the same one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from storage_proxy.core.secrets import Secret, write_private
from storage_proxy.core.wire import S3Credential
from storage_proxy.embedded.weed import WeedConfig, WeedIdentity, WeedPorts, WeedServer
from storage_proxy.s3 import Endpoint, S3Client
from tests.conftest import make_credential

from .host import PLACE, SLOWNESS

BUCKET = "scenarios"
FOLDERS = ("data/", "other/")


def admin() -> S3Credential:
    access, secret, _ = _known(PLACE / "s3.json")
    return S3Credential(access_key=access, secret_key=Secret(secret))


async def start() -> WeedServer:
    """SeaweedFS with a bucket that has two directories and a file in each."""
    PLACE.mkdir(mode=0o700, parents=True, exist_ok=True)
    _, _, ports = _known(PLACE / "s3.json")
    identity = WeedIdentity("admin", admin())
    server = WeedServer(
        WeedConfig(dir=PLACE / "weed", ports=ports, identities=(identity,), log_file=PLACE / "weed.log")
    )
    await server.start(deadline=60 * SLOWNESS)
    async with S3Client(Endpoint(server.endpoint_url), admin()) as s3:
        await s3.create_bucket(BUCKET)
        for prefix in FOLDERS:
            await s3.put(BUCKET, prefix, b"", content_type="application/x-directory")
            await s3.put(BUCKET, f"{prefix}hello.txt", f"hello from {prefix}".encode())
    return server


def _known(path: Path) -> tuple[str, str, WeedPorts]:
    if not path.exists():
        made = make_credential()
        known = {
            "access": made.access_key,
            "secret": made.secret_key.reveal(),
            "ports": asdict(WeedPorts.pick_free()),
        }
        write_private(path, json.dumps(known).encode())
    known = json.loads(path.read_text())
    return known["access"], known["secret"], WeedPorts(**known["ports"])
