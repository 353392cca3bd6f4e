"""Making API tokens."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import timedelta

from storage_proxy.core.config import parse_seconds
from storage_proxy.core.errors import InvalidIdentifier, UsageError
from storage_proxy.core.ids import parse_agent_id
from storage_proxy.core.tokens import Purpose, TokenSigner

from .services import Role

MAX_LIFETIME = timedelta(days=366)


def issue_token(
    signer: TokenSigner,
    *,
    user: str,
    role: str = "user",
    projects: Sequence[str] = (),
    lifetime: str = "1h",
) -> str:
    """A token of `role` for a subject: the UUID of a user or admin, the id of an agent.

    Raises `UsageError` for values that make no token.
    """
    try:
        kind = Role(role)
    except ValueError:
        raise UsageError(f"{role!r} is not a role.", hint="Use user, admin or agent.") from None
    try:
        seconds = parse_seconds(lifetime)
    except ValueError as err:
        raise UsageError(f"{lifetime!r} is not a lifetime: {err}.") from None
    span = timedelta(seconds=seconds) if isinstance(seconds, float) else timedelta(0)
    if not timedelta(0) < span <= MAX_LIFETIME:
        raise UsageError(f"{lifetime!r} is not a lifetime.", hint="At most 366 days; write it as 30m, 1h or 7d.")
    data: dict[str, object] = {"role": kind.value, "projects": [str(_uuid(text)) for text in projects]}
    subject = parse_agent_id(user) if kind is Role.AGENT else str(_uuid(user))
    return signer.issue(Purpose.API, subject, span, data)


def _uuid(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError:
        raise InvalidIdentifier(f"{text[:80]!r} is not a UUID.", hint="Write 8-4-4-4-12 hexadecimal digits.") from None
