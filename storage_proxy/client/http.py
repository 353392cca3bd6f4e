"""What the three clients share: one pooled session, deadlines, and error answers turned back into the error tree."""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from collections.abc import AsyncGenerator, Collection, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlsplit

import aiohttp
from pydantic import BaseModel, ValidationError
from yarl import URL

from ..core import errors
from ..core.errors import (
    PROBLEM_BASE,
    ConfigError,
    DeadlineExceeded,
    InternalError,
    LimitExceeded,
    MooringError,
    ServiceUnavailable,
)
from ..core.logs import get_logger, request_id

log = get_logger(__name__)

CONNECT_SECONDS = 5.0
TOTAL_SECONDS = 30.0
MAX_ANSWER_BYTES = 16 * 1024 * 1024
MAX_LINE_BYTES = 1024 * 1024
ATTEMPTS = 3

T = TypeVar("T", bound=BaseModel)

# Where a body gives no code of ours (a reverse proxy in between, another version): the status decides.
_BY_STATUS: Mapping[int, type[MooringError]] = {
    400: errors.UsageError,
    401: errors.Unauthenticated,
    403: errors.Forbidden,
    404: errors.NotFound,
    405: errors.Unsupported,
    409: errors.Conflict,
    413: errors.LimitExceeded,
    422: errors.InvalidRequest,
    429: errors.ServiceUnavailable,
    502: errors.ServiceUnavailable,
    503: errors.ServiceUnavailable,
    504: errors.DeadlineExceeded,
    507: errors.NoSpace,
}


class _NotReached(Exception):
    """Nothing was sent: no connection. Safe to try again, whatever the request. Never leaves this module."""

    def __init__(self, error: ServiceUnavailable) -> None:
        super().__init__(str(error))
        self.error = error


def segment(text: str) -> str:
    """One path segment, percent-encoded as a whole, so that a name never becomes a path."""
    if text in ("", ".", ".."):
        raise errors.InvalidIdentifier(f"{text!r} is not a name or id.", hint="Give the id of the thing.")
    return quote(text, safe="")


class HttpService:
    """One service at a base URL, or at a unix socket. Create it anywhere; the session opens on first use.

    `service` and `remedy` go into the messages: "The <service> does not answer at <where>. <remedy>". Use it as an
    async context manager, or call `close`. Safe for concurrent calls of one event loop.
    """

    def __init__(
        self,
        base_url: str,
        *,
        service: str,
        remedy: str,
        headers: Mapping[str, str] | None = None,
        socket: Path | None = None,
        timeout: float = TOTAL_SECONDS,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
            raise ConfigError(f"The URL of the {service} is not valid.", hint="Write it as http://HOST:PORT.")
        self.base_url = base_url.rstrip("/")
        self.service = service
        self._where = str(socket) if socket else f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        self._remedy = remedy
        self._headers = dict(headers or {})
        self._socket = socket
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections. Idempotent; the next call would open new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector: aiohttp.BaseConnector = (
                aiohttp.UnixConnector(str(self._socket)) if self._socket else aiohttp.TCPConnector(limit=64)
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                # The total is counted by `call`, over all attempts.
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
                headers=self._headers,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    async def get(self, path: str, answer: type[T], **options: Any) -> T:  # Any: the keywords of `call`
        return self.parse(answer, await self.call("GET", path, **options))

    async def post(self, path: str, answer: type[T], **options: Any) -> T:
        return self.parse(answer, await self.call("POST", path, **options))

    async def call(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,  # Any: JSON
        query: Mapping[str, object] | None = None,
        timeout: float | None = None,
        idempotent: bool | None = None,
        accept: Collection[int] = (),
    ) -> bytes:
        """Sends one request and returns the body of a 2xx answer (or of a status in `accept`).

        `path` is already percent-encoded (see `segment`). `timeout` is in seconds for everything, all attempts
        included. Raises the class of the error tree that the service answered with; `ServiceUnavailable` if it cannot
        be reached; `DeadlineExceeded` if it took too long. A connection that was refused, and for idempotent requests
        (GET, HEAD, PUT and DELETE unless `idempotent` says otherwise) a temporary failure, is tried at most three
        times in all.
        """
        limit = self._timeout if timeout is None else timeout
        repeatable = method in ("GET", "HEAD", "PUT", "DELETE") if idempotent is None else idempotent

        def again(error: Exception) -> bool:
            if isinstance(error, _NotReached):
                return True
            # An object store that does not answer was tried again by the proxy already; a deadline leaves no time.
            return repeatable and isinstance(error, ServiceUnavailable) and not isinstance(error, DeadlineExceeded)

        try:
            async with asyncio.timeout(limit):
                for attempt in range(1, ATTEMPTS):
                    try:
                        return await self._send(method, path, body, query, accept)
                    except (_NotReached, ServiceUnavailable) as err:
                        if not again(err):
                            raise
                        pause = 0.1 * 2**attempt * random.uniform(0.5, 1.0)
                        log.info("retry", service=self.service, path=path, attempt=attempt, wait=pause, cause=str(err))
                        await asyncio.sleep(pause)
                return await self._send(method, path, body, query, accept)
        except _NotReached as err:
            raise err.error from None
        except TimeoutError:
            raise DeadlineExceeded(
                f"The {self.service} at {self._where} did not answer {method} {path} within {limit:g} s.",
                hint=self._remedy,
            ) from None

    async def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        query: Mapping[str, object] | None,
        accept: Collection[int],
    ) -> bytes:
        url = URL(self.base_url + path, encoded=True)
        if query:
            url = url.with_query({key: str(value) for key, value in query.items() if value is not None})
        headers = {"X-Request-ID": request_id.get() or uuid.uuid4().hex}
        data: bytes | None = None
        if body is not None:
            data = json.dumps(body, default=str).encode()
            headers["Content-Type"] = "application/json"
        try:
            async with self._open().request(method, url, data=data, headers=headers, allow_redirects=False) as answer:
                content = await self._read(answer)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as err:
            raise self._unreachable(err) from None
        except FileNotFoundError as err:  # the unix socket
            raise self._unreachable(err) from None
        except (aiohttp.ClientError, ConnectionError) as err:
            raise ServiceUnavailable(
                f"The connection to the {self.service} at {self._where} broke ({type(err).__name__}).",
                hint=self._remedy,
            ) from None
        if 200 <= answer.status < 300 or answer.status in accept:
            return content
        raise self.refusal(error_from_answer(answer.status, content, f"{self.service} at {self._where}"))

    async def lines(
        self,
        path: str,
        *,
        idle: float,
        query: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[str, None]:
        """The lines of a streamed answer, without their ends, as they come; ends when the service ends it.

        `idle` in seconds: a service that says nothing for so long, not even a heartbeat, is gone. Raises as `call`, but
        tries nothing again: only the caller knows where to go on. Close the generator (`contextlib.aclosing`).
        """
        url = URL(self.base_url + path, encoded=True)
        if query:
            url = url.with_query({key: str(value) for key, value in query.items() if value is not None})
        sent = {"X-Request-ID": request_id.get() or uuid.uuid4().hex, **(headers or {})}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=idle)
        try:
            async with self._open().get(url, headers=sent, allow_redirects=False, timeout=timeout) as answer:
                if answer.status != 200:
                    content = await self._read(answer)
                    raise self.refusal(error_from_answer(answer.status, content, f"{self.service} at {self._where}"))
                rest = b""
                async for chunk in answer.content.iter_any():
                    *whole, rest = (rest + chunk).split(b"\n")
                    if len(rest) > MAX_LINE_BYTES:
                        raise LimitExceeded(f"A line of the {self.service} is over {MAX_LINE_BYTES} bytes.")
                    for line in whole:
                        yield line.decode(errors="replace").rstrip("\r")
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, FileNotFoundError) as err:
            raise self._unreachable(err).error from None
        except TimeoutError:
            raise DeadlineExceeded(
                f"The {self.service} at {self._where} said nothing for {idle:g} s.", hint=self._remedy
            ) from None
        except (aiohttp.ClientError, ConnectionError) as err:
            raise ServiceUnavailable(
                f"The connection to the {self.service} at {self._where} broke ({type(err).__name__}).",
                hint=self._remedy,
            ) from None

    async def _read(self, answer: aiohttp.ClientResponse) -> bytes:
        content = bytearray()
        async for chunk in answer.content.iter_chunked(64 * 1024):
            content += chunk
            if len(content) > MAX_ANSWER_BYTES:
                raise LimitExceeded(
                    f"The answer of the {self.service} is over {MAX_ANSWER_BYTES} bytes.", hint="Ask for less at once."
                )
        return bytes(content)

    def _unreachable(self, err: Exception) -> _NotReached:
        cause = err.os_error if isinstance(err, aiohttp.ClientConnectorError) else err
        if isinstance(cause, PermissionError):
            reason = "this user may not connect"
        elif isinstance(cause, FileNotFoundError):
            reason = "nothing listens there"
        elif isinstance(cause, ConnectionRefusedError):
            reason = "the connection was refused"
        elif isinstance(cause, TimeoutError):
            reason = f"no connection within {CONNECT_SECONDS:g} s"
        else:
            reason = type(cause).__name__
        return _NotReached(
            ServiceUnavailable(f"The {self.service} does not answer at {self._where}: {reason}.", hint=self._remedy)
        )

    def refusal(self, error: MooringError) -> MooringError:
        """What to raise for an error answer; overridden where an answer means something else to the caller."""
        return error

    def parse(self, model: type[T], content: bytes) -> T:
        """Raises `InternalError` when the service answers in another shape than this version knows."""
        try:
            return model.model_validate_json(content or b"{}")
        except ValidationError as err:
            what = ", ".join(".".join(str(step) for step in item["loc"]) for item in err.errors(include_input=False))
        except MooringError as err:  # a value type of ours that refused its value
            what = err.message
        raise InternalError(
            f"The {self.service} at {self._where} answered in an unknown shape ({what or 'not JSON'}).",
            hint="Check that both run the same version.",
        )


def error_from_answer(status: int, content: bytes, who: str) -> MooringError:
    """The error of a non-2xx answer as an instance of its class; message, hint and detail are kept.

    The class is found by code, problem type and status together, then by fewer of them, at last by the status alone.
    """
    body = _problem(content)
    kind = str(body.get("type", "")).removeprefix(PROBLEM_BASE)
    cls = _class_of(str(body.get("error_code", "")), kind, status)
    title = body.get("title")
    message = body.get("msg") or title
    hint = body.get("hint")
    data = body.get("data")
    if not isinstance(message, str):
        message, hint = f"The {who} answered with status {status} and no explanation.", "Look into its log."
    return cls(
        message,
        hint=hint if isinstance(hint, str) else None,
        detail=data if isinstance(data, dict) else None,
        title=title if isinstance(title, str) else None,
    )


def _problem(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def error_of_code(code: str | None, message: str) -> MooringError:
    """The error of one item of a bulk answer, which has no status of its own; `Conflict` if the code says nothing."""
    known = [cls for cls in errors.walk() if cls.code == code]
    return (known[0] if known else errors.Conflict)(message)


def _class_of(code: str, kind: str, status: int) -> type[MooringError]:
    known = errors.walk()
    # Of classes with the same three faces the deepest wins: it promises more (RecordNotFound is a NotFound).
    for match in (
        [cls for cls in known if (cls.code, cls.problem, cls.status) == (code, kind, status)],
        [cls for cls in known if (cls.code, cls.status) == (code, status)],
    ):
        if match:
            return match[-1]
    return _BY_STATUS.get(status, errors.UsageError if 400 <= status < 500 else InternalError)
