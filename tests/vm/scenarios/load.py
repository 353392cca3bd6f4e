"""What a power cut interrupts: `python -m tests.vm.scenarios.load` attaches and detaches until it is killed."""

from __future__ import annotations

import asyncio
import itertools
import json
import os

from tests.t4_agent.podman import Podman

from . import server
from .host import PLACE, SLOWNESS, Host, HostNode, running_host

# One line for each grant, on the disk before the next step.
ACKNOWLEDGED = PLACE / "acknowledged.jsonl"


async def main() -> None:
    weed = await server.start()
    node = HostNode(weed.endpoint_url, server.admin(), PLACE / "node")
    place = PLACE / "load"
    place.mkdir()
    async with running_host(node, Podman(place, seconds=60 * SLOWNESS), server.BUCKET) as host:
        await host.reader(await host.attach())
        with ACKNOWLEDGED.open("w") as log:
            for number in itertools.count():
                await _step(host, number, log.fileno())


async def _step(host: Host, number: int, log: int) -> None:
    request = host.node.request(host.folder, "other", credential_id=f"key-{number % 3}")
    grant = host.node.grant(request, f"load-{number}", lifetime=86_400.0)
    await host.agent.attach(grant)
    os.write(log, json.dumps({"grant": grant}).encode() + b"\n")
    os.fsync(log)
    if number >= 2:
        await host.agent.detach_session(f"load-{number - 2}")


if __name__ == "__main__":
    asyncio.run(main())
