"""What a user may say of a container volume (`--opt key=value`), and what the operator's configuration makes of it.

`docker volume inspect` shows every option to everybody who may ask, and the engine keeps them in files of its own: a
key has no place there. So an option names a credential, the configuration holds it, and what looks like a key is
refused before it is stored anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict

from storage_proxy.core.config import parse_request
from storage_proxy.core.errors import Forbidden, InvalidRequest, ReadOnly, TokenExpired, VolumeNotFound
from storage_proxy.core.ids import AccessMode
from storage_proxy.core.wire import BucketText, Location, Ownership, PrefixText, S3Credential, Wire, make_mount_key

from ..config import PluginCredential, PluginVolume, VolumePluginSection
from ..drivers import MountPlan

_MAX_ID = 2**32 - 2  # the last one means "no change" to the kernel
_OCTAL = re.compile(r"[0-7]{1,4}")
_DECIMAL = re.compile(r"[0-9]{1,10}")
# Names of options of other drivers that carry keys, and whatever else reads like one.
_SECRET = re.compile(r"secret|passw|token|key|auth|credentials", re.IGNORECASE)
# What other volume drivers take, to say more than "unknown".
_FOREIGN = {
    "o": "mount options are the operator's, in [driver.s3fs]",
    "device": "the place is given by bucket and prefix",
    "type": "every volume here is a bucket or a directory of one",
    "url": "the operator names the servers: give volume",
    "endpoint": "the operator names the servers: give volume",
}


def _id(value: object) -> object:
    if isinstance(value, str) and (not _DECIMAL.fullmatch(value) or int(value) > _MAX_ID):
        raise ValueError(f"write a number from 0 to {_MAX_ID}")
    return value


def _umask(value: object) -> object:
    if isinstance(value, str):
        if not _OCTAL.fullmatch(value) or int(value, 8) > 0o777:
            raise ValueError("write it in octal, as 0022")
        return int(value, 8)
    return value


class VolumeOptions(Wire):
    """The options of one volume, validated one by one; whether the operator allows them is asked at each mount.

    `umask` is read as octal text and kept as a number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    volume: str | None = None
    bucket: BucketText | None = None
    prefix: PrefixText = ""
    credential: str | None = None
    mode: AccessMode = AccessMode.READ_WRITE
    uid: Annotated[int, BeforeValidator(_id)] = 0
    gid: Annotated[int, BeforeValidator(_id)] = 0
    umask: Annotated[int, BeforeValidator(_umask)] = 0o022

    @classmethod
    def parse(cls, options: Mapping[str, str]) -> VolumeOptions:
        """From what an engine passes on. Raises `InvalidRequest`, naming each option, never its value."""
        for name in options:
            if name not in cls.model_fields:
                raise _refusal(name)
        return parse_request(cls, dict(options))


def _refusal(name: str) -> InvalidRequest:
    shown = ascii(name[:40])
    if name.lower() in _FOREIGN:
        return InvalidRequest(f"There is no option {shown}: {_FOREIGN[name.lower()]}.", hint=_KNOWN)
    if _SECRET.search(name):
        return InvalidRequest(
            f"The option {shown} is refused: whoever may inspect the volume would read the key in it.",
            hint="Ask the operator to configure the key as [volume-plugin.credentials.NAME] and give credential=NAME.",
        )
    return InvalidRequest(f"There is no option {shown}.", hint=_KNOWN)


_KNOWN = f"Options are {', '.join(VolumeOptions.model_fields)}."


@dataclass(frozen=True, slots=True)
class VolumePlace:
    """Options as the configuration understands them now: what to mount, and with which credential."""

    plan: MountPlan
    credential_name: str
    credential_file: Path

    @classmethod
    def of(cls, options: VolumeOptions, config: VolumePluginSection, driver: str) -> VolumePlace:
        """Raises `VolumeNotFound`, `InvalidRequest`, `Forbidden` (no such permission) or `ReadOnly`."""
        name, volume = _volume(options, config)
        bucket = options.bucket or volume.bucket
        if bucket is None:
            raise InvalidRequest(f"Volume {name} has no bucket of its own.", hint="Add the option bucket=NAME.")
        credential_name, credential = _credential(options, name, volume, config)
        location = Location(
            endpoint=volume.endpoint,
            region=volume.region,
            path_style=volume.path_style,
            bucket=bucket,
            prefix=options.prefix,
        )
        if not any(item.covers(name, bucket, options.prefix) for item in credential.allowances):
            raise Forbidden(
                f"Credential {credential_name} may not be used for s3://{bucket}/{options.prefix} on volume {name}.",
                hint=f"Take another one, or let the operator add it to [volume-plugin.credentials.{credential_name}].",
            )
        if credential.read_only and options.mode is not AccessMode.READ_ONLY:
            raise ReadOnly(f"Credential {credential_name} is for reading only.", hint="Add the option mode=ro.")
        ownership = Ownership(uid=options.uid, gid=options.gid, umask=options.umask)
        # Unlike any id that a manager extension gives: a mount is never shared between the two.
        credential_id = f"local:{credential_name}"
        plan = MountPlan(
            key=make_mount_key(location, credential_id, options.mode, ownership, driver),
            driver=driver,
            volume=name,
            location=location,
            mode=options.mode,
            ownership=ownership,
            credential_id=credential_id,
        )
        return cls(plan, credential_name, credential.file)

    def read_credential(self) -> S3Credential:
        """Raises `ConfigError` for a file that is missing, open to others or holds something else; `TokenExpired`."""
        credential = S3Credential.read(self.credential_file)
        if credential.expires_at is not None and credential.expires_at <= datetime.now(UTC):
            raise TokenExpired(
                f"The credential {self.credential_name} has expired.",
                hint=f"Write a new one into {self.credential_file}.",
            )
        return credential


def _volume(options: VolumeOptions, config: VolumePluginSection) -> tuple[str, PluginVolume]:
    name = options.volume
    if name is None:
        if len(config.volumes) != 1:
            raise InvalidRequest(
                "It is not said on which S3 server.", hint=f"Add volume=, one of: {_names(config.volumes)}."
            )
        (name,) = config.volumes
    if name not in config.volumes:
        raise VolumeNotFound(f"No volume {name[:64]!a} is configured.", hint=f"Take one of: {_names(config.volumes)}.")
    return name, config.volumes[name]


def _credential(
    options: VolumeOptions, volume_name: str, volume: PluginVolume, config: VolumePluginSection
) -> tuple[str, PluginCredential]:
    name = options.credential or volume.credential
    usable = [
        known
        for known, credential in config.credentials.items()
        if any(item.volume == volume_name for item in credential.allowances)
    ]
    if name is None:
        raise InvalidRequest(
            f"Volume {volume_name} has no credential of its own.", hint=f"Add credential=, one of: {_names(usable)}."
        )
    if name not in config.credentials:
        raise Forbidden(f"No credential {name[:64]!a} is configured.", hint=f"Take one of: {_names(usable)}.")
    return name, config.credentials[name]


def _names(names: Mapping[str, object] | list[str]) -> str:
    return ", ".join(sorted(names)) or "(none)"
