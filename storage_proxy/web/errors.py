"""The HTTP face of the error tree, and the only place that builds error answers, request ids and access lines."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from ..core.errors import PROBLEM_BASE, InternalError, MooringError
from ..core.logs import get_logger, new_request_id

log = get_logger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_REQUEST_ID = "X-Request-ID"


def problem_answer(error: MooringError, request_id: str) -> web.Response:
    body = {**error.to_problem(), "request_id": request_id}
    headers = {_REQUEST_ID: request_id}
    if error.temporary:
        headers["Retry-After"] = "1"
    return web.Response(
        status=error.status,
        text=json.dumps(body, default=str),
        content_type="application/problem+json",
        headers=headers,
    )


def _http_problem(error: web.HTTPException, request_id: str) -> web.Response:
    """aiohttp's own refusals (404, 405, 413, bad expectation) in the same shape."""
    names = {404: "route-not-found", 405: "method-not-allowed", 413: "body-too-large"}
    body = {
        "type": PROBLEM_BASE + names.get(error.status, "generic"),
        "title": error.reason,
        "status": error.status,
        "error_code": "storage-proxy_request_invalid-parameters",
        "msg": error.reason,
        "request_id": request_id,
    }
    headers = {_REQUEST_ID: request_id}
    if isinstance(error, web.HTTPMethodNotAllowed):
        headers["Allow"] = ",".join(sorted(error.allowed_methods))
    return web.Response(
        status=error.status, text=json.dumps(body), content_type="application/problem+json", headers=headers
    )


def _cut_if_begun(request: web.Request) -> None:
    """An error document behind the first bytes of an answer would be taken for its content: cut the connection.

    The document is still made, but finds no connection to go to.
    """
    if request.writer.output_size > 0 and request.transport is not None:
        request.transport.abort()


@web.middleware
async def edge_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Outermost middleware of every application. Access lines carry the path, never the query string (tokens)."""
    request_id = new_request_id(request.headers.get(_REQUEST_ID))
    start = time.perf_counter()
    status, sent = 500, 0
    try:
        response: web.StreamResponse
        try:
            response = await handler(request)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            response = _http_problem(error, request_id)
        except MooringError as error:
            log.log(error.log_level, error.message, error_code=error.code, detail=error.detail, path=request.path)
            _cut_if_begun(request)
            response = problem_answer(error, request_id)
        except (asyncio.CancelledError, ConnectionResetError):
            status = 499  # the client went away
            raise
        except Exception as error:
            log.exception("unexpected error", path=request.path)
            _cut_if_begun(request)
            bug = InternalError(
                f"An unexpected {type(error).__name__} happened here.",
                hint=f"Look for request id {request_id} in the log of this process.",
            )
            response = problem_answer(bug, request_id)
        if not response.prepared:
            response.headers.setdefault(_REQUEST_ID, request_id)
        status = response.status
        # A plain answer is sent after this; its length is known before.
        sent = response.body_length if response.prepared else response.content_length or 0
        return response
    except web.HTTPException as redirect:
        status = redirect.status
        raise
    finally:
        level = logging.DEBUG if request.path in ("/livez", "/readyz", "/health", "/metrics") else logging.INFO
        log.log(
            level,
            "request",
            method=request.method,
            path=request.path,
            status=status,
            duration_ms=round((time.perf_counter() - start) * 1000, 1),
            sent_bytes=sent,
        )
