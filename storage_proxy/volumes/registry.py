"""`VolumeRegistry`: the volumes of this proxy by name, made once from the configuration."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

from ..config import VolumeSection
from ..core.crypto import Keyring
from ..core.errors import MooringError, S3Unavailable, VolumeNotFound
from ..core.ids import VolumeName
from ..db import Database
from ..s3 import S3Pool
from .minio import MinioVolume

START_DEADLINE_SECONDS = 10.0


class VolumeRegistry:
    """Never changes while the process runs."""

    def __init__(self, volumes: Mapping[VolumeName, MinioVolume]) -> None:
        self._volumes = dict(volumes)

    @classmethod
    def from_config(
        cls, sections: Mapping[str, VolumeSection], *, pool: S3Pool, database: Database, keyring: Keyring
    ) -> VolumeRegistry:
        """Raises `ConfigError` for a credential that cannot be read."""
        return cls(
            {
                VolumeName(name): MinioVolume(VolumeName(name), section, pool=pool, database=database, keyring=keyring)
                for name, section in sections.items()
            }
        )

    def get(self, name: str) -> MinioVolume:
        """Raises `VolumeNotFound`."""
        volume = self._volumes.get(VolumeName(name))
        if volume is None:
            raise VolumeNotFound(f"There is no volume {name[:64]!r}.", hint="Ask GET /volumes for the names.")
        return volume

    def __iter__(self) -> Iterator[MinioVolume]:
        return iter(self._volumes.values())

    async def prepare(self) -> None:
        """Looks at every volume once, within 10 s for all. Raises what is wrong with the first bad one."""

        async def one(volume: MinioVolume) -> None:
            try:
                async with asyncio.timeout(START_DEADLINE_SECONDS):
                    await volume.prepare()
            except TimeoutError:
                raise S3Unavailable(
                    f"Volume {volume.name!r}: {volume.endpoint.url} did not answer in {START_DEADLINE_SECONDS:g} s.",
                    hint="Check the endpoint and that the S3 server runs.",
                ) from None
            except MooringError as err:
                err.message = f"Volume {volume.name!r}: {err.message}"
                raise

        try:
            async with asyncio.TaskGroup() as group:
                for volume in self:
                    group.create_task(one(volume))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
