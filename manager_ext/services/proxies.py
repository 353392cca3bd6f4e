"""The storage proxies that this extension stands before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from storage_proxy.client.proxy import (
    BindingOptions,
    ListAnswer,
    MkdirAnswer,
    MountAnswer,
    MountCredentialAnswer,
    MountCredentialRequest,
    TaskAnswer,
    TokenAnswer,
    UsageAnswer,
    VolumeInfo,
)
from storage_proxy.core.errors import ConfigError, InvalidRequest, VolumeNotFound


class ProxyPort(Protocol):
    """What the use cases need of a storage proxy; `ProxyClient` is one. Raises classes of the error tree."""

    async def volumes(self) -> list[VolumeInfo]: ...

    async def create_folder(self, volume: str, vfid: str, *, binding: BindingOptions | None = None) -> None: ...

    async def delete_folder(self, volume: str, vfid: str) -> TaskAnswer: ...

    async def mount(self, volume: str, vfid: str, subpath: str = ".") -> MountAnswer: ...

    async def usage(self, volume: str, vfid: str) -> UsageAnswer: ...

    async def issue_mount_credential(self, request: MountCredentialRequest) -> MountCredentialAnswer: ...

    async def revoke_mount_credential(self, volume: str, revoke_ref: str) -> None: ...

    async def list_files(
        self, volume: str, vfid: str, relpath: str = ".", *, cursor: str | None = None, limit: int | None = None
    ) -> ListAnswer: ...

    async def mkdir(
        self, volume: str, vfid: str, relpaths: Sequence[str], *, parents: bool = True, exist_ok: bool = False
    ) -> MkdirAnswer: ...

    async def delete_files(
        self, volume: str, vfid: str, relpaths: Sequence[str], *, recursive: bool = False
    ) -> None: ...

    async def request_download(self, volume: str, vfid: str, relpath: str) -> TokenAnswer: ...

    async def request_upload(self, volume: str, vfid: str, relpath: str, size: int) -> TokenAnswer: ...


@dataclass(frozen=True, slots=True)
class StorageProxy:
    """One proxy. `client_url` is what users' programs reach, without a trailing slash."""

    name: str
    port: ProxyPort
    client_url: str


class Proxies:
    """Finds the proxy of a volume, which is written `volume`, or `proxy:volume` if there are several proxies."""

    def __init__(self, proxies: Mapping[str, StorageProxy]) -> None:
        self._proxies = dict(proxies)

    def __iter__(self) -> Iterator[StorageProxy]:
        return iter(self._proxies.values())

    def resolve(self, host: str) -> tuple[StorageProxy, str]:
        """Raises `VolumeNotFound` for an unknown proxy and `InvalidRequest` if the proxy must be named."""
        name, sep, volume = host.partition(":")
        if not sep:
            if len(self._proxies) != 1:
                raise InvalidRequest(
                    f"Volume {host!r} could be on several storage proxies.",
                    hint=f"Write PROXY:{host} with one of: {', '.join(sorted(self._proxies))}.",
                    detail={"volume": "name the storage proxy"},
                )
            return next(iter(self._proxies.values())), host
        if name not in self._proxies:
            raise VolumeNotFound(f"There is no storage proxy {name!r}.", hint="Ask for the list of volumes.")
        return self._proxies[name], volume

    def get(self, name: str) -> StorageProxy:
        """The proxy of a stored folder; raises `ConfigError` if it was taken out of the configuration."""
        try:
            return self._proxies[name]
        except KeyError:
            raise ConfigError(
                f"The storage proxy {name!r} of this folder is not configured any more.",
                hint=f"Put [proxy.{name}] back into the configuration of the manager extension.",
            ) from None
