"""What a container runtime's plug-in asks of this agent: a host path for a folder, and later to have done with it.

Two ways to answer, for programs beside the agent (an own compute agent, or a patch of Backend.AI's):

* `PathHook`: the folder's place below a volume root. Nothing is counted; who holds it is seen from the kernel.
* `GrantHook`: a bind of its own for each kernel, by a grant that names it. Released exactly when the kernel is.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from storage_proxy.client import AgentClient
from storage_proxy.core.errors import DeadlineExceeded, MountFailed, VFolderNotFound
from storage_proxy.core.ids import VFolderID, parse_session_id

from ...kernel.abandon import off_loop
from .places import FolderPlace


class AgentHook(Protocol):
    """Whoever starts containers (kernels, in Backend.AI's words) calls these around it.

    `acquire` returns the directory to bind; it is mounted and answers when the call returns, and stays so until the
    kernel is released. Repeating either is harmless. Both raise classes of the error tree.
    """

    async def acquire(self, vfid: VFolderID, kernel_id: str) -> Path: ...

    async def release(self, kernel_id: str) -> None: ...


class PathHook:
    """Serves from a volume root (`[backend-ai.root]`). Use it in another process than the agent, whose own look-ups the
    automounter lets pass.
    """

    def __init__(self, root: Path, *, deadline: float = 30.0) -> None:
        """`root`: the path of the volume root. `deadline` in seconds for one look-up."""
        self._root = root
        self._deadline = deadline

    async def acquire(self, vfid: VFolderID, kernel_id: str) -> Path:
        """Raises `VFolderNotFound`, `DeadlineExceeded`, `MountFailed` (refused, or not mounted; the agent's log says
        why).
        """
        path = FolderPlace.of_vfid("", vfid).below(self._root)
        try:
            # To look for something in it, not only at it: that is what mounts a directory that is there already.
            place = f"{path}/."
            await off_loop("a look-up of a folder", self._deadline, lambda: os.stat(place))  # noqa: PTH116 - drops the dot
        except FileNotFoundError:
            raise VFolderNotFound(
                f"There is no folder at {path}.", hint="Check that the agent serves its root."
            ) from None
        except TimeoutError:
            raise DeadlineExceeded(f"The folder at {path} was not mounted in time.") from None
        except OSError as err:
            raise MountFailed(
                f"The folder at {path} is not to be had: {err.strerror}.", hint="See the log of the agent."
            ) from None
        return path

    async def release(self, kernel_id: str) -> None:
        """Nothing to do: the agent sees that the container is gone."""


class GrantHook:
    """Serves from session binds. `grant(vfid, kernel_id)` gets a grant whose session is the kernel's id, from a manager
    extension. Bind the path with `rslave`: then repairs reach the container by themselves.
    """

    def __init__(self, agent: AgentClient, grant: Callable[[VFolderID, str], Awaitable[str]]) -> None:
        self._agent = agent
        self._grant = grant

    async def acquire(self, vfid: VFolderID, kernel_id: str) -> Path:
        """Raises what `grant` and an attach raise, `MountFailed` if the grant is for another session or folder."""
        session = parse_session_id(kernel_id)
        for item in await self._agent.attachments():
            if (item.session_id, item.vfid) == (session, str(vfid)) and item.source is not None:
                return Path(item.source)
        spec = await self._agent.attach(await self._grant(vfid, kernel_id))
        if (spec.session_id, spec.vfid) != (session, str(vfid)):
            await asyncio.shield(self._agent.detach(spec.session_id, spec.vfid))
            raise MountFailed(
                f"The grant is for folder {spec.vfid} of session {spec.session_id}.", hint="Ask for one for the kernel."
            )
        return Path(spec.source)

    async def release(self, kernel_id: str) -> None:
        await self._agent.detach_session(parse_session_id(kernel_id))
