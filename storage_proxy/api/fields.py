"""Field types of requests: text from outside becomes a guarded value or a 400 here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict

from ..core.ids import VFolderID
from ..core.paths import RelPath
from ..core.wire import VolumeText

T = TypeVar("T")


class RequestModel(BaseModel):
    """Base of requests: unknown keys are ignored, as newer managers may send more."""

    model_config = ConfigDict(frozen=True, extra="ignore", arbitrary_types_allowed=True)


def _from_text(parse: Callable[[str], T]) -> BeforeValidator:
    def convert(value: object) -> T:
        if not isinstance(value, str):
            raise ValueError("must be a text")
        return parse(value)

    return BeforeValidator(convert)


VFolderField = Annotated[VFolderID, _from_text(VFolderID.parse)]
PathField = Annotated[RelPath, _from_text(RelPath.parse)]
FilePathField = Annotated[RelPath, _from_text(RelPath.parse_file)]


class VolumeRequest(RequestModel):
    volume: VolumeText


class FolderRequest(VolumeRequest):
    vfid: VFolderField
