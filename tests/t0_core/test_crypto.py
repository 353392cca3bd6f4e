"""Secrets at rest and in flight."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage_proxy.core.crypto import Keyring, SealingKey, seal
from storage_proxy.core.errors import ConfigError, IntegrityError, UsageError
from storage_proxy.core.secrets import Secret, write_private


@given(st.text(min_size=1))
def test_values_round_trip(text: str) -> None:
    ring = Keyring.generate()
    value = ring.encrypt(Secret(text), "t.c:1")
    assert ring.decrypt(value, "t.c:1").reveal() == text


def test_a_value_does_not_open_elsewhere_or_changed() -> None:
    ring = Keyring.generate()
    value = ring.encrypt(Secret("x" * 20), "t.c:1")
    with pytest.raises(IntegrityError):
        ring.decrypt(value, "t.c:2")
    version, key_id, body = value.split(".")
    swapped = body[:20] + ("A" if body[20] != "A" else "B") + body[21:]
    for broken in (f"{version}.{key_id}.{swapped}", "plain text", "mk1.a", value.replace("mk1", "mk9"), "mk1.x.%%%"):
        with pytest.raises((IntegrityError, ConfigError)):
            ring.decrypt(broken, "t.c:1")


def test_the_same_secret_never_looks_the_same() -> None:
    ring = Keyring.generate()
    assert ring.encrypt(Secret("x"), "p") != ring.encrypt(Secret("x"), "p")


def test_rotation_reads_old_values_and_pruning_does_not(tmp_path: Path) -> None:
    old = Keyring.load_or_create(tmp_path / "keys")
    value = old.encrypt(Secret("x"), "p")
    new = old.rotated()
    new.save(tmp_path / "keys")
    loaded = Keyring.load(tmp_path / "keys")
    assert loaded.decrypt(value, "p").reveal() == "x"
    assert not loaded.is_current(value)
    again = loaded.encrypt(loaded.decrypt(value, "p"), "p")
    assert loaded.is_current(again)
    with pytest.raises(ConfigError, match="does not hold"):
        loaded.pruned().decrypt(value, "p")
    assert loaded.pruned().decrypt(again, "p").reveal() == "x"


def test_keys_do_not_print() -> None:
    ring = Keyring.generate()
    assert "keys" not in repr(ring)


@pytest.mark.parametrize("text", ["", "{}", '{"primary": "a", "keys": {"b": "AA"}}', '{"primary": "a", "keys": []}'])
def test_a_damaged_key_file_is_refused(tmp_path: Path, text: str) -> None:
    write_private(tmp_path / "keys", text.encode())
    with pytest.raises(ConfigError):
        Keyring.load(tmp_path / "keys")


def test_only_the_receiver_opens_a_sealed_credential(tmp_path: Path) -> None:
    receiver = SealingKey.load_or_create(tmp_path / "key")
    assert SealingKey.load_or_create(tmp_path / "key").public == receiver.public
    sealed = seal(Secret("the key"), receiver.public, "cred-1")
    assert "the key" not in sealed
    assert receiver.open(sealed, "cred-1").reveal() == "the key"
    for wrong, context in ((SealingKey.generate(), "cred-1"), (receiver, "cred-2")):
        with pytest.raises(IntegrityError):
            wrong.open(sealed, context)
    for broken in ("", "ms1.", "ms1.AAAA", sealed[:-8], "ms1." + "A" * 80):
        with pytest.raises(IntegrityError):
            receiver.open(broken, "cred-1")


@pytest.mark.parametrize("key", ["", "AAAA", "%%%", "A" * 42 + "é"])
def test_a_bad_receiver_key_is_the_callers_mistake(key: str) -> None:
    with pytest.raises(UsageError):
        seal(Secret("x"), key, "c")
