"""The disk images: Debian from packages, once bare (what Vagrant gets) and once provisioned; cached outside the tree.

A cached set is named by suite, month (packages move on with point releases) and a hash of all that decides its content.
Machines never write to it: they start from an overlay.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .machine import MachineError, call

ROOT = Path(__file__).resolve().parents[2]
VM = Path(__file__).resolve().parent
SUITE = os.environ.get("MOORING_VM_SUITE") or "bookworm"
# What makes the packages of provision.sh a machine that boots and can be logged in to.
BOOT_PACKAGES = (
    "systemd-sysv", "udev", "dbus", "openssh-server", "iproute2", "kmod", "sudo", "linux-image-cloud-amd64",
)  # fmt: skip
# With bcache, podman and a PostgreSQL wheel in it; sparse.
DISK_BYTES = 8 * 1024**3
UML_MODULES = Path("/usr/lib/uml/modules")
_SKIPPED = (
    ".git", ".venv", ".vagrant", ".cache", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis",
    ".import_linter_cache", "build", "dist",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Images:
    """Files of one cached set. `disk` is provisioned, `bare` has only the packages; both raw, never written to."""

    place: Path

    @property
    def disk(self) -> Path:
        return self.place / "disk.img"

    @property
    def bare(self) -> Path:
        return self.place / "bare.img"

    @property
    def kernel(self) -> Path:
        return self.place / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.place / "initrd.img"

    @property
    def key(self) -> Path:
        """Private ssh key of root and of vagrant."""
        return self.place / "id_ed25519"

    @property
    def wheels(self) -> Path:
        """The packages of requirements.lock, if this Python and the image's are of one version; else empty."""
        return self.place / "wheels"


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "mooring" / "vm"


def packages() -> list[str]:
    """Every Debian package of the image."""
    listed = call(["bash", str(VM / "provision.sh"), "packages"]).check("provision.sh packages").split()
    return sorted({*listed, *BOOT_PACKAGES})


def cache_name(suite: str, month: str, wanted: list[str], root: Path = ROOT) -> str:
    """Directory name of a set: another one as soon as anything that decides its content changes."""
    digest = hashlib.sha256()
    for path in ("tests/vm/provision.sh", "tests/vm/image.py", "tests/vm/uml-init.sh", "requirements.lock"):
        digest.update((root / path).read_bytes() + b"\0")
    digest.update("\n".join(wanted).encode() + b"\0")
    digest.update("\n".join(sorted(path.name for path in uml_modules())).encode())
    return f"{suite}-{month}-{digest.hexdigest()[:16]}"


def uml_modules() -> list[Path]:
    """Module trees of the installed user-mode kernel."""
    return sorted(UML_MODULES.iterdir()) if UML_MODULES.is_dir() else []


def ensure(say: Callable[[str], None]) -> Images:
    """The images, built if they are not there yet. Needs root. Raises `MachineError`."""
    name = cache_name(SUITE, time.strftime("%Y-%m"), packages())
    place = cache_dir() / name
    place.parent.mkdir(parents=True, exist_ok=True)
    with locked(place.parent / "lock"):
        if not place.is_dir():
            for old in place.parent.glob(f"{SUITE}-*"):
                if not old.name.startswith(f"{SUITE}-{time.strftime('%Y-%m')}-"):
                    shutil.rmtree(old)  # of a month that is over
            partial = place.with_name(f"partial-{os.getpid()}")
            try:
                _Build(partial, say).run()
                partial.rename(place)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        else:
            say(f"image {name} is cached")
    return Images(place)


def clean() -> None:
    shutil.rmtree(cache_dir(), ignore_errors=True)


def pack_source(archive: Path) -> None:
    """The work tree as a tar file, as it is now, without what is made from it."""
    excluded = [f"--exclude={name}" for name in _SKIPPED]
    # A file that somebody is just writing may change while it is read (exit code 1): the next run has it.
    result = call(["tar", "-C", str(ROOT), *excluded, "--owner=0", "--group=0", "-cf", str(archive), "."])
    if result.code > 1:
        result.check("packing the tree")


class _Build:
    def __init__(self, place: Path, say: Callable[[str], None]) -> None:
        self._place = place
        self._images = Images(place)
        self._root = place / "root"
        self._say = say
        self._began = time.monotonic()

    def run(self) -> None:
        if os.geteuid() != 0:
            raise MachineError("building the image needs root")
        self._images.wheels.mkdir(parents=True)
        self._images.place.chmod(0o700)
        self._debian()
        self._boot_files()
        self._file_system(self._images.bare)
        self._provision()
        self._file_system(self._images.disk)
        shutil.rmtree(self._root)
        self._tell("image ready")

    def _tell(self, text: str) -> None:
        self._say(f"{text} ({time.monotonic() - self._began:.0f} s)")

    def _debian(self) -> None:
        self._say(f"building a Debian {SUITE} image from packages; this happens once a month")
        argv = ["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(packages())}"]
        call([*argv, SUITE, str(self._root), *_apt_sources()], deadline=1800).check("mmdebstrap")
        self._tell("packages installed")

    def _boot_files(self) -> None:
        """What makes it boot on a virtual disk, get an address, let us in, and run on the user-mode kernel too."""
        root = self._root
        key = self._images.key
        call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "mooring-vm", "-f", str(key)]).check("ssh-keygen")
        public = key.with_suffix(".pub").read_text()
        _write(root / "etc/fstab", "/dev/vda / ext4 rw,noatime 0 1\n")
        _write(root / "etc/hostname", "mooring-vm\n")
        _write(root / "etc/hosts", "127.0.0.1 localhost\n127.0.1.1 mooring-vm\n")
        network = "[Match]\nName=en* eth*\n[Network]\nDHCP=ipv4\n"
        _write(root / "etc/systemd/network/dhcp.network", network)
        _write(root / "etc/sudoers.d/vagrant", "vagrant ALL=(ALL) NOPASSWD: ALL\n", 0o440)
        _write(root / "root/.ssh/authorized_keys", public, 0o600)
        _write(root / "sbin/mooring-vm-init", (VM / "uml-init.sh").read_text(), 0o755)
        script = (
            "useradd --create-home --shell /bin/bash vagrant && usermod --password '*' vagrant\n"
            "install -d -o vagrant -g vagrant -m 0700 /home/vagrant/.ssh\n"
            "install -o vagrant -g vagrant -m 0600 /root/.ssh/authorized_keys /home/vagrant/.ssh/\n"
            "systemctl enable --quiet systemd-networkd ssh\n"
            "systemctl mask --quiet apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer fstrim.timer "
            "systemd-networkd-wait-online.service\n"
        )
        self._inside(script)
        for modules in uml_modules():
            shutil.copytree(modules, root / "lib/modules" / modules.name, symlinks=True)
            self._inside(f"depmod {modules.name}")
        shutil.copy(next((root / "boot").glob("vmlinuz-*")), self._images.kernel)
        shutil.copy(next((root / "boot").glob("initrd.img-*")), self._images.initrd)

    def _provision(self) -> None:
        """provision.sh, with wheels downloaded by this Python if they fit the image's, else with its own pip."""
        source = self._place / "source.tar"
        pack_source(source)
        version = self._inside("python3 -c 'import sys; print(*sys.version_info[:2])'").strip()
        setting = ""
        if version == "{} {}".format(*sys.version_info[:2]):
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
            pip += ["--only-binary=:all:", "--require-hashes", "--dest", str(self._images.wheels)]
            # The image's patch release may be an older one, and need a package that this Python does without.
            lock = (ROOT / "requirements.lock").read_text()
            wanted = self._place / "wanted.lock"
            wanted.write_text(re.sub(r" ; python_full_version < '3\.\d+\.\d+'[^\\\n]*", " ", lock))
            call([*pip, "--requirement", str(wanted)], deadline=900).check("pip download")
            shutil.copytree(self._images.wheels, self._root / "var/cache/wheels")
            setting = "MOORING_WHEELS=/var/cache/wheels"
            self._tell("wheels downloaded")
        script = (
            "mkdir -p /tmp/source && tar -xf /source.tar -C /tmp/source\n"
            f"{setting} bash /tmp/source/tests/vm/provision.sh\n"
            "rm -rf /tmp/source /source.tar /var/cache/wheels /root/.cache\n"
        )
        shutil.move(source, self._root / "source.tar")
        self._inside(script, deadline=1800)
        self._tell("provisioned")

    def _inside(self, script: str, deadline: float = 300.0) -> str:
        """Runs a script in the tree with /proc of its own and this host's resolver; nothing of it stays mounted."""
        outer = (
            'mount --bind /proc "$1/proc" && mkdir -p "$1/run/host" && cp -L /etc/resolv.conf "$1/run/host/" && '
            'touch "$1/etc/resolv.conf" && mount --bind "$1/run/host/resolv.conf" "$1/etc/resolv.conf" && '
            'exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 chroot "$1" bash -euc "$2"'
        )
        argv = ["unshare", "--mount", "--fork", "bash", "-euc", outer, "-", str(self._root), script]
        return call(argv, deadline=deadline).check("a step inside the image")

    def _file_system(self, disk: Path) -> None:
        with disk.open("wb") as file:
            file.truncate(DISK_BYTES)
        argv = ["mke2fs", "-q", "-t", "ext4", "-L", "root", "-d", str(self._root), str(disk)]
        call(argv, deadline=600, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}).check("mke2fs")
        disk.chmod(0o400)


def _apt_sources() -> list[str]:
    """The sources this host has for the suite, in apt's one-line form; none: mmdebstrap takes its own default."""
    if shutil.which("apt-get") is None:
        return []
    fields = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(SIGNED_BY)|$(ORIGIN)"
    lines = call(["apt-get", "indextargets", "--format", fields, "Created-By: Packages"]).output.splitlines()
    rows = [line.split("|") for line in lines if line.count("|") == 4]
    found = {}
    for uri, release, component, key, origin in rows:
        if origin == "Debian" and release.partition("-")[0] == SUITE:
            options = f"[signed-by={key}] " if key.startswith("/") else ""
            found[f"deb {options}{uri} {release} {component}"] = None
    return list(found)


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One at a time; the others wait."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def unsupported() -> str | None:
    """Why no image can be built here, or None."""
    if platform.machine() != "x86_64":
        return f"the images are for x86_64, this machine is {platform.machine()}"
    return None
