"""One-root-per-volume mode: the paths that an unmodified Backend.AI agent binds, served while this agent runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from storage_proxy.client import ManagerClient
from storage_proxy.core.logs import get_logger

from ...attachments import Attachments
from ...config import BackendAISection
from ...kernel.abandon import off_loop
from ...kernel.autofs import Autofs
from .automount import Automounter
from .folders import NodeFolders
from .kernels import KernelEvents
from .tree import Tree

log = get_logger(__name__)

_SECONDS = 10.0


def lead_process_group() -> None:
    """Makes this process the leader of a group of its own. The kernel lets the automounter's process group pass
    without asking: with a shell's whole pipeline in it, those would find nothing at the roots.
    """
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)


@asynccontextmanager
async def volume_roots(
    section: BackendAISection,
    *,
    agent_id: str,
    attachments: Attachments,
    manager: ManagerClient,
    runtime: Path,
    keep: bool,
) -> AsyncIterator[NodeFolders]:
    """Serves every configured root. At the end they stay as they are if `keep` is set (missing names are ENOENT then,
    what is mounted goes on), else everything is unmounted.

    Raises `MountNotPermitted` if this host has no automounter, `ConfigError` for a path that cannot be served,
    `Conflict` if another agent serves it.
    """
    if os.getpgrp() != os.getpid():  # inside another program, which did not call `lead_process_group`
        log.warning("processes of this process group see of the volume roots only what is mounted", group=os.getpgrp())
    async with AsyncExitStack() as stack:
        autofs = Autofs()
        stack.callback(autofs.close)
        trees: dict[str, Tree] = {}
        for name, root in section.root.items():
            tree = Tree(name, root.path, autofs)
            if not keep:
                await off_loop("a clean volume root", _SECONDS, tree.clean)
            points = await off_loop("a volume root", _SECONDS, tree.prepare)
            stack.push_async_callback(_leave, tree, keep)
            trees[name] = tree
            log.info("volume root served", root=name, path=str(tree.path), taken_over=points)
        folders = NodeFolders(
            agent_id=agent_id,
            attachments=attachments,
            manager=manager,
            autofs=autofs,
            trees=trees,
            volumes={name: root.volume or name for name, root in section.root.items()},
            idle=section.idle_time,
            deadline=section.lookup_deadline,
            runtime=runtime,
        )
        if adopted := await folders.adopt():
            log.info("folders of a former agent taken over", folders=adopted)
        await stack.enter_async_context(
            Automounter(
                autofs,
                list(trees.values()),
                serve=folders.serve,
                expired=folders.expired,
                deadline=section.lookup_deadline,
                uids=frozenset(section.lookup_uids),
            )
        )
        work = [folders.run()]
        if section.events_url is not None:
            work.append(KernelEvents(section.events_url, folders.kernel_event).run())
        tasks = [asyncio.create_task(item, name="volume roots") for item in work]
        try:
            yield folders
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with contextlib.suppress(asyncio.CancelledError):
                    await task


async def _leave(tree: Tree, keep: bool) -> None:
    await off_loop("the end of a volume root", _SECONDS, tree.leave if keep else tree.tear_down)
