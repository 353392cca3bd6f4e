"""The benchmarks run: small numbers, real parts, figures that can be. How good they are is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.t4_agent.node import skip_reason

from .commands import environment

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.root


@pytest.fixture(autouse=True)
def may_mount() -> None:
    if reason := skip_reason():
        pytest.skip(reason)


def bench(*words: str) -> Any:
    command = [sys.executable, "-m", "bench.mounts", "--quick", "--json", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_the_benchmark_of_mounts_without_containers() -> None:
    result = bench("--no-containers", "--only", "many,herd,churn")
    assert result["left_over"] == []
    many, herd, churn = result["many"], result["herd"], result["churn"]
    assert many["mounts"] == 10
    assert 0 < many["attach_ms"]["median"] <= many["attach_ms"]["worst"]
    assert many["left_over"] == {}
    assert [cost["mounts"] for cost in many["idle"]] == [0, 3, 10]
    assert many["idle"][-1]["processes"]["pss_mib"] > many["idle"][0]["processes"]["pss_mib"] == 0
    assert herd["sessions"] == 10
    assert herd["mounts_made"] == 1
    assert churn["failed"] == 0
    assert churn["mounts_made"] == 1
    assert churn["attachments_left"] == 0
