"""The use cases of the manager extension. They know no HTTP; every query is limited to what the caller may see."""

from .agents import Agents
from .caller import Caller, Role
from .credentials import Credentials
from .folders import Folders
from .keys import KeyFile
from .node_folders import NodeFolders
from .proxies import Proxies, ProxyPort, StorageProxy
from .sessions import Sessions

__all__ = [
    "Agents",
    "Caller",
    "Credentials",
    "Folders",
    "KeyFile",
    "NodeFolders",
    "Proxies",
    "ProxyPort",
    "Role",
    "Sessions",
    "StorageProxy",
]
