"""Serving Backend.AI: its paths, its events, and a small interface for whoever starts its containers."""

from .hook import AgentHook
from .kernels import KernelEvent, KernelEvents
from .roots import lead_process_group, volume_roots

__all__ = ["AgentHook", "KernelEvent", "KernelEvents", "lead_process_group", "volume_roots"]
