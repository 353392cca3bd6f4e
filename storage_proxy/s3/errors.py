"""Answers and failures of an S3 server, as classes of the error tree.

`of_code` is the one table; `translate` brings every exception of aiohttp, botocore and asyncio to it. The S3 code,
request id, operation, bucket and key travel in `detail`; access keys and signatures never do.
"""

from __future__ import annotations

import ssl
from xml.etree import ElementTree

import aiohttp
from botocore import exceptions as boto

from ..core.errors import (
    AlreadyExists,
    BucketNotFound,
    ConfigError,
    FileNotFound,
    IntegrityError,
    InvalidIdentifier,
    InvalidRequest,
    LimitExceeded,
    MooringError,
    NoSpace,
    NotFound,
    RecordNotFound,
    S3AccessDenied,
    S3BadCredential,
    S3ClockSkew,
    S3Error,
    S3PreconditionFailed,
    S3Unavailable,
    Unsupported,
    UploadNotFound,
)

_CLASSES: dict[str, type[MooringError]] = {
    "AccessDenied": S3AccessDenied,
    "AllAccessDisabled": S3AccessDenied,
    "AccountProblem": S3AccessDenied,
    "Forbidden": S3AccessDenied,
    "InvalidAccessKeyId": S3BadCredential,
    "InvalidClientTokenId": S3BadCredential,
    "SignatureDoesNotMatch": S3BadCredential,
    "InvalidToken": S3BadCredential,
    "ExpiredToken": S3BadCredential,
    "ExpiredTokenException": S3BadCredential,
    "RequestTimeTooSkewed": S3ClockSkew,
    "RequestExpired": S3ClockSkew,
    "NoSuchBucket": BucketNotFound,
    "NoSuchKey": FileNotFound,
    "NoSuchUpload": UploadNotFound,
    "PreconditionFailed": S3PreconditionFailed,
    "ConditionalRequestConflict": S3PreconditionFailed,
    "InvalidRange": InvalidRequest,
    "BadDigest": IntegrityError,
    "InvalidDigest": IntegrityError,
    "XAmzContentSHA256Mismatch": IntegrityError,
    "SlowDown": S3Unavailable,
    "SlowDownRead": S3Unavailable,
    "SlowDownWrite": S3Unavailable,
    "Throttling": S3Unavailable,
    "TooManyRequests": S3Unavailable,
    "RequestTimeout": S3Unavailable,
    "InternalError": S3Unavailable,
    "ServiceUnavailable": S3Unavailable,
    "OperationAborted": S3Unavailable,
    "XMinioServerNotInitialized": S3Unavailable,
    "NotImplemented": Unsupported,
    "MethodNotAllowed": Unsupported,
    "BucketAlreadyExists": AlreadyExists,
    "BucketAlreadyOwnedByYou": AlreadyExists,
    "EntityTooLarge": LimitExceeded,
    "QuotaExceeded": NoSpace,
    "XMinioStorageFull": NoSpace,
    "XMinioAdminBucketQuotaExceeded": NoSpace,
    "KeyTooLongError": InvalidRequest,
    # IAM and STS
    "NoSuchEntity": RecordNotFound,
    "EntityAlreadyExists": AlreadyExists,
    "InvalidAction": Unsupported,
    "MissingParameter": Unsupported,
    "ServiceFailure": S3Unavailable,
    "InvalidBucketName": InvalidIdentifier,
}
_BY_STATUS: dict[int, type[MooringError]] = {
    403: S3AccessDenied,
    404: NotFound,
    405: Unsupported,
    408: S3Unavailable,
    409: S3PreconditionFailed,
    412: S3PreconditionFailed,
    413: LimitExceeded,
    416: InvalidRequest,
    429: S3Unavailable,
    500: S3Unavailable,
    501: Unsupported,
    502: S3Unavailable,
    503: S3Unavailable,
    504: S3Unavailable,
    507: NoSpace,
}
_HINTS: dict[type[MooringError], str] = {
    S3AccessDenied: "Check the policy of this access key for that bucket and prefix.",
    S3BadCredential: "Check the access key, the secret key and that both belong to this endpoint.",
    S3ClockSkew: "Set this machine's clock (for example: timedatectl set-ntp true) and compare it with the server's.",
    BucketNotFound: "Create the bucket, or correct its name.",
    S3Unavailable: "Check that the S3 server runs and is reachable; the request may be repeated.",
    NoSpace: "Free space on the object store or raise its quota.",
}


def of_code(
    code: str,
    *,
    status: int = 0,
    message: str = "",
    operation: str,
    bucket: str = "",
    key: str = "",
    request_id: str = "",
) -> MooringError:
    """The error for an S3 error code; by HTTP status when the code is not in the table (or the answer had no body)."""
    cls = _CLASSES.get(code)
    if cls is None:
        cls = _BY_STATUS.get(status, S3Error)
        if cls is NotFound and bucket:
            cls = FileNotFound if key else BucketNotFound
    detail: dict[str, object] = {"s3_code": code or f"HTTP {status}", "operation": operation}
    detail |= {n: v for n, v in (("bucket", bucket), ("key", key), ("request_id", request_id)) if v}
    hint = _HINTS.get(cls)
    if code in ("AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"):
        hint = "Set the region of the volume to the region of the bucket."
    words = f": {message.strip()[:200].rstrip('.')}" if message and cls not in (S3BadCredential, FileNotFound) else ""
    return cls(
        f"{_what(operation, bucket, key)}: {_verdict(cls)} ({detail['s3_code']}{words}).", hint=hint, detail=detail
    )


def _what(operation: str, bucket: str, key: str) -> str:
    place = f" s3://{bucket}/{key}" if bucket else ""
    return f"S3 {operation}{place}"


def _verdict(cls: type[MooringError]) -> str:
    return {
        S3AccessDenied: "access denied",
        S3BadCredential: "the server does not accept this credential",
        S3ClockSkew: "this machine's clock and the server's differ too much",
        BucketNotFound: "the bucket does not exist",
        FileNotFound: "there is no such object",
        UploadNotFound: "there is no such multipart upload",
        S3PreconditionFailed: "the object was changed by somebody else",
        S3Unavailable: "the server is not available",
        Unsupported: "the server does not support it",
        IntegrityError: "the server received other bytes than were sent",
        NoSpace: "the object store is full",
    }.get(cls, "refused")


def parse_error_body(body: bytes) -> tuple[str, str, str]:
    """(code, message, request id) of an S3 error document; empty texts when it is something else."""
    if not body.lstrip().startswith(b"<") or b"<!" in body[:512]:
        return "", "", ""
    try:
        root = ElementTree.fromstring(body)  # noqa: S314 - no DTD gets here (checked above), so no entity can expand
    except ElementTree.ParseError:
        return "", "", ""
    found = {element.tag.rpartition("}")[2]: (element.text or "") for element in root.iter()}
    return found.get("Code", ""), found.get("Message", ""), found.get("RequestId", found.get("RequestID", ""))


def translate(err: Exception, *, operation: str, endpoint: str, bucket: str = "", key: str = "") -> MooringError:
    """Any exception of a call to `endpoint`, as a class of the tree. Never contains the request or its headers."""
    if isinstance(err, MooringError):
        return err
    if isinstance(err, boto.ClientError):
        answer = err.response.get("Error", {})
        meta = err.response.get("ResponseMetadata", {})
        return of_code(
            str(answer.get("Code", "")),
            status=int(meta.get("HTTPStatusCode", 0)),
            message=str(answer.get("Message", "")),
            operation=operation,
            bucket=bucket,
            key=key,
            request_id=str(meta.get("RequestId", "")),
        )
    what = _what(operation, bucket, key)
    detail = {"operation": operation, "endpoint": endpoint, "cause": type(err).__name__}
    if isinstance(err, (aiohttp.ClientSSLError, ssl.SSLError, boto.SSLError)):
        return S3Error(
            f"{what}: the TLS certificate of {endpoint} is not accepted.",
            hint="Set ca-file to the certificate authority that signed it, or correct the host name.",
            detail=detail,
        )
    if isinstance(err, (aiohttp.InvalidURL, boto.ParamValidationError, boto.InvalidRegionError)):
        return ConfigError(f"{what}: the endpoint, region or a name is not valid.", detail=detail)
    if isinstance(err, aiohttp.ClientConnectorError):
        reason = err.os_error.strerror or str(err.os_error)
        text = f"{what}: cannot connect to {endpoint} ({reason})."
    elif isinstance(err, (TimeoutError, boto.ReadTimeoutError, boto.ConnectTimeoutError)):
        text = f"{what}: {endpoint} did not answer in time."
    elif isinstance(err, (boto.EndpointConnectionError, boto.ConnectionError)):
        text = f"{what}: cannot connect to {endpoint}."
    elif isinstance(err, boto.BotoCoreError) and not isinstance(err, boto.HTTPClientError):
        return S3Error(f"{what}: the request or its answer could not be handled ({type(err).__name__}).", detail=detail)
    elif isinstance(err, (aiohttp.ClientError, boto.HTTPClientError, OSError)):
        text = f"{what}: the connection to {endpoint} broke ({type(err).__name__})."
    else:
        raise err
    return S3Unavailable(text, hint=_HINTS[S3Unavailable], detail=detail)
