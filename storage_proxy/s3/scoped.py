"""Credentials limited to one bucket and prefix, made by the server from a parent credential.

Two ways, both on the S3 port of the endpoint:

* `iam`: an IAM user with one access key and one inline policy (SeaweedFS, RustFS, Ceph). Lives until revoked.
* `sts`: AssumeRole with an inline session policy (MinIO, SeaweedFS, Ceph). Ends with its lifetime, cannot be revoked,
and
  carries a session token, which s3fs cannot take from a file. Hence `iam` first by default.

The policy, found by trial with s3fs 1.90 (`policy_for`; shown for prefix `team1/`, rw):

    s3:ListBucket on the bucket             if s3:prefix is "team1/" or like "team1/*"
    s3:ListBucket on the bucket             if s3:prefix is empty or absent      (only with `bucket_check`)
    s3:GetObject on bucket/team1/*          and for rw: s3:PutObject, s3:DeleteObject, s3:AbortMultipartUpload

s3fs before 1.91 begins with an unfiltered LIST of the bucket's root, whatever prefix it mounts, and ends when that is
refused. `bucket_check` permits it, so whoever holds the key can read the *names* of all objects in the bucket, never
their contents. The key is held by the agent and its mount process, not by the session; pass False for other holders.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal
from xml.etree import ElementTree

from ..core.errors import (
    BucketNotFound,
    DeadlineExceeded,
    FileNotFound,
    MooringError,
    NotFound,
    S3AccessDenied,
    S3BadCredential,
    S3Error,
    Unsupported,
)
from ..core.ids import AccessMode, BucketRef
from ..core.logs import get_logger
from ..core.secrets import Secret
from ..core.wire import S3Credential
from .client import S3Client
from .connection import Connection
from .endpoint import Endpoint

log = get_logger(__name__)

Method = Literal["iam", "sts", "parent"]

POLICY_NAME = "mooring"
MIN_STS_SECONDS = 900  # what STS servers accept at least
READY_SECONDS = 10.0
_POLL_SECONDS = 0.1
_RETRY_METHOD_SECONDS = 300.0  # an operator may grant the missing right meanwhile
_IAM_VERSION = "2010-05-08"
_STS_VERSION = "2011-06-15"


@dataclass(frozen=True, slots=True)
class ScopedCredential:
    """`identity` is the name the server knows the holder by; `revoke_ref` is None for what ends by itself (`sts`) or is
    not ours to revoke (`parent`). `credential.expires_at` is set for `sts` only."""

    credential: S3Credential
    identity: str
    method: Method
    revoke_ref: str | None


def policy_for(ref: BucketRef, mode: AccessMode, *, bucket_check: bool = True) -> dict[str, object]:
    """The smallest policy with which s3fs mounts `ref`; see the module's text."""
    bucket, objects = f"arn:aws:s3:::{ref.bucket}", f"arn:aws:s3:::{ref.bucket}/{ref.prefix}*"
    actions = ["s3:GetObject"]
    if mode is AccessMode.READ_WRITE:
        actions += ["s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]

    def may_list(condition: dict[str, object] | None) -> dict[str, object]:
        statement: dict[str, object] = {"Effect": "Allow", "Action": ["s3:ListBucket"], "Resource": [bucket]}
        return statement | ({"Condition": condition} if condition else {})

    if ref.prefix:
        lists = [may_list({"StringLike": {"s3:prefix": [ref.prefix, f"{ref.prefix}*"]}})]
        if bucket_check:
            # Servers differ in what a missing parameter is: an empty text or a missing condition key.
            lists += [may_list({"StringEquals": {"s3:prefix": ""}}), may_list({"Null": {"s3:prefix": "true"}})]
    else:
        lists = [may_list(None)]
    return {
        "Version": "2012-10-17",
        "Statement": [*lists, {"Effect": "Allow", "Action": actions, "Resource": [objects]}],
    }


class ScopedIssuer:
    """Issues from one parent credential. Use as an async context manager, or `close`. Safe to share between tasks.

    `methods` is the order of trial. A method that the server does not know, or whose limits it does not enforce
    (checked by trial once per method and mode), is left alone for five minutes.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        credential: S3Credential,
        *,
        methods: Sequence[Literal["iam", "sts"]] = ("iam", "sts"),
        bucket_check: bool = True,
        role_arn: str | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._parent = credential
        self._methods = tuple(methods)
        self._bucket_check = bucket_check
        self._role_arn = role_arn
        self._http = Connection(endpoint, credential)
        self._unusable: dict[str, tuple[str, float]] = {}  # method -> (why, until when, by the monotonic clock)
        self._verified: set[tuple[str, AccessMode]] = set()

    async def __aenter__(self) -> ScopedIssuer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.close()

    async def issue(
        self,
        ref: BucketRef,
        mode: AccessMode,
        lifetime: timedelta | None = None,
        name_hint: str = "mount",
        *,
        allow_parent: bool = False,
    ) -> ScopedCredential:
        """A new credential that works already. Not idempotent: each call makes one.

        `lifetime` applies to `sts` (at least 15 minutes; a server that refuses so long a one is passed over); without
        it only `iam` is tried. When nothing works: the parent's own credential if `allow_parent`, else Unsupported. On
        an error or cancel nothing stays at the server.
        """
        reasons: list[str] = []
        makers: dict[str, Callable[[], Awaitable[ScopedCredential]]] = {
            "iam": lambda: self._by_iam(ref, mode, name_hint),
            "sts": lambda: self._by_sts(ref, mode, lifetime, name_hint),
        }
        for method in self._methods:
            if method == "sts" and lifetime is None:
                continue
            why, until = self._unusable.get(method, ("", 0.0))
            if time.monotonic() < until:
                reasons.append(f"{method}: {why}")
                continue
            try:
                scoped = await makers[method]()
            except (Unsupported, S3AccessDenied, NotFound) as err:
                # Whether the server cannot or will not: asking again at once gives no other answer.
                self._give_up_on(method, err)
                reasons.append(f"{method}: {err.message}")
                continue
            except S3Error as err:
                if err.temporary or isinstance(err, S3BadCredential):
                    raise
                reasons.append(f"{method}: {err.message}")
                continue
            return await self._checked(scoped, ref, mode)
        if allow_parent:
            return ScopedCredential(self._parent, self._parent.access_key, "parent", None)
        raise Unsupported(
            f"{self._endpoint.url} makes no credential limited to {ref} ({'; '.join(reasons) or 'no method applies'}).",
            hint="Give the volume's access key the right to manage users, or allow the volume's own key for mounts.",
        )

    def _give_up_on(self, method: str, err: MooringError) -> None:
        self._unusable[method] = (err.message, time.monotonic() + _RETRY_METHOD_SECONDS)

    async def revoke(self, revoke_ref: str) -> None:
        """Ends a credential at once (within the server's own cache time, 1 s on SeaweedFS). Idempotent."""
        kind, _, user = revoke_ref.partition(":")
        if kind != "iam" or not user:
            raise Unsupported(f"{revoke_ref[:80]!r} does not name a credential that can be revoked.")
        try:
            keys = await self._call("iam", "ListAccessKeys", {"UserName": user})
        except NotFound:
            return
        for element in keys.iter():
            if _local(element.tag) == "AccessKeyId" and element.text:
                await self._if_there("DeleteAccessKey", {"UserName": user, "AccessKeyId": element.text})
        await self._if_there("DeleteUserPolicy", {"UserName": user, "PolicyName": POLICY_NAME})
        await self._if_there("DeleteUser", {"UserName": user})

    async def identities(self) -> list[str]:
        """The `revoke_ref` of every credential that some issuer made here and nobody revoked: for cleaning up."""
        users = await self._call("iam", "ListUsers", {})
        return [
            f"iam:{element.text}"
            for element in users.iter()
            if _local(element.tag) == "UserName" and (element.text or "").startswith("mooring-")
        ]

    # --- the two ways -------------------------------------------------------------------------------------------------

    async def _by_iam(self, ref: BucketRef, mode: AccessMode, hint: str) -> ScopedCredential:
        user = _user_name(hint)
        document = json.dumps(policy_for(ref, mode, bucket_check=self._bucket_check))

        created = False
        try:
            await self._call("iam", "CreateUser", {"UserName": user})
            created = True
            # The policy first: a key without one might be allowed more than it should.
            policy = {"UserName": user, "PolicyName": POLICY_NAME, "PolicyDocument": document}
            await self._call("iam", "PutUserPolicy", policy)
            answer = await self._call("iam", "CreateAccessKey", {"UserName": user})
        except BaseException as err:
            # A plain refusal of the first call made nothing; after a time-out or a cancel nobody knows.
            if created or not isinstance(err, MooringError) or err.temporary:
                await self._quietly_revoke(f"iam:{user}")
            raise
        credential = S3Credential(
            access_key=_field(answer, "AccessKeyId"), secret_key=Secret(_field(answer, "SecretAccessKey"))
        )
        return ScopedCredential(credential, user, "iam", f"iam:{user}")

    async def _by_sts(
        self, ref: BucketRef, mode: AccessMode, lifetime: timedelta | None, hint: str
    ) -> ScopedCredential:
        name = _user_name(hint)
        params = {
            "DurationSeconds": str(max(MIN_STS_SECONDS, int(lifetime.total_seconds()) if lifetime else 0)),
            "RoleSessionName": name,
            "Policy": json.dumps(policy_for(ref, mode, bucket_check=self._bucket_check)),
        }
        if self._role_arn:
            params["RoleArn"] = self._role_arn
        answer = await self._call("sts", "AssumeRole", params)
        expires = datetime.fromisoformat(_field(answer, "Expiration"))
        credential = S3Credential(
            access_key=_field(answer, "AccessKeyId"),
            secret_key=Secret(_field(answer, "SecretAccessKey")),
            session_token=Secret(_field(answer, "SessionToken")),
            expires_at=expires if expires.tzinfo else expires.replace(tzinfo=UTC),
        )
        return ScopedCredential(credential, name, "sts", None)

    # --- proof --------------------------------------------------------------------------------------------------------

    async def _checked(self, scoped: ScopedCredential, ref: BucketRef, mode: AccessMode) -> ScopedCredential:
        try:
            async with S3Client(self._endpoint, scoped.credential) as holder:
                await self._wait_until_it_works(holder, ref)
                if (scoped.method, mode) not in self._verified:
                    await self._prove_limits(holder, ref, mode)
                    if ref.prefix:
                        self._verified.add((scoped.method, mode))
        except Unsupported as err:
            self._give_up_on(scoped.method, err)
            await self._quietly_revoke(scoped.revoke_ref)
            raise
        except BaseException:
            await self._quietly_revoke(scoped.revoke_ref)
            raise
        return scoped

    async def _wait_until_it_works(self, holder: S3Client, ref: BucketRef) -> None:
        last: MooringError | None = None
        try:
            async with asyncio.timeout(READY_SECONDS):
                while True:
                    try:
                        await holder.list_page(ref.bucket, ref.prefix, max_keys=1)
                    except (S3AccessDenied, S3BadCredential) as err:
                        last = err
                        await asyncio.sleep(_POLL_SECONDS)
                    else:
                        return
        except TimeoutError:
            raise DeadlineExceeded(
                f"A new credential for {ref} did not work within {READY_SECONDS:g} s ({last}).",
                hint="Check that the bucket exists and that the server's gateways share their users.",
            ) from None

    async def _prove_limits(self, holder: S3Client, ref: BucketRef, mode: AccessMode) -> None:
        """What must be refused is tried: the neighbour `team1-x/` of `team1/`, and writing for ro. Raises
        Unsupported.
        """
        neighbour = (
            BucketRef(ref.bucket, f"{ref.prefix.rstrip('/')}-{secrets.token_hex(4)}/")
            if ref.prefix
            else BucketRef(f"{ref.bucket[:50]}-{secrets.token_hex(4)}")
        )
        key = neighbour.key("mooring-probe")
        await self._must_fail(f"list {neighbour}", holder.list_page(neighbour.bucket, neighbour.prefix, max_keys=1))
        await self._must_fail(f"read {neighbour}", holder.get(neighbour.bucket, key))
        writes = [(neighbour.bucket, key)]
        if mode is AccessMode.READ_ONLY:
            writes.append((ref.bucket, ref.key(f".mooring-probe-{secrets.token_hex(4)}")))
        for bucket, target in writes:
            try:
                await self._must_fail(f"write s3://{bucket}/{target}", holder.put(bucket, target, b""))
            except Unsupported:
                async with S3Client(self._endpoint, self._parent) as parent:
                    await parent.delete(bucket, target)
                raise

    async def _must_fail(self, what: str, call: Awaitable[object]) -> None:
        try:
            await call
        except (S3AccessDenied, BucketNotFound):
            return
        except FileNotFound:
            pass  # it was allowed to look
        raise Unsupported(
            f"{self._endpoint.url} does not enforce the limits of its credentials: one could {what}.",
            hint="Look into the server's policy settings, or give each folder its own credential.",
        )

    # --- IAM and STS calls --------------------------------------------------------------------------------------------

    async def _call(
        self, service: Literal["iam", "sts"], action: str, params: Mapping[str, str]
    ) -> ElementTree.Element:
        version = _IAM_VERSION if service == "iam" else _STS_VERSION

        async def call() -> ElementTree.Element:
            body = await self._http.query(service, action, {"Version": version, **params})
            try:
                if b"<!" in body:
                    raise ElementTree.ParseError
                return ElementTree.fromstring(body)  # noqa: S314 - no DTD gets here, so no entity can expand
            except ElementTree.ParseError:
                raise Unsupported(f"{self._endpoint.url} does not answer {action} as {service.upper()} does.") from None

        # Making a user or a key twice would leave one behind, so what creates is not repeated.
        attempts = 1 if action.startswith("Create") else None
        return await self._http.bounded(action, call, attempts=attempts)

    async def _if_there(self, action: str, params: Mapping[str, str]) -> None:
        try:
            await self._call("iam", action, params)
        except NotFound:
            return

    async def _quietly_revoke(self, revoke_ref: str | None) -> None:
        """Clean-up after an error, to its end even if cancelled; a failure is logged, the first error matters more."""
        if revoke_ref is None:
            return
        task = asyncio.ensure_future(self.revoke(revoke_ref))
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                continue
            except Exception as err:
                log.warning("scoped credential not revoked", revoke_ref=revoke_ref, error=str(err))


def _user_name(hint: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9.-]+", "-", hint).strip("-")[:32]
    return f"mooring-{plain or 'mount'}-{secrets.token_hex(8)}"


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _field(answer: ElementTree.Element, name: str) -> str:
    for element in answer.iter():
        if _local(element.tag) == name and element.text:
            return element.text
    raise Unsupported(f"The server's answer has no {name}.")
