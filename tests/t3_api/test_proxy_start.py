"""Starting the proxy: settings, both databases, health, and failures that are loud and quick."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection

from storage_proxy.config import ProxyConfig, VolumeOptions
from storage_proxy.core.config import load_config
from storage_proxy.core.crypto import SealingKey
from storage_proxy.core.errors import (
    BucketNotFound,
    ConfigError,
    InsecureFileMode,
    MooringError,
    S3BadCredential,
    S3Unavailable,
)
from storage_proxy.core.secrets import MASK
from storage_proxy.core.wire import S3Credential
from storage_proxy.db import Database
from storage_proxy.main import open_proxy
from storage_proxy.s3 import S3Client
from storage_proxy.state import Base, upgrade_state
from storage_proxy.state.tables import VERSION_TABLE
from tests.conftest import S3Server, delete_bucket

from .proxy_stand import ProxyStand, proxy_config, running

HEAD = """
[storage-proxy]
secret = "a-secret-of-at-least-32-bytes-000000"
[manager-api]
secrets = ["manager-secret"]
"""
PROPOSAL = """
[volume.minio]
backend = "minio"
endpoint = "https://minio.example.com"

[volume.minio.options]
minio-access-key = "your-access-key"
minio-secret-key = "your-secret-key"
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_the_proposals_volume_works_word_for_word(tmp_path: Path) -> None:
    config = load_config(ProxyConfig, write(tmp_path / "proxy.toml", HEAD + PROPOSAL), environ={})
    volume = config.volume["minio"]
    assert (volume.endpoint, volume.bucket, volume.path_style) == ("https://minio.example.com", "mooring", True)
    credential = volume.options.credential({})
    assert (credential.access_key, credential.secret_key.reveal()) == ("your-access-key", "your-secret-key")
    assert "your-secret-key" not in repr(config) + config.model_dump_json()
    assert config.client_api.url() == "http://127.0.0.1:6021"
    (tmp_path / "proxy.toml").chmod(0o644)
    with pytest.raises(InsecureFileMode):
        load_config(ProxyConfig, tmp_path / "proxy.toml", environ={})


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("https://minio", "http://minio", "https"),
        ("https://minio", "ftp://minio", "https"),
        ("https://minio", "https://user:pass@minio", "user"),
        ('"minio"', '"nfs"', "minio"),
        ("volume.minio", 'volume."../x"', "volume"),
        ("volume.minio", "volume.noop", "noop"),
        ("minio-secret-key", "minio-secret", "unknown key"),
        ('minio-access-key = "your-access-key"\n', "", "access key"),
        ("a-secret-of-at-least-32-bytes-000000", "", "secret"),
        ('secrets = ["manager-secret"]', "", "secret"),
        ('endpoint = "https', 'bucket = "Bad_Name"\nendpoint = "https', "bucket"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, old: str, new: str, word: str) -> None:
    text = (HEAD + PROPOSAL).replace(old, new)
    with pytest.raises(ConfigError, match=word):
        load_config(ProxyConfig, write(tmp_path / "proxy.toml", text), environ={})


def test_credentials_from_files_and_environment(tmp_path: Path) -> None:
    secret = write(tmp_path / "secret", "from-file\n")
    both = write(tmp_path / "both", "key\nfrom-two-lines\n")
    as_json = write(tmp_path / "json", '{"access_key": "key", "secret_key": "from-json"}')
    options: list[tuple[dict[str, Any], str]] = [
        ({"minio-access-key": "key", "minio-secret-key-file": secret}, "from-file"),
        ({"minio-access-key-env": "A", "minio-secret-key-env": "S"}, "from-environment"),
        ({"minio-credential-file": both}, "from-two-lines"),
        ({"minio-credential-file": as_json}, "from-json"),
    ]
    for data, expected in options:
        credential = VolumeOptions.model_validate(data).credential({"A": "key", "S": "from-environment"})
        assert (credential.access_key, credential.secret_key.reveal()) == ("key", expected)
    for data in ({"minio-access-key-env": "NOT_SET", "minio-secret-key-env": "S"}, {"minio-credential-file": secret}):
        with pytest.raises(ConfigError):
            VolumeOptions.model_validate(data).credential({"S": "x"})
    with pytest.raises(ValueError, match="minio-access-key"):
        VolumeOptions.model_validate({"minio-access-key": "a", "minio-credential-file": both})


# --- the databases ----------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_the_migrations_make_the_tables_of_the_models(any_database_url: str) -> None:
    database = Database(any_database_url)
    try:
        await asyncio.gather(upgrade_state(database), upgrade_state(database))
        await upgrade_state(database)

        def differences(connection: Connection) -> list[Any]:
            context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
            return list(compare_metadata(context, Base.metadata))

        async with database.engine.connect() as connection:
            assert await connection.run_sync(differences) == []
    finally:
        await database.close()


@pytest.mark.asyncio
async def test_a_whole_round_on_each_database(
    any_database_url: str, s3_server: S3Server, s3: S3Client, bucket: str, tmp_path: Path
) -> None:
    config, secrets = proxy_config(
        tmp_path / "proxy",
        endpoint=s3_server.endpoint.url,
        bucket=bucket,
        credential=s3_server.admin,
        database_url=any_database_url,
    )
    await s3.put(s3_server.limited_bucket, "round/x", b"bound")
    async with running(config, secrets, s3, bucket) as stand:
        vfid, data = await stand.folder(), os.urandom(9 * 1024 * 1024)
        token = await stand.upload_token(vfid, "f", len(data))
        assert (await stand.patch(token, 0, data[:1000])).status == 204
        bound = await stand.bind(s3_server.limited_bucket, s3_server.limited, "round", read_only=True)
    async with running(config, secrets, s3, bucket) as stand:  # and after a restart
        assert (await stand.patch(token, 1000, data[1000:])).status == 204
        assert await stand.get(vfid, "f") == data
        assert await stand.get(bound, "x") == b"bound"
        again = {"volume": "minio", "vfid": bound}
        assert (await stand.call("POST", "/folder/create", again)).status == 409


@pytest.mark.asyncio
async def test_a_restart_frees_the_uploads_of_its_former_life(
    s3_server: S3Server, s3: S3Client, bucket: str, tmp_path: Path
) -> None:
    config, secrets = proxy_config(
        tmp_path / "proxy", endpoint=s3_server.endpoint.url, bucket=bucket, credential=s3_server.admin
    )
    part, data = 8 * 1024 * 1024, os.urandom(17 * 1024 * 1024)
    async with running(config, secrets, s3, bucket) as stand:
        token = await stand.upload_token(await stand.folder(), "f", len(data))
        assert (await stand.patch(token, 0, data[:part])).status == 204
        later = datetime.now(UTC) + timedelta(minutes=1)
        own = hashlib.sha256(config.storage_proxy.node_id.encode()).hexdigest()[:8]
        await stand.change_uploads(offset=0, lease=own + "0" * 24, lease_until=later)  # killed in the next request
        assert (await stand.patch(token, 0, data)).status == 409
    async with running(config, secrets, s3, bucket) as stand:
        assert (await stand.client("HEAD", "/upload", token)).headers["Upload-Offset"] == str(part)
        assert (await stand.patch(token, part, data[part:])).status == 204


# --- health and failures ----------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_health_and_metrics(stand: ProxyStand) -> None:
    vfid = await stand.folder()
    await stand.put(vfid, "f", b"12345")
    await stand.get(vfid, "f")
    for path in ("/livez", "/readyz", "/health"):
        async with stand.http.get(stand.internal_url + path) as answer:
            assert answer.status == 200
            body = await answer.json()
    checks = {item["component_id"]: item["is_healthy"] for item in body["connectivity"]["connectivity_checks"]}
    assert checks == {"sql": True, "minio": True}
    async with stand.http.get(stand.internal_url + "/metrics") as answer:
        text = await answer.text()
    assert "mooring_proxy_received_bytes_total 5.0" in text
    assert "mooring_proxy_sent_bytes_total 5.0" in text
    assert 'route="/folder/create",status="204"' in text
    assert vfid not in text


@pytest.mark.asyncio
async def test_readiness_tells_of_a_bucket_that_is_gone(s3_server: S3Server, s3: S3Client, tmp_path: Path) -> None:
    name = f"gone-{os.urandom(4).hex()}"
    config, secrets = proxy_config(
        tmp_path / "proxy",
        endpoint=s3_server.endpoint.url,
        bucket=name,
        credential=s3_server.admin,
        volume={"create-bucket": True},
    )
    async with running(config, secrets, s3, name) as stand:
        await asyncio.to_thread(delete_bucket, s3_server, name)
        async with stand.http.get(stand.internal_url + "/readyz") as answer:
            assert answer.status == 503
        assert (await stand.ok("GET", "/volume/hwinfo", volume="minio"))["status"] == "unavailable"


@pytest.mark.asyncio
@pytest.mark.expects_log("stamina.retry_scheduled")
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"bucket": "no-such-bucket-at-all"}, BucketNotFound),
        ({"options": {"minio-access-key": "nobody", "minio-secret-key": "wrong"}}, S3BadCredential),
        ({"endpoint": "http://127.0.0.1:9"}, S3Unavailable),
    ],
)
async def test_a_wrong_volume_stops_the_start(
    s3_server: S3Server, bucket: str, tmp_path: Path, change: dict[str, Any], expected: type[MooringError]
) -> None:
    config, _ = proxy_config(
        tmp_path / "proxy",
        endpoint=s3_server.endpoint.url,
        bucket=bucket,
        credential=s3_server.admin,
        volume=change,
    )
    begin = time.monotonic()
    with pytest.raises(expected) as caught:
        async with open_proxy(config):
            pass
    assert time.monotonic() - begin < 15
    assert caught.value.hint
    assert "minio" in caught.value.message
    assert MASK not in str(caught.value)


@pytest.mark.asyncio
async def test_the_allowed_parent_credential(s3_server: S3Server, s3: S3Client, tmp_path: Path) -> None:
    """A server that makes no users: the volume's own key may go to agents only if the operator said so."""
    await s3.put(s3_server.limited_bucket, "x", b"")
    for allowed in (False, True):
        config, secrets = proxy_config(
            tmp_path / f"proxy{allowed}",
            endpoint=s3_server.endpoint.url,
            bucket=s3_server.limited_bucket,
            credential=s3_server.limited,
            volume={"allow-parent-credential": allowed},
        )
        async with running(config, secrets, s3, s3_server.limited_bucket) as stand:
            vfid, agent = stand.vfid(), SealingKey.generate()
            await s3.put(s3_server.limited_bucket, stand.prefix(vfid), b"")
            body = {
                "volume": "minio",
                "vfid": vfid,
                "mode": "ro",
                "recipient_key": agent.public,
                "session_id": "s",
            }
            answer = await stand.call("POST", "/folder/mount-credential", body)
            assert answer.status == (200 if allowed else 400), answer.body
            if allowed:
                issued = answer.json()
                assert issued["method"] == "parent"
                key = S3Credential.from_sealed(agent.open(issued["sealed_credential"], issued["credential_id"]))
                assert key.access_key == s3_server.limited.access_key
