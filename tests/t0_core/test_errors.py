"""The error tree: every class has all three faces, and the docstring is the tree."""

import errno
import inspect
import re

import pytest

from storage_proxy.core import errors


@pytest.mark.parametrize("cls", errors.walk(), ids=lambda cls: cls.__name__)
def test_every_error_has_three_faces(cls: type[errors.MooringError]) -> None:
    error = cls("Something happened to a thing.", hint="Do this next.", detail={"bucket": "b"})
    problem = error.to_problem()
    assert re.fullmatch(r"[a-z-]+_[a-z]+_[a-z-]+", cls.code), cls.code
    assert 400 <= cls.status < 600
    assert cls.errno in errno.errorcode
    assert 1 <= cls.exit_code < 64
    assert problem["error_code"] == cls.code
    assert problem["msg"] == "Something happened to a thing."
    assert problem["hint"] == "Do this next."
    assert problem["data"] == {"bucket": "b"}
    assert str(error) == "Something happened to a thing. Do this next."


def test_the_docstring_shows_the_tree_as_it_is() -> None:
    documented = re.findall(
        r"^[ │├└─]*(\w+) +(\d{3}) +(\w+) +(\d+)\b", inspect.getdoc(errors) or "", flags=re.MULTILINE
    )
    shown = {name: (int(status), number, int(code)) for name, status, number, code in documented}
    actual = {
        cls.__name__: (cls.status, errno.errorcode[cls.errno].replace("EOPNOTSUPP", "ENOTSUP"), cls.exit_code)
        for cls in errors.walk()[1:]
    }
    assert shown == actual


def test_user_visible_folder_problems_are_in_domain_vfolder() -> None:
    # Backend.AI's manager turns every other domain into a bare 500 for its user.
    for cls in (errors.InvalidPath, errors.VFolderNotFound, errors.FileNotFound, errors.AlreadyExists, errors.ReadOnly):
        assert cls.code.startswith("vfolder_")
