"""Who is connected to a unix socket: the kernel tells (SO_PEERCRED), whatever the mode of the socket file is."""

from __future__ import annotations

import socket
import struct
from collections.abc import Awaitable, Callable, Collection

from aiohttp import web

from storage_proxy.core.errors import Forbidden, Unauthenticated
from storage_proxy.web import Principal

LOCAL = "local"  # the scope that everybody holds who is let in

_UCRED = struct.Struct("3i")


def peer_authenticator(
    allowed_uids: Collection[int], *, setting: str = "[agent] allowed-uids"
) -> Callable[[web.Request], Awaitable[Principal]]:
    """Lets in the processes of the given users. `setting`: where an operator adds one."""

    async def authenticate(request: web.Request) -> Principal:
        uid, pid = _peer(request)
        if uid not in allowed_uids:
            raise Forbidden(f"User {uid} may not use this agent.", hint=f"Add the uid to {setting}.")
        return Principal(f"uid {uid} (pid {pid})", frozenset({LOCAL}))

    return authenticate


def _peer(request: web.Request) -> tuple[int, int]:
    transport = request.transport
    peer: socket.socket | None = transport.get_extra_info("socket") if transport is not None else None
    if peer is None or peer.family != socket.AF_UNIX:
        raise Unauthenticated("The agent answers on its unix socket only.")
    pid, uid, _gid = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return uid, pid
