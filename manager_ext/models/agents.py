"""Agents that credentials can be sealed to."""

from __future__ import annotations

from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column

from .base import Base, Timestamps


class AgentRow(Timestamps, Base):
    """One node agent and the public half of its sealing key."""

    __tablename__ = "manager_agents"

    id: Mapped[str] = mapped_column(String(64), primary_key=True, comment="agent id from its configuration")
    public_key: Mapped[str] = mapped_column(String(64), comment="X25519 public key, base64url of 32 bytes")
    registered_by: Mapped[str] = mapped_column(
        String(64), comment="subject of the token that registered it; only that one or an admin may change the key"
    )
