"""Mount drivers. `s3fs` runs the s3fs-fuse program."""

from __future__ import annotations

from storage_proxy.core.errors import Unsupported

from ..config import DriversConfig
from .port import Driver, DriverInfo, Launch, MountPlan
from .s3fs import S3fsDriver

__all__ = ["Driver", "DriverInfo", "Drivers", "Launch", "MountPlan"]


class Drivers:
    """The drivers of this agent by name."""

    default = "s3fs"

    def __init__(self, config: DriversConfig) -> None:
        self._drivers: dict[str, Driver] = {"s3fs": S3fsDriver(config.s3fs)}

    @property
    def names(self) -> list[str]:
        return sorted(self._drivers)

    def get(self, name: str) -> Driver:
        """Raises `Unsupported` for a driver that does not exist."""
        driver = self._drivers.get(name)
        if driver is None:
            raise Unsupported(
                f"There is no mount driver {name[:40]!r}.", hint=f"Choose one of: {', '.join(self.names)}."
            )
        return driver
