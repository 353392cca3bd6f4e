"""Upload and download of one big object: through the proxy, through presigned URLs, and straight to S3 with boto3.

    sudo .venv/bin/python -m bench.transfer [--size-mib 1024] [--reps 3] [--json]

Starts its own one-machine stack in a scratch directory. All ways move the same bytes between the same file and the same
server in the same run, in rotating order. Only the ratios to boto3's transfer manager (its default: 10 threads, 8 MiB
parts) mean anything: the server, the proxy and the client share the processor. The server's data are on disk; the file
that is sent and the one that is received are in memory (/dev/shm, if it has the room), because the disk's write-back
comes and goes by itself and would be most of what is measured. The proxy's memory is its highest resident size (VmHWM)
after the runs, which the kernel keeps, so no peak is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from storage_proxy.client.manager import ManagerClient
from storage_proxy.client.transfer import TransferClient

MIB = 1024 * 1024
GOALS = {"proxied": 0.8, "presigned": 1.0}


def place_for_files(size: int) -> str | None:
    """/dev/shm if the source and one target fit twice; None: the usual place for temporary files."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 4 * size else None


def make_file(path: Path, size: int) -> str:
    """A file of incompressible bytes; returns its sha256."""
    digest = hashlib.sha256()
    block = os.urandom(4 * MIB)
    with path.open("wb") as file:
        for number in range(0, size, len(block)):
            piece = number.to_bytes(8, "big") + block[8 : min(len(block), size - number)]
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def start_stack(state: Path, port_base: int) -> tuple[subprocess.Popen[bytes], dict[str, object]]:
    command = [
        sys.executable,
        "-m",
        "storage_proxy",
        "up",
        "--no-job",
        "--state",
        str(state),
        "--port-base",
        str(port_base),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    endpoints = state / "endpoints.json"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the stack did not start: {process.stderr.read().decode() if process.stderr else ''}")
        if endpoints.exists():
            return process, json.loads(endpoints.read_text())
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    raise SystemExit("the stack was not ready after 60 s")


def proxy_pid(state: Path) -> int:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                argv = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"proxy" in argv and b"serve" in argv and any(str(state).encode() in word for word in argv):
                return int(entry.name)
    raise SystemExit("the proxy's process was not found")


def high_water_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    os.sync()  # what earlier runs left to write must not be paid by this one
    start = time.perf_counter()
    await work()
    return time.perf_counter() - start


async def measure(
    args: argparse.Namespace, scratch: Path, endpoints: dict[str, dict[str, str]], pid: int
) -> dict[str, object]:
    size = args.size_mib * MIB
    source = scratch / "source"
    digest = make_file(source, size)
    s3 = endpoints["s3"]
    bucket = "bench-transfer"
    boto = boto3.client(
        "s3",
        endpoint_url=s3["url"],
        region_name=s3["region"],
        aws_access_key_id=s3["access_key"],
        aws_secret_access_key=s3["secret_key"],
        config=Config(s3={"addressing_style": "path"}, max_pool_connections=20),
    )
    boto.create_bucket(Bucket=bucket)
    managed = TransferConfig()
    samples: dict[str, list[float]] = {
        f"{way} {verb}": [] for verb in ("upload", "download") for way in ("boto3", *GOALS)
    }

    async with ManagerClient(endpoints["manager"]["url"], endpoints["manager"]["token"]) as manager:
        folder = await manager.create_folder("bench-transfer", volume=endpoints["volumes"][0])
        client = TransferClient(manager)

        async def upload(way: str) -> None:
            if way == "boto3":
                await asyncio.to_thread(boto.upload_file, str(source), bucket, "object", Config=managed)
            else:
                await client.upload_file(folder.id, f"{way}.bin", source, mode=way)

        async def download(way: str, target: Path) -> None:
            if way == "boto3":
                await asyncio.to_thread(boto.download_file, bucket, "object", str(target), Config=managed)
            else:
                await client.download_file(folder.id, f"{way}.bin", target, mode=way)

        ways = ["boto3", *GOALS]
        for repetition in range(args.reps):
            order = ways[repetition % 3 :] + ways[: repetition % 3]
            for way in order:
                samples[f"{way} upload"].append(await timed(lambda way=way: upload(way)))
            for way in order:
                target = scratch / f"{way}.out"
                samples[f"{way} download"].append(await timed(lambda way=way, target=target: download(way, target)))
                if sha256_of(target) != digest:
                    raise SystemExit(f"{way}: the downloaded bytes differ")
                target.unlink()

    median = {name: size / MIB / statistics.median(values) for name, values in samples.items()}
    pairs = {
        f"{way} {verb}": [b / a for a, b in zip(samples[f"{way} {verb}"], samples[f"boto3 {verb}"], strict=True)]
        for way in GOALS
        for verb in ("upload", "download")
    }
    return {
        "size_mib": args.size_mib,
        "reps": args.reps,
        "mib_per_s": {name: round(value, 1) for name, value in median.items()},
        "ratio_to_boto3": {name: round(statistics.median(values), 2) for name, values in pairs.items()},
        "ratio_spread": {name: [round(min(values), 2), round(max(values), 2)] for name, values in pairs.items()},
        "proxy_memory_mib": round(high_water_mib(pid), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--port-base", type=int, default=21020)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    prefix = "mooring-bench-"
    with (
        tempfile.TemporaryDirectory(prefix=prefix) as state_folder,
        tempfile.TemporaryDirectory(prefix=prefix, dir=place_for_files(args.size_mib * MIB)) as folder,
    ):
        state, scratch = Path(state_folder) / "state", Path(folder)
        process, endpoints = start_stack(state, args.port_base)
        try:
            result = asyncio.run(measure(args, scratch, endpoints, proxy_pid(state)))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    print(f"{args.size_mib} MiB, medians of {args.reps}")
    for name, value in result["mib_per_s"].items():
        ratio = result["ratio_to_boto3"].get(name)
        extra = "" if ratio is None else f"  {ratio:.2f} x boto3 (goal {GOALS[name.split()[0]]})"
        print(f"  {name:20} {value:8.1f} MiB/s{extra}")
    print(f"  proxy memory at its highest: {result['proxy_memory_mib']} MiB (goal: under 150)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
