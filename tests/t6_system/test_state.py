"""The state directory, the port plan and endpoints.json."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from storage_proxy.core.errors import (
    ConfigError,
    InsecureFileMode,
    InUse,
    NoSpace,
    PortTaken,
    ServiceUnavailable,
    UsageError,
)
from storage_proxy.core.secrets import MASK, Secret
from storage_proxy.embedded.endpoints import (
    AgentEndpoint,
    Endpoints,
    ManagerEndpoint,
    ProxyEndpoint,
    S3Endpoint,
    find_endpoints,
)
from storage_proxy.embedded.ports import HIGHEST_BASE, PortPlan
from storage_proxy.embedded.state import StateDirectory, check_free_space, default_state_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_directory_is_private_and_opening_it_again_keeps_its_secrets(tmp_path: Path) -> None:
    state = StateDirectory.open(tmp_path / "new" / "state")
    first = state.secret("example")
    assert mode(state.path) == 0o700
    assert {mode(item) for item in state.path.iterdir() if item.is_dir()} == {0o700}
    assert mode(state.secrets_dir / "example") == 0o600
    assert StateDirectory.open(state.path).secret("example") == first


def test_somebody_elses_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"not empty.*thesis\.tex"):
        StateDirectory.open(tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_of_another_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "MOORING-STATE").write_text("99\n")
    with pytest.raises(ConfigError, match="layout '99'"):
        StateDirectory.open(tmp_path)


def test_a_path_through_a_file_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written.*--state DIR"):
        StateDirectory.open(tmp_path / "file" / "state")


def test_little_free_space_is_refused() -> None:
    with pytest.raises(NoSpace, match=r"needs 1024\.0 PiB"):
        check_free_space(Path("/"), 1024**6, "a stack")


def test_one_stack_per_directory(tmp_path: Path) -> None:
    state = StateDirectory.open(tmp_path / "s")
    with state.lock(), pytest.raises(InUse, match=rf"pid {os.getpid()}.*--port-base"), state.lock():
        pass
    with state.lock():
        pass


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    state = StateDirectory.open(tmp_path / "s")
    code = (
        "import sys; from pathlib import Path; from storage_proxy.embedded.state import StateDirectory\n"
        f"with StateDirectory.open(Path({str(state.path)!r})).lock(): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InUse, match=f"pid {holder.pid}"), state.lock():
            pass
        holder.kill()
        holder.wait(10)
    with state.lock():
        pass


def test_where_the_state_is_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert default_state_path({"MOORING_STATE": "/x"}) == Path("/x")
    assert default_state_path({"XDG_STATE_HOME": "/home/u/state"}) == Path("/home/u/state/mooring")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_state_path({}) == Path("/var/lib/mooring")


def test_two_directories_have_two_short_runtime_directories(tmp_path: Path) -> None:
    one, two = StateDirectory.locate(tmp_path / "a"), StateDirectory.locate(tmp_path / ("b" * 200))
    assert one.runtime_dir != two.runtime_dir
    assert len(str(two.agent_runtime_dir / "agent.sock")) < 100


# --- ports ------------------------------------------------------------------------------------------------------------


def test_the_ports_of_a_plan_differ_and_match_the_documented_ones() -> None:
    plan = PortPlan(6020)
    ports = [port for port, _ in plan.listeners()]
    assert len(ports) == len(set(ports)) == 15
    assert (plan.client_api, plan.manager_api, plan.manager, plan.internal_api) == (6021, 6022, 6024, 16023)
    assert not set(ports) & {port for port, _ in PortPlan(6031).listeners()}


@pytest.mark.parametrize("base", [0, 80, HIGHEST_BASE + 1, 70000])
def test_a_base_out_of_range_is_refused(base: int) -> None:
    with pytest.raises(UsageError, match="out of range"):
        PortPlan(base)


def test_a_taken_port_is_named_with_its_purpose() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        base = port - 4 if port - 4 <= HIGHEST_BASE else port - 10003
        with pytest.raises(PortTaken, match=rf"127\.0\.0\.1:{port} for .*--port-base"):
            PortPlan(base).check()


# --- endpoints.json ---------------------------------------------------------------------------------------------------


def endpoints(state: StateDirectory, pid: int) -> Endpoints:
    return Endpoints(
        pid=pid,
        started_at=datetime.now(UTC),
        state=state.path,
        s3=S3Endpoint(
            url="http://127.0.0.1:1", bucket="mooring", access_key="a", secret_key=Secret("s3"), embedded=True
        ),
        redis_url=Secret("redis://:pw@127.0.0.1:2/0"),
        proxy=ProxyEndpoint(manager_url="http://a", client_url="http://b", internal_url="http://c", secret=Secret("p")),
        manager=ManagerEndpoint(url="http://d", token=Secret("t"), admin_token=Secret("u")),
        agent=AgentEndpoint(id="local", socket=state.agent_runtime_dir / "agent.sock"),
        volumes=["minio"],
        logs={"proxy": state.log_file("proxy")},
        user_id="0",
    )


def test_endpoints_are_private_and_come_back_whole(tmp_path: Path) -> None:
    state = StateDirectory.open(tmp_path / "s")
    written = endpoints(state, os.getpid())
    written.save(state.endpoints_file)
    assert mode(state.endpoints_file) == 0o600
    assert json.loads(state.endpoints_file.read_text())["s3"]["secret_key"] == "s3"
    assert find_endpoints(state.path) == written
    assert "pw" not in repr(written)
    assert MASK in repr(written)


def test_finding_endpoints_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ServiceUnavailable, match=r"No stack runs on .*mooring up --state"):
        find_endpoints(tmp_path / "none")
    state = StateDirectory.open(tmp_path / "s")
    with subprocess.Popen(["true"]) as gone:
        gone.wait(10)
    endpoints(state, gone.pid).save(state.endpoints_file)
    with pytest.raises(ServiceUnavailable, match="was killed"):
        find_endpoints(state.path)
    state.endpoints_file.chmod(0o644)
    with pytest.raises(InsecureFileMode):
        find_endpoints(state.path)
    state.endpoints_file.chmod(0o600)
    state.endpoints_file.write_text("{}")
    with pytest.raises(ConfigError, match="damaged"):
        find_endpoints(state.path)
