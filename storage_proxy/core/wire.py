"""Values that travel between the packages: credentials, grants, bind specs. All frozen pydantic models."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from .errors import ConfigError, InvalidPath
from .ids import AccessMode, MountKey, VFolderID, parse_bucket_name, parse_session_id, parse_volume_name
from .paths import RelPath, parse_prefix
from .secrets import Secret, check_private


class Wire(BaseModel):
    """Base of what crosses a process border: frozen; unknown fields are ignored, so newer senders stay readable."""

    model_config = ConfigDict(frozen=True, extra="ignore")


def _vfid(text: str) -> str:
    return str(VFolderID.parse(text))


def _target(text: str) -> str:
    """An absolute path inside a container, without `.` or `..`."""
    if not text.startswith("/"):
        raise InvalidPath(f"Mount target {text[:80]!r} is not absolute.", hint="Write it as /data or /home/work/name.")
    path = RelPath.parse(text.removeprefix("/"))
    if path.is_root:
        raise InvalidPath("A folder cannot be mounted over '/'.", hint="Write a target such as /data.")
    return f"/{path.text}"


VFolderText = Annotated[str, AfterValidator(_vfid)]
VolumeText = Annotated[str, AfterValidator(lambda text: str(parse_volume_name(text)))]
BucketText = Annotated[str, AfterValidator(parse_bucket_name)]
PrefixText = Annotated[str, AfterValidator(parse_prefix)]
SessionText = Annotated[str, AfterValidator(lambda text: str(parse_session_id(text)))]
TargetText = Annotated[str, AfterValidator(_target)]


class S3Credential(Wire):
    """Keys for one endpoint. `session_token` and `expires_at` only for temporary ones (STS)."""

    access_key: str
    secret_key: Secret
    session_token: Secret | None = None
    expires_at: datetime | None = None

    def to_sealable(self) -> Secret:
        """The JSON text that goes into `crypto.seal`; never into a log or an answer."""
        return Secret(
            json.dumps(
                {
                    "access_key": self.access_key,
                    "secret_key": self.secret_key.reveal(),
                    "session_token": self.session_token.reveal() if self.session_token else None,
                    "expires_at": self.expires_at.isoformat() if self.expires_at else None,
                }
            )
        )

    @classmethod
    def from_sealed(cls, opened: Secret) -> S3Credential:
        return cls.model_validate_json(opened.reveal())

    @classmethod
    def read(cls, path: Path) -> S3Credential:
        """From a 0600 file: JSON with access_key and secret_key, or two lines (a third is the session token).

        Raises `ConfigError` for a file that is missing, readable by others, or holds something else.
        """
        check_private(path)
        text = path.read_text(encoding="utf-8")
        try:
            if text.lstrip().startswith("{"):
                data = json.loads(text)
            else:
                lines = [line.strip() for line in text.splitlines() if line.strip()]
                data = dict(zip(("access_key", "secret_key", "session_token"), lines, strict=False))
            found = cls.model_validate(data)
            if not found.access_key:
                raise ValueError("empty access key")
        except ValueError:  # also what pydantic and json raise
            raise ConfigError(
                f"Credential file {path} holds no access key and secret key.",
                hint='Write {"access_key": "...", "secret_key": "..."}, or the two on two lines.',
            ) from None
        return found


class Location(Wire):
    """Where a folder lives."""

    endpoint: str
    region: str = "us-east-1"
    path_style: bool = True
    bucket: BucketText
    prefix: PrefixText = ""


class Ownership(Wire):
    """How files appear on a mount: owner and mask. Part of the mount key."""

    uid: int = Field(default=0, ge=0, le=2**32 - 2)
    gid: int = Field(default=0, ge=0, le=2**32 - 2)
    umask: int = Field(default=0o022, ge=0, le=0o777)


class MountRequest(Wire):
    """What a grant permits: one folder, one way to mount it. The credential is sealed to the agent's public key
    with the grant's `credential_id` as its context."""

    volume: VolumeText
    vfid: VFolderText
    location: Location
    mode: AccessMode
    ownership: Ownership = Ownership()
    target: TargetText
    credential_id: str
    sealed_credential: str

    def mount_key(self, driver: str) -> MountKey:
        """See `make_mount_key`."""
        return make_mount_key(self.location, self.credential_id, self.mode, self.ownership, driver)


def make_mount_key(
    location: Location, credential_id: str, mode: AccessMode, ownership: Ownership, driver: str
) -> MountKey:
    """32 hex digits over everything that makes two attachments share one mount."""
    identity = [
        location.endpoint,
        location.region,
        location.path_style,
        location.bucket,
        location.prefix,
        credential_id,
        mode.value,
        ownership.uid,
        ownership.gid,
        ownership.umask,
        driver,
    ]
    return MountKey(hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32])


class MountState(StrEnum):
    """Life of a mount key; see agent_plugin.attachments."""

    ABSENT = "absent"
    STAGING = "staging"
    LIVE = "live"
    DEAD = "dead"
    DRAINING = "draining"
    FAILED = "failed"


class BindSpec(Wire):
    """What a container runtime needs: bind `source` at `target` with this propagation."""

    session_id: SessionText
    vfid: VFolderText
    mount_key: str
    source: str
    target: TargetText
    read_only: bool
    propagation: str = "rslave"

    def podman_mount(self) -> str:
        """The value of `--mount` for podman and docker."""
        ro = ",readonly" if self.read_only else ""
        return f"type=bind,source={self.source},target={self.target}{ro},bind-propagation={self.propagation}"
