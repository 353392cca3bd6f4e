"""SEMANTICS 8: a path from outside cannot leave its vfolder."""

import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage_proxy.core.errors import InvalidPath
from storage_proxy.core.paths import MAX_PATH_BYTES, MAX_SEGMENT_BYTES, RelPath, parse_prefix

HOSTILE = [
    "/etc/passwd",
    "//x",
    "..",
    "../x",
    "a/../../x",
    "a/..",
    "a/./b",
    "a//b",
    "a\\..\\b",
    "a\0b",
    "a\nb",
    "a\x7fb",
    "\udcff",
    "x" * (MAX_SEGMENT_BYTES + 1),
    "/".join(["x" * 200] * 6),
]


@pytest.mark.parametrize("raw", HOSTILE, ids=ascii)
def test_hostile_paths_are_refused(raw: str) -> None:
    with pytest.raises(InvalidPath):
        RelPath.parse(raw)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("", ""),
        (".", ""),
        ("./", ""),
        ("a", "a"),
        ("a/", "a"),
        ("./a/b", "a/b"),
        ("...", "..."),
        ("..a/b..", "..a/b.."),
        ("a b/c+d%2e%2e/é", "a b/c+d%2e%2e/é"),  # nothing is decoded here
        (".hidden", ".hidden"),
    ],
)
def test_good_paths_keep_their_text(raw: str, text: str) -> None:
    assert RelPath.parse(raw).text == text


@pytest.mark.semantics(6)
@given(st.text(max_size=60) | st.lists(st.sampled_from(["..", ".", "", "a", "b c", "\\", "..."])).map("/".join))
def test_what_passes_stays_inside(raw: str) -> None:
    try:
        path = RelPath.parse(raw)
    except InvalidPath:
        return
    joined = posixpath.normpath(posixpath.join("/folder", path.text))
    assert joined == "/folder" or joined.startswith("/folder/")
    assert len(path.text.encode()) <= MAX_PATH_BYTES
    assert RelPath.parse(path.text) == path


def test_a_prefix_never_matches_its_neighbour() -> None:
    assert RelPath.parse("team1").as_prefix == "team1/"
    assert not RelPath.parse("team10/x").is_inside(RelPath.parse("team1"))
    assert RelPath.parse("team1/x").is_inside(RelPath.parse("team1"))
    assert parse_prefix("a/b") == "a/b/"
    assert parse_prefix("") == ""


def test_a_file_path_names_a_file() -> None:
    for raw in ("", ".", "a/"):
        with pytest.raises(InvalidPath):
            RelPath.parse_file(raw)
    assert RelPath.parse_file("a/b").name == "b"
    assert RelPath.parse("a/b/c").parent == RelPath.parse("a/b")
