"""Reading and answering JSON. Backend.AI's manager sends JSON bodies on every method, also GET and DELETE."""

from __future__ import annotations

import json
from typing import TypeVar

from aiohttp import web
from pydantic import BaseModel

from ..core.config import parse_request
from ..core.errors import InvalidRequest, LimitExceeded

T = TypeVar("T", bound=BaseModel)

MAX_JSON_BYTES = 1024 * 1024


async def read_json(request: web.Request, model: type[T]) -> T:
    """Validates the body; an absent body counts as `{}`. Raises `InvalidRequest` or `LimitExceeded`."""
    body = bytearray()
    async for chunk in request.content.iter_chunked(64 * 1024):
        body += chunk
        if len(body) > MAX_JSON_BYTES:
            raise LimitExceeded(f"The JSON body is over {MAX_JSON_BYTES} bytes.", hint="Send fewer items per request.")
    try:
        data = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError):
        raise InvalidRequest("The body is not valid JSON.", detail={"body": "not valid JSON"}) from None
    if not isinstance(data, dict):
        raise InvalidRequest("The body must be a JSON object.", detail={"body": "not an object"})
    return parse_request(model, data)


def read_query(request: web.Request, model: type[T]) -> T:
    """Validates the query string; of a repeated key the first value counts."""
    return parse_request(model, {key: request.query[key] for key in request.query})


def json_answer(data: BaseModel | dict[str, object], *, status: int = 200) -> web.Response:
    text = data.model_dump_json() if isinstance(data, BaseModel) else json.dumps(data, default=str)
    return web.Response(status=status, text=text, content_type="application/json")
