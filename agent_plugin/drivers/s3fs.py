"""The `s3fs` driver: s3fs-fuse in foreground mode, one process per mount key.

What 1.90 does, and what follows from it (each found by trial):
  * It exits with 0 on a wrong secret or a missing bucket, so its exit status means nothing.
  * A session token it takes only from its environment, which anybody of the same user may read in /proc, or from
    `~/.aws/credentials` of the user database, which cannot be one file per mount: temporary credentials are refused
    here.
  * Before 1.92 it lists the whole bucket at start, also for `bucket:/prefix` (`DriverInfo.lists_bucket`).
  * `bucket:/prefix` is one positional argument. Commas, colons, spaces, quotes, percent signs and non-ASCII letters in
    the prefix come through unharmed; only `://` is refused by it, and the path guard lets no `//` get here.
  * An operation tries four keys (`name`, `name/`, `name_$folder$`, a listing), each `retries` times, with a pause of 4
    s after each failure. Measured with 2 retries: 32 s until EIO when the server refuses connections, and
    4 * retries * (readwrite-timeout + 5) s when it takes them and stays silent.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from storage_proxy.core.errors import ConfigError, DriverMissing, InvalidRequest, MountError, Unsupported
from storage_proxy.core.ids import AccessMode
from storage_proxy.core.secrets import Secret
from storage_proxy.core.wire import S3Credential

from ..config import S3fsConfig
from .port import DriverInfo, Launch, MountPlan

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_VERSION = re.compile(r"V(\d+)\.(\d+)")
_REGION = re.compile(r"[A-Za-z0-9-]{1,63}")
_HOST = re.compile(r"[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]")
# Inside -o a comma ends an option and a backslash escapes; neither may come from a path.
_OPTION_SIGNS = re.compile(r"[,\\\x00-\x1f\x7f]")
# What its key file cannot hold: it is read line by line and may contain no white space.
_KEY_TEXT = re.compile(r"[\x21-\x7e]+")
_PREFIX_CHECK_SINCE = (1, 92)
_CHECK_SECONDS = 5.0


class S3fsDriver:
    """See the module. Stateless but for the cached answer of `check`."""

    name = "s3fs"

    def __init__(self, config: S3fsConfig) -> None:
        self._config = config
        self._info: DriverInfo | None = None

    def check(self) -> DriverInfo:
        if self._info is None:
            self._info = self._ask()
        return self._info

    def _ask(self) -> DriverInfo:
        program = shutil.which(self._config.program, path=_PATH)
        if program is None:
            raise DriverMissing(
                f"The program {self._config.program!r} is not installed.",
                hint="Install it (Debian, Ubuntu: apt-get install s3fs), or set [driver.s3fs] program.",
            )
        try:
            answer = subprocess.run(
                [program, "--version"],
                capture_output=True,
                timeout=_CHECK_SECONDS,
                env={"PATH": _PATH},
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.TimeoutExpired) as err:
            raise DriverMissing(f"{program} does not run: {err}.", hint="Install it again.") from None
        found = _VERSION.search(answer.stdout.decode(errors="replace"))
        if found is None:
            raise DriverMissing(f"{program} is not s3fs: it tells no version.", hint="Set [driver.s3fs] program.")
        version = (int(found[1]), int(found[2]))
        return DriverInfo(self.name, program, f"{version[0]}.{version[1]}", lists_bucket=version < _PREFIX_CHECK_SINCE)

    def accept(self, plan: MountPlan, credential: S3Credential) -> None:
        if credential.session_token is not None:
            raise Unsupported(
                f"The s3fs driver cannot use temporary credentials, and the one for {plan.place} has a session token.",
                hint="Issue an access key without a token (IAM user or service account) for this folder.",
            )
        for text in (credential.access_key, credential.secret_key.reveal()):
            if not _KEY_TEXT.fullmatch(text):
                raise Unsupported(
                    "The s3fs driver cannot use this key: it has white space or characters outside ASCII.",
                    hint="Make a new access key.",
                )
        if not _REGION.fullmatch(plan.location.region):
            raise InvalidRequest(f"{plan.location.region[:40]!r} is not a region.", hint="Write it as us-east-1.")
        _checked_url(plan.location.endpoint)

    def credential_file(self, credential: S3Credential) -> Secret:
        # The key=value form: unlike ACCESS:SECRET it allows colons in the secret.
        return Secret(f"AWSAccessKeyId={credential.access_key}\nAWSSecretKey={credential.secret_key.reveal()}\n")

    def read_credential(self, content: Secret) -> S3Credential:
        lines = dict(line.partition("=")[::2] for line in content.reveal().splitlines())
        try:
            return S3Credential(access_key=lines["AWSAccessKeyId"], secret_key=Secret(lines["AWSSecretKey"]))
        except KeyError:
            raise MountError("The credential file of the mount is damaged.", hint="Attach the folder again.") from None

    def launch(self, plan: MountPlan, *, mount_point: Path, credential: Path, scratch: Path) -> Launch:
        place = plan.location
        prefix = place.prefix.rstrip("/")
        return Launch(
            argv=(
                self.check().program,
                f"{place.bucket}:/{prefix}" if prefix else place.bucket,
                str(mount_point),
                "-f",
                "-o",
                ",".join(self._options(plan, credential, scratch)),
            ),
            environment=self._environment(scratch),
            directory=scratch,
        )

    def _options(self, plan: MountPlan, credential: Path, scratch: Path) -> list[str]:
        place, owner, config = plan.location, plan.ownership, self._config
        options = [
            f"passwd_file={_checked_path(credential)}",
            f"url={_checked_url(place.endpoint)}",
            f"endpoint={place.region}",
            "sigv4",  # else it tries the old signature after each refusal
            f"tmpdir={_checked_path(scratch)}",
            "allow_other",
            f"uid={owner.uid}",
            f"gid={owner.gid}",
            f"umask={owner.umask:04o}",
            "nosuid",
            "nodev",
            "ro" if plan.mode is AccessMode.READ_ONLY else "rw",
            "dbglevel=err",
            f"retries={config.retries}",
            f"connect_timeout={config.connect_timeout}",
            f"readwrite_timeout={config.readwrite_timeout}",
            f"parallel_count={config.parallel_count}",
            f"multipart_size={config.multipart_size}",
            f"multireq_max={config.multireq_max}",
            f"max_stat_cache_size={config.max_stat_cache_size}",
            f"stat_cache_expire={config.stat_cache_expire}",
        ]
        if place.path_style:
            options.append("use_path_request_style")
        if config.ensure_diskfree:
            options.append(f"ensure_diskfree={config.ensure_diskfree}")
        if config.kernel_cache:
            options.append("kernel_cache")
        return options

    def _environment(self, scratch: Path) -> dict[str, str]:
        """Built from nothing: AWS_* of the agent must never decide what a mount may read."""
        environment = {"PATH": _PATH, "HOME": str(scratch), "LANG": "C.UTF-8"}
        if self._config.ca_file is not None:
            environment["CURL_CA_BUNDLE"] = str(self._config.ca_file)
        return environment


def _checked_path(path: Path) -> str:
    text = str(path)
    if _OPTION_SIGNS.search(text):
        raise ConfigError(
            f"The path {text!r} has a comma, a backslash or a control character.",
            hint="Choose another runtime-dir and state-dir.",
        )
    return text


def _checked_url(text: str) -> str:
    """Scheme, host and port put together anew; anything else in an endpoint is refused."""
    parts = urlsplit(text)
    host = parts.netloc.rpartition(":")[0] if parts.port is not None else parts.netloc
    if parts.scheme not in ("http", "https") or not _HOST.fullmatch(host) or parts.path.strip("/") or parts.query:
        raise InvalidRequest(
            f"{text[:80]!r} is not the URL of an S3 endpoint.", hint="Write it as https://host or http://host:port."
        )
    return f"{parts.scheme}://{parts.netloc}"
