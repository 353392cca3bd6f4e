"""The programs of this host that the machines need, installed as .ci/setup installs its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable

from .machine import call

_SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_IMAGE = {"mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "ssh-keygen": "openssh-client", "unshare": "util-linux"}
_PROGRAMS = {
    "qemu": {"qemu-system-x86_64": "qemu-system-x86", "qemu-img": "qemu-utils", "ssh": "openssh-client"},
    "uml": {"linux.uml": "user-mode-linux"},
    "vagrant": {
        "qemu-system-x86_64": "qemu-system-x86",
        "qemu-img": "qemu-utils",
        "vagrant": "vagrant",
        "libvirtd": "libvirt-daemon-system",
        "virsh": "libvirt-clients",
        "dnsmasq": "dnsmasq-base",
        "rsync": "rsync",
        "ip": "iproute2",
        "nsenter": "util-linux",
    },
}
# Not found as programs: firmware, and the plugin that lets vagrant use libvirt.
_COMPANIONS = {"qemu-system-x86": ["seabios", "ipxe-qemu"], "vagrant": ["vagrant-libvirt"]}


def missing_packages(backends: Iterable[str]) -> list[str]:
    """Debian packages of the programs that are not there."""
    wanted = dict(_IMAGE)
    for backend in backends:
        wanted |= _PROGRAMS[backend]
    packages = {package for program, package in wanted.items() if shutil.which(program, path=_SEARCHED) is None}
    for package in list(packages):
        packages.update(_COMPANIONS.get(package, []))
    return sorted(packages)


def install_missing(backends: Iterable[str]) -> str | None:
    """Installs what is missing. Returns a sentence that says what is still missing, or None."""
    names = list(backends)
    packages = missing_packages(names)
    if not packages:
        return None
    asked = f"apt-get install --no-install-recommends {' '.join(packages)}"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"Programs are missing and cannot be installed from here; ask an administrator for: {asked}"
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    call(["apt-get", "update", "--quiet"], deadline=600, env=env)
    result = call(
        ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *packages], deadline=1800, env=env
    )
    if result.code != 0 or missing_packages(names):
        return f"apt-get could not install {' '.join(packages)}: {result.output.strip()[-500:]}"
    return None
