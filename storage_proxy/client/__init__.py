"""Typed clients of Mooring's own REST APIs; the models here are the one definition of each answer.

`ProxyClient` speaks the manager-facing port of the storage proxy, `ManagerClient` the manager extension, `AgentClient`
the unix socket of one agent. All raise the classes of `core.errors`, also for what went wrong on the other side.
"""

from .agent import AgentClient
from .http import HttpService, error_from_answer
from .manager import ManagerClient
from .proxy import ProxyClient

__all__ = ["AgentClient", "HttpService", "ManagerClient", "ProxyClient", "error_from_answer"]
