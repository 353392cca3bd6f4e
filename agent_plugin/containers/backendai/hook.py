"""What a container runtime's plug-in asks of this agent: a host path for a folder, and later to have done with it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from storage_proxy.core.ids import VFolderID


class AgentHook(Protocol):
    """Whoever starts containers (kernels, in Backend.AI's words) calls these around it.

    `acquire` returns the directory to bind; it is mounted and answers when the call returns, and stays so until the
    kernel is released. Repeating either is harmless. Both may raise classes of the error tree.
    """

    async def acquire(self, vfid: VFolderID, kernel_id: str) -> Path: ...

    async def release(self, kernel_id: str) -> None: ...
