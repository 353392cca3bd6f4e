"""The tables of the manager extension."""

from .agents import AgentRow
from .base import VERSION_TABLE, Base
from .credentials import CredentialRow
from .folders import FolderRow, FolderState
from .sessions import SessionMountRow, SessionRow

__all__ = [
    "VERSION_TABLE",
    "AgentRow",
    "Base",
    "CredentialRow",
    "FolderRow",
    "FolderState",
    "SessionMountRow",
    "SessionRow",
]
