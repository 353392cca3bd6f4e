"""Every fault ends soon, with its own error, and leaves nothing."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from agent_plugin import host
from agent_plugin.config import AgentConfig
from storage_proxy.core.errors import (
    BucketNotFound,
    ConfigError,
    Conflict,
    DriverMissing,
    FileNotFound,
    InvalidRequest,
    MooringError,
    MountNotPermitted,
    S3AccessDenied,
    S3BadCredential,
    S3Unavailable,
    TokenExpired,
    Unsupported,
)
from storage_proxy.core.ids import AccessMode, BucketRef
from storage_proxy.core.secrets import Secret
from storage_proxy.core.wire import Location, S3Credential
from storage_proxy.s3.scoped import ScopedIssuer
from tests.conftest import S3Server

from .node import Node, new_session

# A refused attach is a warning in the agent's log.
pytestmark = [pytest.mark.root, pytest.mark.asyncio, pytest.mark.expects_log("'/v1/attachments'")]


@contextmanager
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


async def fails(
    node: Node, error: type[MooringError], match: str, bucket: str, prefix: str = "data", **changes: object
) -> None:
    """Attaching raises `error` within 15 s, twice (the grant is not used up), and nothing is left."""
    driver = changes.pop("driver", {})
    async with node.agent(driver=driver) as agent:
        grant = node.grant(node.request(bucket, prefix, **changes))
        for _ in range(2):
            begun = time.monotonic()
            with pytest.raises(error, match=match):
                await agent.attach(grant)
            assert time.monotonic() - begun < 15.0
            assert await agent.mounts() == []
            assert await agent.attachments() == []
            assert node.residue() == {}


@pytest.mark.semantics(10)
async def test_wrong_secret(node: Node, folder: str) -> None:
    bad = S3Credential(access_key=node.credential.access_key, secret_key=Secret("wrong-secret"))
    await fails(node, S3BadCredential, "does not accept this credential", folder, credential=bad)


@pytest.mark.semantics(10)
async def test_missing_bucket(node: Node) -> None:
    await fails(node, BucketNotFound, "does not exist", "no-such-bucket")


async def test_missing_directory(node: Node, folder: str) -> None:
    await fails(node, FileNotFound, "no directory 'none/'", folder, "none")


@pytest.mark.expects_log("stamina.retry_scheduled")
@pytest.mark.semantics(10)
async def test_server_down(node: Node, folder: str) -> None:
    await fails(node, S3Unavailable, "cannot connect", folder, endpoint=closed_port())


@pytest.mark.expects_log("stamina.retry_scheduled")
async def test_server_silent(node: Node, folder: str) -> None:
    with silent_server() as url:
        async with node.agent(mount_deadline=2.0) as agent:
            with pytest.raises(S3Unavailable, match="did not answer"):
                await agent.attach(node.grant(node.request(folder, "data", endpoint=url)))
            assert node.residue() == {}


async def test_forbidden_bucket(node: Node, folder: str, s3_server: S3Server) -> None:
    await fails(node, S3AccessDenied, "access denied", folder, credential=s3_server.limited)


async def test_driver_not_installed(node: Node, folder: str) -> None:
    await fails(node, DriverMissing, "not installed", folder, driver={"s3fs": {"program": "s3fs-is-not-here"}})


async def test_program_that_is_not_s3fs(node: Node, folder: str) -> None:
    await fails(node, DriverMissing, "not s3fs", folder, driver={"s3fs": {"program": "true"}})


async def test_program_that_ends_at_once(node: Node, folder: str) -> None:
    program = node.place / "s3fs"
    program.write_text("#!/bin/sh\n[ $1 = --version ] && echo V1.90 && exit\necho out of luck >&2\nexit 0\n")
    program.chmod(0o700)
    async with node.agent(driver={"s3fs": {"program": str(program)}}) as agent:
        with pytest.raises(MooringError, match="out of luck"):
            await agent.attach(node.grant(node.request(folder, "data")))
        assert node.residue() == {}


@pytest.mark.semantics(10)
async def test_program_that_never_mounts(node: Node, folder: str) -> None:
    program = node.place / "s3fs"
    program.write_text("#!/bin/sh\n[ $1 = --version ] && echo V1.90 && exit\ntrap '' TERM\nexec sleep 60\n")
    program.chmod(0o700)
    async with node.agent(driver={"s3fs": {"program": str(program)}}, mount_deadline=1.0) as agent:
        begun = time.monotonic()
        with pytest.raises(MooringError, match=r"not ready within 1 s"):
            await agent.attach(node.grant(node.request(folder, "data")))
        assert time.monotonic() - begun < 15.0
        assert node.residue() == {}


async def test_twenty_share_one_failure(node: Node, folder: str) -> None:
    """They wait for the same start and get its error; twenty starts one after another would take twenty deadlines."""
    with silent_server() as url:
        async with node.agent(mount_deadline=1.0) as agent:
            request = node.request(folder, "data", endpoint=url)
            begun = time.monotonic()
            results = await asyncio.gather(
                *(agent.attach(node.grant(request)) for _ in range(20)), return_exceptions=True
            )
            assert time.monotonic() - begun < 5.0
            assert all(isinstance(result, S3Unavailable) for result in results)
            assert node.residue() == {}


async def test_temporary_credentials_are_refused(node: Node, folder: str) -> None:
    temporary = node.credential.model_copy(update={"session_token": Secret("token")})
    await fails(node, Unsupported, "temporary credentials", folder, credential=temporary)


async def test_a_key_that_would_break_the_key_file(node: Node, folder: str) -> None:
    bad = S3Credential(access_key="KEY", secret_key=Secret("one\nAWSSecretKey=two"))
    await fails(node, Unsupported, "white space", folder, credential=bad)


@pytest.mark.parametrize("endpoint", ["http://h,allow_root:1", "http://h/path,nonempty", "file:///etc", "http://u:p@h"])
async def test_an_endpoint_that_is_more_than_a_url(node: Node, folder: str, endpoint: str) -> None:
    await fails(node, InvalidRequest, "not the URL", folder, endpoint=endpoint)


async def test_a_region_that_is_more_than_a_name(node: Node, folder: str) -> None:
    location = Location(endpoint=node.endpoint, bucket=folder, region="us,nonempty")
    await fails(node, InvalidRequest, "not a region", folder, location=location)


async def test_credential_limited_to_the_folder(node: Node, folder: str, s3_server: S3Server) -> None:
    """What the proxy issues for a managed folder: mounts here, whatever s3fs asks at start."""
    async with ScopedIssuer(s3_server.endpoint, s3_server.admin) as issuer:
        made = await issuer.issue(BucketRef(folder, "data/"), AccessMode.READ_WRITE, timedelta(hours=1), "t4")
        try:
            async with node.agent() as agent:
                spec = await agent.attach(
                    node.grant(node.request(folder, "data", credential=made.credential, credential_id="scoped"))
                )
                place = Path(spec.source)
                (place / "new.txt").write_text("scoped")
                assert sorted(path.name for path in place.iterdir()) == ["hello.txt", "new.txt"]
                with pytest.raises(MooringError, match=r"access denied|may list"):
                    await agent.attach(
                        node.grant(node.request(folder, "other", credential=made.credential, credential_id="scoped"))
                    )
        finally:
            if made.revoke_ref is not None:
                await issuer.revoke(made.revoke_ref)


async def test_an_expired_grant_credential(node: Node, folder: str) -> None:
    from datetime import UTC, datetime

    old = node.credential.model_copy(update={"expires_at": datetime.now(UTC) - timedelta(minutes=1)})
    await fails(node, TokenExpired, "expired", folder, credential=old)


# --- the host ---------------------------------------------------------------------------------------------------------


async def test_no_fuse_device(tmp_path: Path) -> None:
    with pytest.raises(MountNotPermitted, match="There is no"):
        host.check_fuse(tmp_path / "fuse")
    (tmp_path / "file").touch()
    with pytest.raises(MountNotPermitted):
        host.check_fuse(tmp_path / "file")


async def test_no_right_to_mount(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tx\nCapEff:\t0000000000000400\n")
    with pytest.raises(MountNotPermitted, match="CAP_SYS_ADMIN"):
        host.check_capability(status)


async def test_two_agents_of_one_place(node: Node) -> None:
    async with node.agent():
        with pytest.raises(Conflict, match="Another agent"):
            async with node.agent():
                pass
        assert node.socket.exists()


async def test_a_runtime_directory_with_other_things(node: Node) -> None:
    node.runtime.mkdir()
    (node.runtime / "somebody").touch()
    with pytest.raises(ConfigError, match="not empty"):
        async with node.agent():
            pass


async def test_a_socket_path_that_is_too_long() -> None:
    from pydantic import ValidationError

    with pytest.raises(ValidationError, match="107"):
        AgentConfig.model_validate(
            {"agent": {"id": "a", "runtime-dir": "/run/" + "x" * 110}, "grants": {"public-key-files": ["/k"]}}
        )


async def test_a_damaged_journal(node: Node) -> None:
    (node.place / "state" / "journal.sqlite").write_bytes(b"not a database" * 1000)
    with pytest.raises(ConfigError, match="damaged"):
        async with node.agent():
            pass
    assert not node.mounts()


async def test_stopping_takes_everything_down(node: Node, folder: str) -> None:
    async with node.agent(grace_period=60.0) as agent:
        await agent.attach(node.grant(node.request(folder, "data"), new_session()))
        gone = await agent.attach(node.grant(node.request(folder, "other"), new_session()))
        await agent.detach_session(gone.session_id)
    assert node.residue() == {}
    assert not node.runtime.exists()
