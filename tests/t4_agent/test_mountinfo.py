"""The mount table parser against the kernel's own escaping, and against this machine's table."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_plugin.kernel import MountEntry, entries_at, entries_below, mountinfo, read_mountinfo, top_at
from agent_plugin.kernel.mountinfo import escape, parse_line, unescape

PATHS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=40).map(
    "/{}".format
)
WORDS = st.text("abcdefghijklmnop0123456789_.-", min_size=1, max_size=10)
TAGS = st.sampled_from([(), ("shared:12",), ("master:3",), ("shared:7", "master:3"), ("unbindable",)])


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_unescape_undoes_escape(text: str) -> None:
    assert unescape(escape(text)) == text


@given(
    ids=st.tuples(st.integers(1, 99999), st.integers(1, 99999)),
    minor=st.integers(0, 4000),
    root=PATHS,
    point=PATHS,
    options=st.lists(WORDS, min_size=1, max_size=4),
    tags=TAGS,
    fstype=st.sampled_from(["tmpfs", "fuse.s3fs", "fuse", "ext4"]),
    source=PATHS,
)
def test_a_line_is_read_as_it_was_written(
    ids: tuple[int, int],
    minor: int,
    root: str,
    point: str,
    options: list[str],
    tags: tuple[str, ...],
    fstype: str,
    source: str,
) -> None:
    optional = "".join(f"{tag} " for tag in tags)
    line = (
        f"{ids[0]} {ids[1]} 0:{minor} {escape(root)} {escape(point)} {','.join(options)} {optional}"
        f"- {fstype} {escape(source)} rw,size=4k"
    )
    entry = parse_line(line)
    assert entry == MountEntry(*ids, f"0:{minor}", root, point, tuple(options), tags, fstype, source, ("rw", "size=4k"))
    assert entry.connection == minor
    assert entry.is_shared == any(tag.startswith("shared") for tag in tags)
    assert entry.is_fuse == fstype.startswith("fuse")


@pytest.mark.parametrize("line", ["", "1 2", "1 2 0:1 / /x rw", "a b c d e f - g h i"])
def test_other_lines_are_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_line(line)


def _entry(mount_id: int, parent: int, point: str) -> MountEntry:
    return MountEntry(mount_id, parent, "0:1", "/", point, ("rw",), (), "tmpfs", "x", ("rw",))


def test_the_top_of_a_stack_is_known_by_parents_not_by_order() -> None:
    table = [_entry(1, 0, "/"), _entry(30, 20, "/m"), _entry(20, 1, "/m"), _entry(40, 1, "/mm")]
    top = top_at("/m", table)
    assert top is not None
    assert top.mount_id == 30
    assert top_at("/none", table) is None
    assert [entry.mount_id for entry in entries_at("/m", table)] == [30, 20]


def test_below_is_not_beside() -> None:
    table = [_entry(1, 0, "/a"), _entry(2, 1, "/a/b"), _entry(3, 1, "/ab")]
    assert [entry.mount_id for entry in entries_below("/a", table)] == [1, 2]


def test_this_machine() -> None:
    table = read_mountinfo()
    assert table, "there is always a root"
    assert len(table) == len(mountinfo.MOUNTINFO.read_text(errors="surrogateescape").splitlines())
    assert any(entry.mount_point == "/proc" and entry.fstype == "proc" for entry in table) == Path("/proc").exists()
