"""Who asks, and what they may see."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from enum import StrEnum

from sqlalchemy import ColumnElement, true
from sqlalchemy.orm import InstrumentedAttribute

from storage_proxy.core.errors import Forbidden
from storage_proxy.core.ids import QuotaScopeID, ScopeType


class Role(StrEnum):
    USER = "user"
    ADMIN = "admin"
    AGENT = "agent"


@dataclass(frozen=True, slots=True)
class Caller:
    """A verified subject: the UUID of a user or admin, or what names an agent. A user acts on the own scope and on
    those of their projects; an admin on all; an agent on none."""

    subject: str
    role: Role
    projects: frozenset[uuid.UUID] = field(default_factory=frozenset)

    @property
    def own_scope(self) -> str:
        """Raises `Forbidden` for an agent, which owns nothing."""
        if self.role is Role.AGENT:
            raise Forbidden("An agent has no folders.", hint="Use the token of a user.")
        return str(QuotaScopeID(ScopeType.USER, uuid.UUID(self.subject)))

    @property
    def is_admin(self) -> bool:
        return self.role is Role.ADMIN

    def scopes(self) -> frozenset[str]:
        """The scopes that this caller may read and change, if not an admin."""
        if self.role is Role.AGENT:
            return frozenset()
        return frozenset({self.own_scope, *(str(QuotaScopeID(ScopeType.PROJECT, id_)) for id_ in self.projects)})

    def sees(self, column: InstrumentedAttribute[str]) -> ColumnElement[bool]:
        """The condition that belongs into every query for rows of a scope."""
        return true() if self.is_admin else column.in_(sorted(self.scopes()))

    def scope_for(self, asked: str | None) -> str:
        """The scope of something new: the caller's own unless another was asked for. Raises `Forbidden`."""
        if asked is None:
            return self.own_scope
        if not self.is_admin and asked not in self.scopes():
            raise Forbidden(f"You may not use the quota scope {asked}.", hint="Use your own, or one of your projects.")
        return asked
