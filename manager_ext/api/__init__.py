"""The REST face of the manager extension."""

from .app import Services, build_app
from .auth import AUDIENCE, TokenAuth

__all__ = ["AUDIENCE", "Services", "TokenAuth", "build_app"]
