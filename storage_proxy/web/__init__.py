"""The HTTP edge that all three daemons share: error answers, request ids, access policies, serving and stopping."""

from .auth import Policy, Principal, authenticated, check_policies, policy_of, public, require
from .errors import edge_middleware
from .health import HealthCheck, health_routes
from .requests import json_answer, read_json, read_query
from .server import Listener, Server

__all__ = [
    "HealthCheck",
    "Listener",
    "Policy",
    "Principal",
    "Server",
    "authenticated",
    "check_policies",
    "edge_middleware",
    "health_routes",
    "json_answer",
    "policy_of",
    "public",
    "read_json",
    "read_query",
    "require",
]
