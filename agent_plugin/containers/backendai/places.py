"""Where Backend.AI looks for a folder: `{volume path}/{scope}/{aa}/{bb}/{rest}`.

`scope` is the quota scope's UUID, and `aa`, `bb` and `rest` together the folder's UUID, each as hex digits. The type of
the scope (user or project) is not in the path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from storage_proxy.core.ids import VFolderID

# How many hex digits the name at each level below the root has.
DIGITS = (32, 2, 2, 28)
LEAF_LEVEL = len(DIGITS) - 1
_HEX = re.compile(r"[0-9a-f]+")


def valid_name(level: int, name: bytes) -> str | None:
    """The name, if it is one that a directory at this level can have (0 is right below the root); else None."""
    try:
        text = name.decode("ascii")
    except UnicodeDecodeError:
        return None
    return text if len(text) == DIGITS[level] and _HEX.fullmatch(text) else None


@dataclass(frozen=True, slots=True)
class FolderPlace:
    """One folder below one root. `root` is the name of the root in the configuration."""

    root: str
    scope: str
    folder: str

    @classmethod
    def of(cls, root: str, names: tuple[str, ...]) -> FolderPlace:
        """From the four valid names of a path."""
        scope, *digits = names
        return cls(root, scope, "".join(digits))

    @classmethod
    def of_vfid(cls, root: str, vfid: VFolderID) -> FolderPlace:
        return cls(root, vfid.scope.hex, vfid.hex)

    @property
    def names(self) -> tuple[str, str, str, str]:
        return (self.scope, self.folder[0:2], self.folder[2:4], self.folder[4:])

    def below(self, path: Path) -> Path:
        return path.joinpath(*self.names)

    def is_of(self, vfid: VFolderID) -> bool:
        return (self.scope, self.folder) == (vfid.scope.hex, vfid.hex)

    def __str__(self) -> str:
        return f"{self.root}:{'/'.join(self.names)}"
