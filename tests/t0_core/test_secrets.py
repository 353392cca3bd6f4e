"""Secrets cannot print; their files are private and written whole."""

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
from pydantic import BaseModel

from storage_proxy.core.errors import ConfigError, InsecureFileMode
from storage_proxy.core.secrets import Secret, read_or_create, read_secret, write_private

VALUE = "correct-horse-battery"


class Holder(BaseModel):
    key: Secret


def test_a_secret_does_not_print() -> None:
    secret = Secret(VALUE)
    holder = Holder(key=secret)
    shown = [str(secret), repr(secret), f"{secret}", f"{secret:>40}", "%s" % secret, str([secret]), str({"a": secret})]  # noqa: UP031
    shown += [str(holder), repr(holder), holder.model_dump_json(), str(holder.model_dump())]
    assert not any(VALUE in text for text in shown)
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    with pytest.raises(TypeError):
        json.dumps(secret)
    assert secret.reveal() == VALUE


def test_secrets_compare() -> None:
    assert Secret("a") == Secret("a")
    assert Secret("a") != Secret("b")
    assert Secret("a").equals("a")
    assert not Secret("a").equals("\udcff")
    assert Holder.model_validate({"key": VALUE}).key == Secret(VALUE)


def test_a_readable_secret_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(VALUE + "\n")
    path.chmod(0o640)
    with pytest.raises(InsecureFileMode, match="chmod 600"):
        read_secret(path)
    path.chmod(0o600)
    assert read_secret(path).reveal() == VALUE


def test_missing_and_empty_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_secret(tmp_path / "none")
    write_private(tmp_path / "empty", b"\n")
    with pytest.raises(ConfigError, match="is empty"):
        read_secret(tmp_path / "empty")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret"
    write_private(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_private(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["secret"]


def test_a_private_file_is_never_written_through_a_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"untouched")
    (tmp_path / "secret").symlink_to(target)
    write_private(tmp_path / "secret", b"new")
    assert target.read_bytes() == b"untouched"
    assert not (tmp_path / "secret").is_symlink()


def test_a_generated_secret_is_kept(tmp_path: Path) -> None:
    first = read_or_create(tmp_path / "s")
    assert read_or_create(tmp_path / "s") == first
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
    assert len(first.reveal()) >= 43
