"""An engine's side of the volume plugin protocol, without an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp


class PluginError(Exception):
    """What the plugin answered as `Err`, with its status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Engine:
    """Calls as Docker does; `reference` is the id of a mount."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def call(self, name: str, body: object = None, **headers: str) -> dict[str, Any]:
        return await self.send(name, b"" if body is None else json.dumps(body).encode(), **headers)

    async def send(self, name: str, data: bytes, **headers: str) -> dict[str, Any]:
        connector = aiohttp.UnixConnector(str(self._socket))
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.post(f"http://plugin/{name}", data=data, headers=headers) as answer,
        ):
            assert answer.headers["Content-Type"] == "application/vnd.docker.plugins.v1.1+json"
            content: dict[str, Any] = json.loads(await answer.read())
            if answer.status != 200 or content.get("Err"):
                raise PluginError(answer.status, content["Err"])
            return content

    async def create(self, name: str, **options: str) -> None:
        await self.call("VolumeDriver.Create", {"Name": name, "Opts": options})

    async def get(self, name: str) -> dict[str, Any]:
        volume: dict[str, Any] = (await self.call("VolumeDriver.Get", {"Name": name}))["Volume"]
        return volume

    async def mount(self, name: str, reference: str) -> Path:
        return Path((await self.call("VolumeDriver.Mount", {"Name": name, "ID": reference}))["Mountpoint"])

    async def unmount(self, name: str, reference: str) -> None:
        await self.call("VolumeDriver.Unmount", {"Name": name, "ID": reference})

    async def remove(self, name: str) -> None:
        await self.call("VolumeDriver.Remove", {"Name": name})
