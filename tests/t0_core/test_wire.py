"""Values between the packages: what shares a mount, and what never leaves a process."""

from pathlib import Path

import pytest

from storage_proxy.core.crypto import SealingKey, seal
from storage_proxy.core.errors import ConfigError, InsecureFileMode, InvalidPath
from storage_proxy.core.ids import AccessMode
from storage_proxy.core.secrets import Secret, write_private
from storage_proxy.core.wire import BindSpec, Location, MountRequest, Ownership, S3Credential

VFID = "user:12345678-1234-5678-1234-567812345678/12345678123456781234567812345678"


def request(**change: object) -> MountRequest:
    data: dict[str, object] = {
        "volume": "minio",
        "vfid": VFID,
        "location": Location(endpoint="http://127.0.0.1:1", bucket="bucket", prefix="a/"),
        "mode": AccessMode.READ_WRITE,
        "target": "/data",
        "credential_id": "c1",
        "sealed_credential": "ms1.x",
    }
    return MountRequest.model_validate({**data, **change})


def test_the_mount_key_covers_what_must_not_be_shared() -> None:
    base = request().mount_key("s3fs")
    assert request(target="/other", sealed_credential="ms1.y").mount_key("s3fs") == base
    different = [
        request(mode=AccessMode.READ_ONLY),
        request(credential_id="c2"),
        request(ownership=Ownership(uid=1000)),
        request(ownership=Ownership(umask=0o077)),
        request(location=Location(endpoint="http://127.0.0.1:2", bucket="bucket", prefix="a/")),
        request(location=Location(endpoint="http://127.0.0.1:1", bucket="bucket", prefix="b/")),
        request(location=Location(endpoint="http://127.0.0.1:1", bucket="other", prefix="a/")),
    ]
    keys = {one.mount_key("s3fs") for one in different} | {request().mount_key("pyfuse"), base}
    assert len(keys) == len(different) + 2


def test_a_credential_travels_only_sealed() -> None:
    credential = S3Credential(access_key="AK", secret_key=Secret("hunter2hunter2"))
    assert "hunter2" not in credential.model_dump_json() + repr(credential) + str(credential.to_sealable())
    receiver = SealingKey.generate()
    opened = receiver.open(seal(credential.to_sealable(), receiver.public, "c1"), "c1")
    assert S3Credential.from_sealed(opened) == credential


@pytest.mark.parametrize("target", ["data", "/", "/a/../b", "//a", "/a\nb", ""])
def test_targets_are_guarded(target: str) -> None:
    with pytest.raises(InvalidPath):
        Location.model_validate({"endpoint": "e", "bucket": "bucket"}) and request(target=target)


def test_a_bind_spec_says_read_only_and_rslave() -> None:
    spec = BindSpec(session_id="s1", vfid=VFID, mount_key="k", source="/run/x", target="/data", read_only=True)
    assert spec.podman_mount() == "type=bind,source=/run/x,target=/data,readonly,bind-propagation=rslave"


@pytest.mark.parametrize(
    "text", ["AK\nhunter2\n", "\n AK \n\nhunter2", '{"access_key": "AK", "secret_key": "hunter2"}', "AK\r\nhunter2\r\n"]
)
def test_a_key_file_has_two_lines_or_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "key"
    write_private(path, text.encode())
    assert S3Credential.read(path) == S3Credential(access_key="AK", secret_key=Secret("hunter2"))
    path.chmod(0o644)
    with pytest.raises(InsecureFileMode):
        S3Credential.read(path)


@pytest.mark.parametrize("text", ["", "AK", "{", "[]", '{"access_key": "AK"}', '{"access_key": "", "secret_key": "x"}'])
def test_other_key_files_are_refused_without_repeating_them(tmp_path: Path, text: str) -> None:
    path = tmp_path / "key"
    write_private(path, text.encode())
    with pytest.raises(ConfigError, match="holds no access key") as caught:
        S3Credential.read(path)
    assert "AK" not in str(caught.value)
