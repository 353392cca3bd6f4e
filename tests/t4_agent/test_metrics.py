"""What Prometheus sees, and that it is what the documents say."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from .node import Node, until_async

pytestmark = [pytest.mark.root, pytest.mark.asyncio]

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
_ROW = re.compile(r"^\| `(\w+)` \| (\w+) \|([^|]*)\|", flags=re.MULTILINE)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


async def scrape(node: Node) -> str:
    """By the socket of the agent."""
    connector = aiohttp.UnixConnector(str(node.socket))
    async with aiohttp.ClientSession(connector=connector) as http, http.get("http://agent/metrics") as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return await answer.text()


def samples(text: str) -> list[Sample]:
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def value(text: str, name: str, **labels: str) -> float:
    """The only sample of that name with these labels among its own."""
    (found,) = [
        sample.value for sample in samples(text) if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return float(found)


@pytest.mark.expects_log("mount process ended")
async def test_the_documents_name_every_metric(node: Node, folder: str) -> None:
    """Names, types and labels; after a repair, so that everything has happened that makes a series."""
    async with node.agent() as agent:
        await agent.attach(node.grant(node.request(folder, "data")))
        os.kill(node.processes()[0], signal.SIGKILL)

        async def repaired() -> bool:
            return value(await scrape(node), "mooring_agent_repair_seconds_count") == 1

        await until_async(repaired, "the repair is counted")
        labels_of: dict[str, set[str]] = {}
        types: dict[str, str] = {}
        for family in text_string_to_metric_families(await scrape(node)):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            if name.endswith("_created"):
                continue
            types[name] = family.type
            labels_of[name] = {label for sample in family.samples for label in sample.labels} - {"le"}
    told = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in _ROW.findall(DOCS.read_text())}
    assert {name: kind for name, (kind, _) in told.items()} == types
    # A series that has not happened yet shows no labels.
    for name, labels in labels_of.items():
        assert labels in (told[name][1], set()), name


async def test_mounts_and_their_processes(node: Node, folder: str) -> None:
    async with node.agent(max_mounts=400) as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        mount = {"key": spec.mount_key[:12], "volume": "minio", "driver": "s3fs"}

        async def measured() -> bool:
            return "mooring_agent_mount_pss_bytes{" in await scrape(node)

        await until_async(measured, "the process was measured", 30.0)
        text = await scrape(node)
        assert value(text, "mooring_agent_mounts", state="live") == 1
        assert value(text, "mooring_agent_mounts", state="dead") == 0
        assert value(text, "mooring_agent_attachments", volume="minio") == 1
        assert value(text, "mooring_agent_max_mounts") == 400
        assert value(text, "mooring_agent_mount_attachments", **mount) == 1
        assert 0 < value(text, "mooring_agent_mount_pss_bytes", **mount) < 2**30
        assert value(text, "mooring_agent_mount_threads", **mount) >= 1
        assert value(text, "mooring_agent_mount_seconds_count") == 1
        assert value(text, "mooring_agent_transitions_total", **{"from": "staging", "to": "live"}) == 1
        attaching = {"method": "POST", "route": "/v1/attachments", "status": "201"}
        assert value(text, "mooring_agent_request_seconds_count", **attaching) == 1
        await agent.detach_session(spec.session_id)
        text = await scrape(node)
        assert value(text, "mooring_agent_mounts", state="live") == 0
        assert mount["key"] not in text, "what is gone has no series"


@pytest.mark.semantics(5)
async def test_nothing_private_is_shown(node: Node, folder: str) -> None:
    async with node.agent() as agent:
        spec = await agent.attach(node.grant(node.request(folder, "data")))
        text = await scrape(node)
        for private in (
            node.credential.secret_key.reveal(),
            node.credential.access_key,
            spec.session_id,
            spec.mount_key,
            folder,
            str(node.place),
        ):
            assert private not in text


async def test_the_port_has_metrics_and_health_and_nothing_else(node: Node, folder: str) -> None:
    port = free_port()
    async with node.agent(metrics_port=port) as agent, aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:
        await agent.attach(node.grant(node.request(folder, "data")))
        for path in ("/metrics", "/livez", "/readyz"):
            async with http.get(path) as answer:
                assert answer.status == 200
        for path in ("/v1/status", "/v1/mounts", "/health", "/"):
            async with http.get(path) as answer:
                assert answer.status == 404
        async with http.post("/metrics") as answer:
            assert answer.status == 405
        listening = Path("/proc/net/tcp").read_text().splitlines()
        assert any(line.split()[1] == f"0100007F:{port:04X}" and line.split()[3] == "0A" for line in listening)


async def test_errors_of_the_report_to_redis_are_counted(node: Node) -> None:
    async with node.agent(redis={"url": f"redis://127.0.0.1:{free_port()}/0", "heartbeat": 0.1, "ttl": 5}):

        async def counted() -> bool:
            return value(await scrape(node), "mooring_agent_status_errors_total") > 0

        await until_async(counted, "the failed report is counted")
