"""Who is calling: a bearer token signed by this service, never a cookie and never a query parameter."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from aiohttp import web
from pydantic import Field, ValidationError

from storage_proxy.core.errors import InvalidIdentifier, TokenInvalid, Unauthenticated
from storage_proxy.core.ids import parse_agent_id
from storage_proxy.core.tokens import Claims, Purpose, TokenSigner
from storage_proxy.core.wire import Wire
from storage_proxy.web import Principal
from storage_proxy.web.auth import PRINCIPAL

from ..services import Caller, Role

AUDIENCE = "mooring-manager"

# What each role may ask for; the routes name these. `grant`: fresh grants for the mounts of one's sessions; whose they
# are is the use case's to decide.
SCOPES: Mapping[Role, frozenset[str]] = {
    Role.USER: frozenset({"user", "grant"}),
    Role.ADMIN: frozenset({"user", "agent", "admin", "grant"}),
    Role.AGENT: frozenset({"agent", "grant"}),
}


class _TokenData(Wire):
    """The claims of an API token beyond the registered ones."""

    role: Role
    projects: list[uuid.UUID] = Field(default=[], max_length=1000)


class TokenAuth:
    """Makes a `Principal` of the `Authorization` header. Raises `Unauthenticated` or `TokenExpired`."""

    def __init__(self, signer: TokenSigner) -> None:
        self._signer = signer

    async def __call__(self, request: web.Request) -> Principal:
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or not token.strip():
            raise Unauthenticated("No API token was sent.", hint="Send the header Authorization: Bearer TOKEN.")
        try:
            caller = caller_of(self._signer.verify(token.strip(), Purpose.API))
        except TokenInvalid as err:  # 401, not 400: the request may be fine
            raise Unauthenticated(err.message, hint=err.hint) from None
        return Principal(f"{caller.role} {caller.subject}", SCOPES[caller.role], {"caller": caller})


def caller_of(claims: Claims) -> Caller:
    """Raises `TokenInvalid` for claims that no token of this version has."""
    try:
        data = _TokenData.model_validate(dict(claims.data))
        subject = str(parse_agent_id(claims.subject) if data.role is Role.AGENT else uuid.UUID(claims.subject))
    except (ValidationError, ValueError, InvalidIdentifier):
        raise TokenInvalid("The token lacks a claim that this version needs.", hint="Ask for a new one.") from None
    return Caller(subject, data.role, frozenset(data.projects))


def caller(request: web.Request) -> Caller:
    """The caller of an authenticated request."""
    found = request[PRINCIPAL].data["caller"]
    if not isinstance(found, Caller):
        raise Unauthenticated("No API token was sent.")
    return found
