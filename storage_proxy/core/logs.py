"""Logs: one JSON object (or one coloured line on a terminal) per event, with request ids and without secrets.

Redaction is the last step before rendering and does not trust the callers: `Secret` values cannot print anyway; values
under a name that sounds secret are masked, and so are credentials inside URLs and query strings of any text.

Only a program of ours calls `configure`. In somebody else's program our loggers are ordinary ones of `logging`, by the
name of their module, with one line of text per event, redacted as well.
"""

from __future__ import annotations

import contextvars
import logging
import re
import sys
import uuid
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog

from .secrets import MASK, Secret

request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)

_SECRET_NAME = re.compile(
    r"secret|password|passwd|token|credential|authorization|signature|private.?key|sealed", re.IGNORECASE
)
_PUBLIC_NAME = re.compile(r"(_id|_ids|_count|_path|_file|_expires_at|_purpose)$", re.IGNORECASE)
_IN_TEXT = re.compile(
    r"(?P<name>token|X-Amz-(?:Signature|Credential|Security-Token)|Authorization|secret[_-]?key|password)"
    r"(?P<sep>=|: ?|%3D)(?P<value>[^&\s\"',;]+)",
    re.IGNORECASE,
)
_USERINFO = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://[^/\s:@]*):[^/\s@]+@", re.IGNORECASE)
_VALID_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")


def new_request_id(incoming: str | None = None) -> str:
    """Sets and returns the id of this request; an incoming one is kept if it is plain."""
    value = incoming if incoming and _VALID_ID.fullmatch(incoming) else uuid.uuid4().hex
    request_id.set(value)
    return value


def redact(value: object, name: str = "") -> object:
    """A copy of a log value that is safe to write down."""
    if isinstance(value, Secret):
        return MASK
    if name and _SECRET_NAME.search(name) and not _PUBLIC_NAME.search(name) and isinstance(value, (str, bytes)):
        return MASK
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, dict):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [redact(item, name) for item in value]
    if isinstance(value, (int, float, bool, type(None))):
        return value
    return redact_text(str(value))


def redact_text(text: str) -> str:
    text = _USERINFO.sub(rf"\g<scheme>:{MASK}@", text)
    return _IN_TEXT.sub(rf"\g<name>\g<sep>{MASK}", text)


def _redact_event(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {key: redact(value, key) for key, value in event.items()}


def _add_request_id(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    current = request_id.get()
    if current is not None:
        event.setdefault("request_id", current)
    return event


def configure(*, component: str, level: str = "info", json: bool | None = None, stream: TextIO | None = None) -> None:
    """Sets up structlog and the standard `logging` module to write the same lines to `stream` (standard error)."""
    out = stream or sys.stderr
    as_json = json if json is not None else not out.isatty()
    global _configured
    _configured = True
    shared = _SHARED
    # Tracebacks become text before redaction sees the event, so a secret inside an exception is masked as well.
    final: list[Any] = [structlog.processors.format_exc_info, _redact_event]
    renderer: Any = (
        structlog.processors.JSONRenderer(default=str)
        if as_json
        else structlog.dev.ConsoleRenderer(colors=out.isatty())
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # These log every request or every connection at INFO or DEBUG, some with signatures in the URL.
    for noisy in ("botocore", "aiobotocore", "aiohttp.access", "urllib3", "asyncio", "aiosqlite", "alembic"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(component=component)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Does not look at structlog's own configuration, which may be somebody else's."""
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[
            structlog.stdlib.filter_by_level,
            *_SHARED,
            structlog.stdlib.PositionalArgumentsFormatter(),
            _hand_over,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    return logger


def _hand_over(logger: Any, method: str, event: MutableMapping[str, Any]) -> Any:  # Any: structlog's own signature
    """To the formatter that `configure` installed; without it as text, level and time being left to `logging`."""
    if _configured:
        return structlog.stdlib.ProcessorFormatter.wrap_for_formatter(logger, method, event)
    plain = _redact_event(logger, method, structlog.processors.format_exc_info(logger, method, event))
    for name in ("level", "logger", "timestamp"):
        plain.pop(name, None)
    trace = plain.pop("exception", None)
    text = " ".join([str(plain.pop("event", "")), *(f"{name}={value!s}" for name, value in plain.items())])
    # Else `logging` would add the traceback of `exception` itself, unredacted.
    return (text if trace is None else f"{text}\n{trace}",), {"exc_info": False}


_configured = False
_SHARED: list[Any] = [  # Any: structlog's own processor type is not exported in a usable form
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    _add_request_id,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]
