"""Mounting from a Python program: with an agent inside this process, or through the one that runs on this machine.

    async with Node.open("/etc/mooring/agent.toml") as node:    # the whole agent, on this event loop
    async with Node.connect() as node:                          # the agent that `mooring agent serve` runs
        spec = await node.acquire(grant)                        # bind spec.source at spec.target, with rslave
        ...
        await node.release(spec)

Both are the same `Node`. Inside another program the agent changes nothing that belongs to the whole process: no signal
handler, no logging configuration (see `storage_proxy.core.logs`), no umask, no resource limit. Such a program may call
`harden_process` itself: credentials pass through its memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Self

from storage_proxy.client.agent import AgentClient, AgentIdentity, MountInfo
from storage_proxy.client.storages import FeedItem
from storage_proxy.core.config import load_config
from storage_proxy.core.errors import ConfigError, Conflict, ServiceUnavailable
from storage_proxy.core.ids import VFolderID, parse_session_id
from storage_proxy.core.logs import get_logger
from storage_proxy.core.wire import BindSpec

from .config import AgentConfig
from .host import check_host
from .main import Agent, harden_process, running

__all__ = ["Node", "harden_process"]

log = get_logger(__name__)

_SOCKET = Path("/run/mooring/agent/agent.sock")
_SECONDS = 60.0


class Node:
    """The mounts of one machine. Make one with `open` or `connect` and use it as an async context manager.

    All methods may be called at the same time from tasks of one event loop, and raise classes of
    `storage_proxy.core.errors`. After a call that was cancelled `release` puts everything right.
    """

    def __init__(self, client: AgentClient) -> None:
        self._client = client
        self._identity: AgentIdentity | None = None

    @staticmethod
    def open(config: AgentConfig | Path | str) -> Node:
        """An agent in this process: all that the configuration says, its socket included, so `mooring mounts` works.

        It lives from the entry of the context manager to its exit; if mounts outlive it then is for the setting
        `stop-mounts-on-exit` to say. Entering raises `ConfigError`, `Conflict` if another agent uses the same
        runtime-dir, and `MountNotPermitted` without the right to mount. It needs the loop: code that blocks it for
        seconds delays repairs as long.
        """
        if not isinstance(config, AgentConfig):
            config = load_config(AgentConfig, Path(config))
        return _EmbeddedNode(config)

    @staticmethod
    def connect(socket: Path | str = _SOCKET, *, timeout: float = _SECONDS) -> Node:
        """The agent that listens at `socket`. `timeout` in seconds for each call. Entering raises `ServiceUnavailable`
        if it does not run, `Forbidden` if it does not serve this user."""
        return Node(AgentClient(Path(socket), timeout=timeout))

    async def __aenter__(self) -> Self:
        try:
            self._identity = await self._client.identity()
        except BaseException:
            await self._client.close()
            raise
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        """What is acquired stays: it belongs to sessions, not to this object."""
        await self._client.close()

    @property
    def identity(self) -> AgentIdentity:
        """What a manager extension must know to grant something to this node. Only inside the context manager."""
        if self._identity is None:
            raise ServiceUnavailable("This node is not in use yet.", hint="Enter its context manager first.")
        return self._identity

    async def acquire(self, grant: str) -> BindSpec:
        """Mounts, or shares, what a grant permits. Returns what the container runtime needs; it is usable at once.

        Idempotent for the same session and folder while it lasts. Raises `TokenExpired`, `TokenInvalid`,
        `AlreadyExists`, `LimitExceeded`, `ServiceUnavailable` (draining), S3 errors, `MountFailed`,
        `DeadlineExceeded`; then nothing is left of it.
        """
        return await self._client.attach(grant)

    async def release(self, what: BindSpec | str) -> None:
        """Gives one folder back (a spec), or all folders of a session (its id). Idempotent, also for what never was."""
        if isinstance(what, BindSpec):
            await self._client.detach(what.session_id, what.vfid)
        else:
            await self._client.detach_session(what)

    async def renew(self, spec: BindSpec, grant: str) -> None:
        """Gives the mount of an acquired folder the credential of a fresh grant, before the old one ends. Needed only
        where the configuration names no manager extension."""
        await self._client.renew(spec.session_id, spec.vfid, grant)

    async def mounts(self) -> list[MountInfo]:
        """Every mount of this node with its state and the sessions that hold it."""
        return await self._client.mounts()

    def events(self, *, since: str | None = None) -> AsyncGenerator[FeedItem, None]:
        """What happens to the mounts, as it happens, until the agent stops. `since`: the id of the last event that is
        known, `0` for all that are kept. Close it when done (`contextlib.aclosing`)."""
        return self._client.events(since=since)


class _EmbeddedNode(Node):
    """The agent runs in a task of its own, so that neither its failure nor that of its user reaches the other by
    cancellation."""

    def __init__(self, config: AgentConfig) -> None:
        super().__init__(AgentClient(config.agent.api_socket, timeout=_SECONDS))
        self._config = config
        self._agent: Agent | None = None
        self._task: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()

    async def __aenter__(self) -> Self:
        if self._config.backend_ai.root:
            raise ConfigError(
                "The automounter of [backend-ai] root needs a process of its own.",
                hint="Run `mooring agent serve` and use Node.connect().",
            )
        check_host()
        ready = asyncio.Event()
        task = self._task = asyncio.create_task(self._run(ready), name="mooring agent")
        waiter = asyncio.create_task(ready.wait())
        try:
            await asyncio.wait((task, waiter), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                raise self._failure()
            return await super().__aenter__()
        except BaseException:
            await self._end()
            raise
        finally:
            waiter.cancel()

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        """Raises what ended the agent early, unless something else is being raised."""
        await self._client.close()
        await self._end()
        if kind is None and self._task is not None and not self._task.cancelled() and self._task.exception():
            raise self._failure()

    async def _run(self, ready: asyncio.Event) -> None:
        async with running(self._config) as agent, agent.server:
            self._agent = agent
            ready.set()
            await self._stop.wait()

    async def _end(self) -> None:
        """Waits for an orderly end, also if the caller is cancelled meanwhile."""
        self._stop.set()
        task = self._task
        if task is None:
            return
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            if self._agent is None:
                task.cancel()  # it was still starting
            await asyncio.wait([task])
            raise
        finally:
            if task.done() and not task.cancelled():
                task.exception()  # looked at

    def _failure(self) -> BaseException:
        """Why the agent ended: one error, as it would have been without a task group around it."""
        error = self._task.exception() if self._task is not None and not self._task.cancelled() else None
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if isinstance(error, Conflict):
            return Conflict(error.message, hint="Stop it, use Node.connect(), or set another runtime-dir.")
        return error or ServiceUnavailable("The agent in this process has ended.", hint="Open the node again.")

    def _running(self) -> Agent:
        if self._agent is None or self._task is None or self._task.done():
            raise ServiceUnavailable("The agent in this process does not run.", hint="Open the node again.")
        return self._agent

    async def acquire(self, grant: str) -> BindSpec:
        return await self._running().attachments.attach(grant)

    async def release(self, what: BindSpec | str) -> None:
        attachments = self._running().attachments
        if isinstance(what, BindSpec):
            await attachments.detach(parse_session_id(what.session_id), VFolderID.parse(what.vfid).hex)
        else:
            await attachments.detach_session(parse_session_id(what))
