"""Every error that Mooring raises on purpose, with its three faces: HTTP, errno, exit code.

    MooringError
    ├── UsageError                    400  EINVAL     2   the caller's input is wrong
    │   ├── InvalidPath               400  EINVAL     2
    │   ├── InvalidIdentifier         400  EINVAL     2
    │   ├── InvalidRequest            400  EINVAL     2
    │   ├── RangeNotSatisfiable       416  EINVAL     2
    │   └── Unsupported               400  ENOTSUP    2
    ├── ConfigError                   500  EINVAL     3   a setting is wrong; the process does not start
    │   └── InsecureFileMode          500  EPERM      3
    ├── AccessError                   403  EACCES     4
    │   ├── Unauthenticated           401  EACCES     4
    │   ├── TokenExpired              401  EACCES     4
    │   ├── TokenInvalid              400  EACCES     4
    │   ├── Forbidden                 403  EACCES     4
    │   └── ReadOnly                  403  EROFS      4
    ├── NotFound                      404  ENOENT     5
    │   ├── VolumeNotFound            400  ENOENT     5   (400 is Backend.AI's answer)
    │   ├── VFolderNotFound           404  ENOENT     5
    │   ├── FileNotFound              404  ENOENT     5
    │   ├── BucketNotFound            404  ENOENT     5
    │   ├── UploadNotFound            404  ENOENT     5
    │   └── RecordNotFound            404  ENOENT     5
    ├── Conflict                      409  EBUSY      6
    │   ├── AlreadyExists             409  EEXIST     6
    │   ├── NotEmpty                  409  ENOTEMPTY  6
    │   ├── OffsetMismatch            409  EBUSY      6
    │   ├── UploadBusy                409  EBUSY      6
    │   └── InUse                     409  EBUSY      6
    ├── LimitExceeded                 413  EFBIG      7
    │   └── NoSpace                   507  ENOSPC     7
    ├── S3Error                       502  EIO        8   the object store refused or failed; carries its cause
    │   ├── S3AccessDenied            502  EACCES     8
    │   ├── S3BadCredential           502  EACCES     8
    │   ├── S3ClockSkew               502  EACCES     8
    │   ├── S3PreconditionFailed      409  EBUSY      8
    │   └── S3Unavailable             503  EIO        8   temporary
    ├── IntegrityError                502  EIO        8   bytes differ from what was promised
    │   └── ChecksumMismatch          460  EIO        8   (460 is the status of the tus checksum extension)
    ├── ServiceUnavailable            503  EAGAIN     9   another part of Mooring (or SQL, Redis) does not answer
    │   ├── PortTaken                 503  EADDRINUSE 9
    │   └── DeadlineExceeded          504  ETIMEDOUT  9
    ├── MountError                    500  EIO       10
    │   ├── MountNotPermitted         500  EPERM     10
    │   ├── DriverMissing             500  ENOENT    10
    │   └── MountFailed               500  EIO       10
    └── InternalError                 500  EIO        1   a bug: anything not in this tree

One aiohttp middleware (`storage_proxy.web.errors`), one FUSE wrapper and one CLI handler (`storage_proxy.cli`) render
these classes; nothing else builds an error answer. `code` is `domain_operation_detail`: Backend.AI's manager decides
by its domain, so everything that a user does wrong with a folder is in domain `vfolder`.
"""

from __future__ import annotations

import errno as _errno
import logging
from collections.abc import Mapping
from typing import ClassVar

PROBLEM_BASE = "https://api.backend.ai/probs/storage/"


class MooringError(Exception):
    """Base of the tree. The message says what happened, to what; `hint` says what to do next.

    `detail` holds plain values that a caller may see (never a credential); `log` values go to the log only.
    """

    code: ClassVar[str] = "storage-proxy_generic_internal-error"
    problem: ClassVar[str] = "generic"
    title: str = "Internal error"  # per class; an instance may say it more exactly
    status: ClassVar[int] = 500
    errno: ClassVar[int] = _errno.EIO
    exit_code: ClassVar[int] = 1
    temporary: ClassVar[bool] = False
    log_level: ClassVar[int] = logging.WARNING

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        detail: Mapping[str, object] | None = None,
        title: str | None = None,
    ) -> None:
        super().__init__(message)
        if title is not None:
            self.title = title
        self.message = message
        self.hint = hint
        self.detail: dict[str, object] = dict(detail or {})

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message

    def to_problem(self) -> dict[str, object]:
        """The body of an `application/problem+json` answer (RFC 9457, with the fields that Backend.AI reads)."""
        body: dict[str, object] = {
            "type": PROBLEM_BASE + self.problem,
            "title": self.title,
            "status": self.status,
            "error_code": self.code,
            "msg": self.message,
        }
        if self.hint:
            body["hint"] = self.hint
        if self.detail:
            body["data"] = self.detail
        return body


class InternalError(MooringError):
    """Something that the tree does not know: a bug. The cause is in the log under the request id."""

    log_level = logging.ERROR


# --- the caller's input -----------------------------------------------------------------------------------------------


class UsageError(MooringError):
    """The caller asked for something that cannot be right."""

    code = "storage-proxy_request_invalid-parameters"
    problem = "invalid-api-params"
    title = "Invalid API parameters"
    status = 400
    errno = _errno.EINVAL
    exit_code = 2
    log_level = logging.INFO


class InvalidPath(UsageError):
    """A path from outside that is not plainly inside its folder."""

    code = "vfolder_access_invalid-parameters"
    problem = "subpath/invalid"
    title = "Invalid vfolder subpath"


class InvalidIdentifier(UsageError):
    """A folder, scope, volume, bucket or session id that does not parse."""

    code = "vfolder_access_invalid-parameters"


class InvalidRequest(UsageError):
    """A body or query that does not validate; `detail` maps each field to what is wrong with it."""


class RangeNotSatisfiable(UsageError):
    """A range that begins behind the end of the file."""

    code = "vfolder_read_invalid-parameters"
    problem = "range-not-satisfiable"
    title = "Range not satisfiable"
    status = 416


class Unsupported(UsageError):
    """This volume or server cannot do it (see its capabilities)."""

    code = "storage-proxy_request_not-supported"
    problem = "unsupported-operation"
    title = "Unsupported operation"
    errno = _errno.ENOTSUP


# --- settings ---------------------------------------------------------------------------------------------------------


class ConfigError(MooringError):
    """A setting is missing or wrong."""

    code = "storage-proxy_setup_invalid-config"
    problem = "config/invalid"
    title = "Invalid configuration"
    errno = _errno.EINVAL
    exit_code = 3
    log_level = logging.ERROR


class InsecureFileMode(ConfigError):
    """A file with secrets that others than its owner may read."""

    code = "storage-proxy_setup_insecure-file"
    errno = _errno.EPERM


# --- who may do what --------------------------------------------------------------------------------------------------


class AccessError(MooringError):
    """The caller is not allowed to."""

    code = "storage-proxy_auth_forbidden"
    problem = "forbidden"
    title = "Forbidden"
    status = 403
    errno = _errno.EACCES
    exit_code = 4
    log_level = logging.INFO


class Unauthenticated(AccessError):
    """No credential was sent, or none that is known here."""

    code = "storage-proxy_auth_unauthorized"
    problem = "unauthorized"
    title = "Unauthorized"
    status = 401


class TokenExpired(AccessError):
    """A signed token whose time is over."""

    code = "storage-proxy_auth_expired"
    problem = "token/expired"
    title = "Token expired"
    status = 401


class TokenInvalid(AccessError):
    """A token that is not ours, not for this purpose or not for this audience."""

    code = "storage-proxy_auth_invalid-parameters"
    problem = "invalid-api-params"
    title = "Invalid token"
    status = 400


class Forbidden(AccessError):
    """Known caller, but this thing is not theirs."""

    code = "vfolder_access_forbidden"


class ReadOnly(AccessError):
    """A write to a folder that was bound read-only."""

    code = "vfolder_update_forbidden"
    problem = "vfolder/read-only"
    title = "Read-only folder"
    errno = _errno.EROFS


# --- things that are not there ----------------------------------------------------------------------------------------


class NotFound(MooringError):
    """The thing asked for does not exist."""

    code = "storage-proxy_read_not-found"
    problem = "not-found"
    title = "Not found"
    status = 404
    errno = _errno.ENOENT
    exit_code = 5
    log_level = logging.INFO


class VolumeNotFound(NotFound):
    """No volume of that name is configured. 400, as Backend.AI answers it."""

    code = "storage-proxy_access_invalid-parameters"
    problem = "volume/invalid"
    title = "Invalid volume"
    status = 400


class VFolderNotFound(NotFound):
    code = "vfolder_read_not-found"
    problem = "vfolder/not-found"
    title = "VFolder not found"


class FileNotFound(NotFound):
    code = "vfolder_read_not-found"
    problem = "file-not-found"
    title = "File not found"


class BucketNotFound(NotFound):
    code = "object-storage_read_not-found"
    problem = "bucket/object-not-found"
    title = "Bucket not found"


class UploadNotFound(NotFound):
    """An upload session that never was, is finished or has expired."""

    problem = "tus-session-not-found"
    title = "Upload session not found"


class RecordNotFound(NotFound):
    """A row (credential, session, grant, agent) that does not exist or is not the caller's to see."""


# --- things in the way ------------------------------------------------------------------------------------------------


class Conflict(MooringError):
    """The state of the thing forbids the operation now."""

    code = "vfolder_update_conflict"
    problem = "conflict"
    title = "Conflict"
    status = 409
    errno = _errno.EBUSY
    exit_code = 6
    log_level = logging.INFO


class AlreadyExists(Conflict):
    code = "vfolder_create_already-exists"
    problem = "vfolder/already-exists"
    title = "Already exists"
    errno = _errno.EEXIST


class NotEmpty(Conflict):
    code = "vfolder_delete_conflict"
    problem = "vfolder/not-empty"
    title = "Directory not empty"
    errno = _errno.ENOTEMPTY


class OffsetMismatch(Conflict):
    """The upload stands at another offset; `detail["offset"]` says where to go on."""

    code = "storage-proxy_update_conflict"
    problem = "upload-offset-mismatch"
    title = "Upload offset mismatch"


class UploadBusy(Conflict):
    """Another request writes this upload now, or took it over; ask for the offset and go on from there."""

    code = "storage-proxy_update_conflict"
    problem = "tus-lease-held"
    title = "Upload is in use"


class InUse(Conflict):
    """Sessions still hold it."""

    code = "vfolder_delete_conflict"
    problem = "vfolder/in-use"
    title = "In use"


# --- limits -----------------------------------------------------------------------------------------------------------


class LimitExceeded(MooringError):
    """More bytes, entries or requests than allowed."""

    code = "vfolder_update_limit-exceeded"
    problem = "limit-exceeded"
    title = "Limit exceeded"
    status = 413
    errno = _errno.EFBIG
    exit_code = 7
    log_level = logging.INFO


class NoSpace(LimitExceeded):
    """A disk is full."""

    code = "storage-proxy_update_no-space"
    problem = "no-space"
    title = "No space left"
    status = 507
    errno = _errno.ENOSPC
    log_level = logging.ERROR


# --- the object store -------------------------------------------------------------------------------------------------


class S3Error(MooringError):
    """The object store answered with an error. `detail` holds its code, request id, operation, bucket and key."""

    code = "object-storage_access_internal-error"
    problem = "object-storage/failed"
    title = "Object storage error"
    status = 502
    exit_code = 8


class S3AccessDenied(S3Error):
    """The credential is known but may not do this to that bucket or prefix."""

    code = "object-storage_access_forbidden"
    errno = _errno.EACCES


class S3BadCredential(S3Error):
    """Unknown access key, or a secret that does not match it."""

    code = "object-storage_auth_unauthorized"
    errno = _errno.EACCES


class S3ClockSkew(S3Error):
    """This machine's clock and the server's differ by more than 15 minutes, so every signature is refused."""

    code = "object-storage_auth_expired"
    errno = _errno.EACCES


class S3PreconditionFailed(S3Error):
    """A conditional request lost: somebody else wrote the object first."""

    code = "object-storage_update_conflict"
    status = 409
    errno = _errno.EBUSY
    log_level = logging.INFO


class S3Unavailable(S3Error):
    """Refused connection, time-out, 5xx or SlowDown: the same request may succeed later."""

    code = "object-storage_access_unreachable"
    problem = "external/failed"
    title = "Object storage unavailable"
    status = 503
    temporary = True


class IntegrityError(MooringError):
    """Bytes or their hash differ from what was promised; nothing was published."""

    code = "vfolder_access_mismatch"
    problem = "integrity"
    title = "Content mismatch"
    status = 502
    exit_code = 8
    log_level = logging.ERROR


class ChecksumMismatch(IntegrityError):
    """The bytes of an upload do not have the checksum that its sender gave."""

    status = 460
    log_level = logging.WARNING


# --- our own parts ----------------------------------------------------------------------------------------------------


class ServiceUnavailable(MooringError):
    """A part that this one needs does not answer."""

    code = "storage-proxy_request_unreachable"
    problem = "external/failed"
    title = "Service unavailable"
    status = 503
    errno = _errno.EAGAIN
    exit_code = 9
    temporary = True


class PortTaken(ServiceUnavailable):
    """Somebody else listens on the address."""

    code = "storage-proxy_setup_conflict"
    errno = _errno.EADDRINUSE
    temporary = False


class DeadlineExceeded(ServiceUnavailable):
    """A wait ended at its deadline; the message names what was waited for."""

    code = "storage-proxy_request_timeout"
    problem = "deadline-exceeded"
    title = "Deadline exceeded"
    status = 504
    errno = _errno.ETIMEDOUT


# --- mounts -----------------------------------------------------------------------------------------------------------


class MountError(MooringError):
    """A folder could not be put into, or taken out of, the file system tree."""

    code = "mount_create_internal-error"
    problem = "mount/failed"
    title = "Mount failed"
    exit_code = 10
    log_level = logging.ERROR


class MountNotPermitted(MountError):
    """No /dev/fuse, no CAP_SYS_ADMIN, or a kernel that refuses."""

    code = "mount_create_forbidden"
    errno = _errno.EPERM


class DriverMissing(MountError):
    """The program of the mount driver is not installed."""

    code = "mount_create_not-found"
    errno = _errno.ENOENT


class MountFailed(MountError):
    """The driver ran, but no healthy mount appeared before the deadline; the message has the driver's last words."""


def walk(cls: type[MooringError] = MooringError) -> list[type[MooringError]]:
    """Every class of the tree, depth first, in the order of definition."""
    found = [cls]
    for sub in cls.__subclasses__():
        found.extend(walk(sub))
    return found
