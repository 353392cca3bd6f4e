"""What containers get: bind specs."""

from .binds import Binds

__all__ = ["Binds"]
