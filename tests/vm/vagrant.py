"""`Vagrant`: `vagrant up` with the project's Vagrantfile, on a libvirt of its own in namespaces of its own.

The bare image is the box, so the machine gets its packages from there and everything else from provision.sh, through
Vagrant's own provisioner. libvirt's bridge, dnsmasq, settings, state and sockets are seen only inside the namespaces,
which end with their first process; a libvirt that runs on the host is not touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import shutil
import subprocess
from pathlib import Path

from .image import DISK_BYTES, ROOT, Images
from .machine import Ability, Machine, MachineError, Result, call, kill_group, spawn, wait_for
from .qemu import choose_accelerator

_UP_SECONDS = 2400.0
# $1: a directory for what libvirt writes. Its QEMU runs as root: another user could not reach the images.
_HOLDER = r"""
for folder in /etc/libvirt /var/lib/libvirt /var/cache/libvirt /run/libvirt; do
    mkdir -p "$1$folder" "$folder"
    [ "$folder" = /etc/libvirt ] && cp -a /etc/libvirt/. "$1/etc/libvirt/"
    mount --bind "$1$folder" "$folder"
done
printf 'user = "root"\ngroup = "root"\nsecurity_driver = "none"\n' >/etc/libvirt/qemu.conf
rm -rf /etc/libvirt/qemu/networks
ip link set lo up
touch "$1/ready"
exec sleep infinity
"""


class Vagrant(Machine):
    abilities = frozenset({Ability.SYSTEMD})

    def __init__(self, place: Path, images: Images) -> None:
        super().__init__(place)
        self._images = images
        kvm = choose_accelerator(images) == "kvm"
        self.name = f"vagrant (libvirt, {'kvm' if kvm else 'qemu'})"
        self.slowness = 1.0 if kvm else 8.0
        self._driver = "kvm" if kvm else "qemu"
        token = secrets.token_hex(3)
        self._box = f"mooring/vm-{token}"
        self._pool = f"mooring-{token}"
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._source: Path | None = None

    @property
    def _env(self) -> dict[str, str]:
        settings = {
            "BOX": self._box,
            "DRIVER": self._driver,
            "KERNEL": str(self._images.kernel),
            "INITRD": str(self._images.initrd),
            "KEY": str(self._images.key),
            "POOL": self._pool,
            "WHEELS": str(self._images.wheels),
            "BOOT_TIMEOUT": "900",
        }
        return {
            **os.environ,
            **{f"MOORING_VM_{name}": value for name, value in settings.items()},
            "VAGRANT_CWD": str(ROOT),
            "VAGRANT_DOTFILE_PATH": str(self.place / "dot"),
            "VAGRANT_HOME": str(self.place / "home"),
            "VAGRANT_DEFAULT_PROVIDER": "libvirt",
            "VAGRANT_CHECKPOINT_DISABLE": "1",
        }

    def start(self) -> None:
        try:
            self._start_libvirt()
            self._add_box()
            result = self._vagrant("up", "--provider=libvirt", "--no-color", deadline=_UP_SECONDS)
            (self.place / "vagrant-up.log").write_text(result.output)
            result.check("vagrant up")
        except BaseException:
            self.stop()
            raise
        self.run("systemctl is-system-running --wait", 300)

    def _start_libvirt(self) -> None:
        state = self.place / "libvirt"
        state.mkdir()
        holder = ["unshare", "--mount", "--net", "bash", "-euc", _HOLDER, "-", str(state)]
        self._daemons.append(spawn(holder, self.place / "holder.log"))
        wait_for((state / "ready").exists, f"the namespaces are there; see {self.place / 'holder.log'}", 30)
        for daemon in ("virtlogd", "libvirtd"):
            program = shutil.which(daemon, path=f"{os.environ['PATH']}:/usr/sbin") or daemon
            self._daemons.append(spawn([*self._enter, program], self.place / f"{daemon}.log"))
        wait_for(lambda: self._virsh("list").code == 0, "libvirtd answers", 120)
        pool = self.place / "pool"
        pool.mkdir()
        self._virsh("pool-define-as", self._pool, "dir", "--target", str(pool)).check("a storage pool")
        self._virsh("pool-start", self._pool).check("a storage pool")

    def _add_box(self) -> None:
        build = self.place / "box"
        build.mkdir()
        disk = build / "box.img"
        call(["qemu-img", "convert", "-O", "qcow2", str(self._images.bare), str(disk)], deadline=600).check("qemu-img")
        metadata = {"provider": "libvirt", "format": "qcow2", "virtual_size": DISK_BYTES // 1024**3}
        (build / "metadata.json").write_text(json.dumps(metadata))
        (build / "Vagrantfile").write_text('Vagrant.configure("2") { }\n')
        box = self.place / "mooring.box"
        call(["tar", "-C", str(build), "-cf", str(box), "."], deadline=300).check("tar")
        self._vagrant("box", "add", "--name", self._box, str(box), deadline=300).check("vagrant box add")
        shutil.rmtree(build)
        box.unlink()

    @property
    def _enter(self) -> list[str]:
        """Runs a program where libvirt is."""
        return ["nsenter", f"--target={self._daemons[0].pid}", "--mount", "--net", "--"]

    def _inside(self, *argv: str, deadline: float = 120.0) -> Result:
        return call([*self._enter, *argv], deadline=deadline, env=self._env, cwd=self.place)

    def _virsh(self, *arguments: str) -> Result:
        return self._inside("virsh", "--connect", "qemu:///system", *arguments)

    def _vagrant(self, *arguments: str, deadline: float) -> Result:
        return self._inside("vagrant", *arguments, deadline=deadline)

    def _ssh(self) -> list[str]:
        """ssh as root: `vagrant ssh` takes seconds for each command."""
        config = self.place / "ssh-config"
        if not config.exists():
            text = self._vagrant("ssh-config", deadline=120).check("vagrant ssh-config")
            config.write_text(text)
        argv = [*self._enter, "ssh", "-F", str(config), "-o", "BatchMode=yes"]
        return [*argv, "-o", "User=root", "default"]

    def run(self, command: str, deadline: float = 300.0) -> Result:
        return call([*self._ssh(), command], deadline=deadline)

    def put(self, local: Path, remote: str) -> None:
        call([*self._ssh(), f"cat >{shlex.quote(remote)}"], stdin=local).check(f"copying {local.name} in")

    def get(self, remote: str, local: Path) -> None:
        call([*self._ssh(), f"cat {shlex.quote(remote)}"], stdout=local).check(f"copying {remote} out")

    def install(self, archive: Path) -> None:
        """`vagrant up` has brought the tree and provisioned; once more shows that this changes nothing."""
        self._vagrant("provision", "--no-color", deadline=900).check("vagrant provision")

    def stop(self) -> None:
        if not self._daemons:
            return
        with contextlib.suppress(MachineError):
            self._vagrant("destroy", "--force", "--no-color", deadline=300)
            for name in self._virsh("net-list", "--name").output.split():
                self._virsh("net-destroy", name)  # ends its dnsmasq
        for process in reversed(self._daemons):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.terminate()
                process.wait(20)
            kill_group(process)
        self._daemons.clear()
        for name in ("pool", "home", "dot", "box", "libvirt"):
            shutil.rmtree(self.place / name, ignore_errors=True)
