"""Identifiers: the text forms of Backend.AI, and nothing else."""

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage_proxy.core.errors import InvalidIdentifier
from storage_proxy.core.ids import (
    BucketRef,
    ByteSize,
    QuotaScopeID,
    ScopeType,
    VFolderID,
    parse_bucket_name,
    parse_session_id,
    parse_volume_name,
)

SCOPE = "12345678-1234-5678-1234-567812345678"


@given(st.uuids(), st.uuids(), st.sampled_from(ScopeType))
def test_vfolder_ids_round_trip(scope: uuid.UUID, folder: uuid.UUID, kind: ScopeType) -> None:
    vfid = VFolderID(QuotaScopeID(kind, scope), folder)
    assert VFolderID.parse(str(vfid)) == vfid
    assert str(vfid) == f"{kind}:{scope}/{folder.hex}"
    a, b, c, rest, end = vfid.managed_prefix.split("/")
    assert (a, b + c + rest, end) == (scope.hex, folder.hex, "")


def test_any_uuid_spelling_of_the_wire_is_read() -> None:
    assert QuotaScopeID.parse(f"USER:{SCOPE.replace('-', '')}") == QuotaScopeID.parse(f"user:{SCOPE}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "user",
        f"group:{SCOPE}",
        f"user:{SCOPE}",
        f"user:{SCOPE}/",
        f"user:{SCOPE}/../x",
        f"user:{SCOPE}/{{{SCOPE}}}",
        f"user:{SCOPE}/urn:uuid:{SCOPE}",
        f"user:../{SCOPE}",
        f"user:{SCOPE}/{SCOPE}/x",
        f" user:{SCOPE}/{SCOPE}",
        SCOPE.replace("-", ""),
    ],
)
def test_other_vfolder_ids_are_refused(text: str) -> None:
    with pytest.raises(InvalidIdentifier):
        VFolderID.parse(text)


@pytest.mark.parametrize("text", ["", "../x", "a/b", ".a", "a.", "a..b", "x" * 65, "a b", "a\n"])
def test_names_cannot_act_as_paths(text: str) -> None:
    for parse in (parse_volume_name, parse_session_id):
        with pytest.raises(InvalidIdentifier):
            parse(text)


@pytest.mark.parametrize("text", ["", "ab", "Upper", "a_b", "a..b", "-ab", "x" * 64, "a/b"])
def test_bad_bucket_names_are_refused(text: str) -> None:
    with pytest.raises(InvalidIdentifier):
        parse_bucket_name(text)


def test_a_bucket_prefix_is_relative_and_ends_with_a_slash() -> None:
    assert BucketRef("bucket", "a/b/").key("c") == "a/b/c"
    for prefix in ("a", "/a/", "/"):
        with pytest.raises(InvalidIdentifier):
            BucketRef("bucket", prefix)


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("10m", 10 * 2**20), ("100g", 100 * 2**30), ("1.5 KiB", 1536), (7, 7), ("512 B", 512)]
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert ByteSize.parse(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1 x", "g", "1e9", "0x10"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(InvalidIdentifier):
        ByteSize.parse(text)


def test_sizes_print_with_a_unit() -> None:
    assert [str(ByteSize(n)) for n in (0, 1023, 1536, 3 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]
