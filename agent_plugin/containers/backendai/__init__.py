"""Serving Backend.AI: its paths, its events, and a small interface for whoever starts its containers."""

from .hook import AgentHook, GrantHook, PathHook
from .kernels import KernelEvent, KernelEvents
from .roots import lead_process_group, volume_roots

__all__ = ["AgentHook", "GrantHook", "KernelEvent", "KernelEvents", "PathHook", "lead_process_group", "volume_roots"]
