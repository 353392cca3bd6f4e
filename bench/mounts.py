"""What the agent's mounts do under faults and under load, against s3fs by hand in the same run.

    sudo .venv/bin/python -m bench.mounts [--only crash,stop,...] [--quick] [--json]

Everything is real: an S3 server (the embedded SeaweedFS), `mooring agent serve` as a process of its own, s3fs, podman.
The peers are s3fs with the same options, started by hand or by a shell loop that unmounts and starts it again whenever
it ends. Ratios within one run mean something; absolute times depend on the machine, and on what else runs on it: the
load average of the last minute stands beside each figure.

    crash     kill -9 of the mount process under a container that reads 20 times per second
    stop      SIGSTOP of it
    many      hundreds of mounts: attach, detach, memory, idle CPU, container start
    herd      many sessions that attach one folder at the same instant
    churn     sessions that attach and detach one folder, by the clock
    restart   the agent itself ended and started again under containers that read
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from storage_proxy.core import logs

from . import faults, load, report
from .stand import Stand, machine, stand

Section = Callable[[Stand, argparse.Namespace], Awaitable[dict[str, Any]]]

SECTIONS: dict[str, Section] = {
    "crash": lambda made, args: faults.crash(made, args.crashes),
    "stop": lambda made, args: faults.stop(made, args.stops, args.patience),
    "many": lambda made, args: load.many(made, args.mounts, _stages(args.mounts), args.idle),
    "herd": lambda made, args: load.herd(made, args.sessions, args.rounds),
    "churn": lambda made, args: load.churn(made, args.rate, args.churn),
    "restart": lambda made, args: faults.restart(made, args.restarts),
}
QUICK = {
    "crashes": 2,
    "stops": 1,
    "patience": 5.0,
    "mounts": 10,
    "idle": 2.0,
    "sessions": 10,
    "rounds": 1,
    "rate": 20.0,
    "churn": 2.0,
    "restarts": 1,
}
CONTAINERS = {"crash", "stop", "many", "restart"}


def _stages(mounts: int) -> list[int]:
    return sorted({max(1, mounts // 3), mounts})


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--quick", action="store_true", help="small numbers: shows that it works, not how well")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--no-containers", action="store_true", help="leave out what needs podman")
    parser.add_argument("--crashes", type=int, default=10, help="per target")
    parser.add_argument("--stops", type=int, default=5)
    parser.add_argument("--patience", type=float, default=30.0, help="seconds that the stopped peer is watched")
    parser.add_argument("--mounts", type=int, default=300)
    parser.add_argument("--idle", type=float, default=30.0, help="seconds per measurement of the idle cost")
    parser.add_argument("--sessions", type=int, default=100, help="that attach at the same instant")
    parser.add_argument("--rounds", type=int, default=5, help="of such instants")
    parser.add_argument("--rate", type=float, default=50.0, help="attaches and detaches per second")
    parser.add_argument("--churn", type=float, default=60.0, help="seconds of it")
    parser.add_argument("--restarts", type=int, default=5, help="of the agent, each kind")
    args = parser.parse_args(arguments)
    if args.quick:
        vars(args).update(QUICK)
    args.sections = args.only.split(",")
    if unknown := set(args.sections) - SECTIONS.keys():
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    return args


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One result per section, and the machine."""
    containers = not args.no_containers
    sections = [name for name in args.sections if containers or name not in CONTAINERS or name == "many"]
    result: dict[str, Any] = {"machine": machine()}
    async with stand(max(4, args.mounts if "many" in sections else 0), containers=containers) as made:
        for name in sections:
            result[name] = await SECTIONS[name](made, args)
        result["left_over"] = sorted(made.node.residue())
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    logs.configure(component="bench", level="error")
    result = asyncio.run(measure(args))
    print(json.dumps(result, indent=1) if args.json else report.table(result))
    return 1 if result["left_over"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
