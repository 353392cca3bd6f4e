"""`Qemu`: the image on QEMU with direct kernel boot, reached by ssh over a forwarded port of 127.0.0.1."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from .image import Images
from .machine import Ability, Machine, MachineError, Result, call, kill_group, spawn, wait_for

_KVM = Path("/dev/kvm")
_MEMORY_MIB = 3072
_PROBE_SECONDS = 15.0
_BOOT_SECONDS = 400.0


def cpu_can_virtualise(cpuinfo: str) -> bool:
    """/dev/kvm alone proves nothing: a paravirtual module behind it runs only its own guests."""
    return re.search(r"^flags\s*:.*\b(vmx|svm)\b", cpuinfo, re.MULTILINE) is not None


def may_use_kvm() -> bool:
    return os.access(_KVM, os.R_OK | os.W_OK) and cpu_can_virtualise(Path("/proc/cpuinfo").read_text())


class Qemu(Machine):
    """`accelerator`: kvm or tcg; None chooses kvm if the CPU has it and a guest kernel really starts under it."""

    abilities = frozenset({Ability.SYSTEMD, Ability.POWER_CUT})

    def __init__(self, place: Path, images: Images, accelerator: str | None = None) -> None:
        super().__init__(place)
        self._images = images
        self._process: subprocess.Popen[bytes] | None = None
        self.accelerator = accelerator or choose_accelerator(images)
        self.name = f"qemu ({self.accelerator})"
        self.slowness = 1.0 if self.accelerator == "kvm" else 8.0
        self._overlay = place / "disk.qcow2"
        self._port = 0

    @property
    def _serial(self) -> Path:
        return self.place / "serial.log"

    def start(self) -> None:
        if not self._overlay.exists():
            create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(self._images.disk), "-F", "raw"]
            call([*create, str(self._overlay)]).check("qemu-img")
        self._port = _free_port()
        argv = _machine_argv(self._images, self.accelerator, self._serial)
        # Writeback honours the guest's flushes, so that a power cut loses what a real one loses, and nothing more.
        # Nobody writes to the image below it, so several machines may share that.
        overlay = f"file={self._overlay},if=none,id=d0,format=qcow2,cache=writeback,backing.file.locking=off"
        argv += ["-drive", overlay]
        argv += ["-device", "virtio-blk-pci,drive=d0", "-append", "root=/dev/vda rw console=ttyS0 net.ifnames=0"]
        argv += ["-netdev", f"user,id=n0,restrict=on,hostfwd=tcp:127.0.0.1:{self._port}-:22"]
        argv += ["-device", "virtio-net-pci,netdev=n0,romfile="]
        self._process = spawn(argv, self.place / "qemu.log")
        try:
            wait_for(self._answers, f"{self.name} can be logged in to; see {self._serial}", _BOOT_SECONDS, pause=1.0)
        except MachineError:
            self.stop()
            raise
        self.run("systemctl is-system-running --wait", _BOOT_SECONDS)

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise MachineError(f"QEMU ended while it booted: {(self.place / 'qemu.log').read_text()[-2000:]}")
        try:
            return call([*self._ssh(), "true"], deadline=30).code == 0
        except MachineError:
            return False

    def _ssh(self) -> list[str]:
        options = "StrictHostKeyChecking=no UserKnownHostsFile=/dev/null BatchMode=yes LogLevel=ERROR ConnectTimeout=20"
        flags = [part for option in options.split() for part in ("-o", option)]
        return ["ssh", "-i", str(self._images.key), "-p", str(self._port), *flags, "root@127.0.0.1"]

    def run(self, command: str, deadline: float = 300.0) -> Result:
        return call([*self._ssh(), command], deadline=deadline)

    def put(self, local: Path, remote: str) -> None:
        call([*self._ssh(), f"cat >{shlex.quote(remote)}"], stdin=local).check(f"copying {local.name} in")

    def get(self, remote: str, local: Path) -> None:
        call([*self._ssh(), f"cat {shlex.quote(remote)}"], stdout=local).check(f"copying {remote} out")

    def cut(self) -> None:
        if self._process is not None:
            kill_group(self._process)
            self._process = None

    def stop(self) -> None:
        process = self._process
        if process is None:
            return
        try:
            if process.poll() is None:
                self.run("systemctl poweroff", 60)
            process.wait(120)
        except (MachineError, subprocess.TimeoutExpired):
            pass
        finally:
            kill_group(process)
            self._process = None


def _machine_argv(images: Images, accelerator: str, serial: Path) -> list[str]:
    accel = "kvm" if accelerator == "kvm" else "tcg,thread=multi"
    return [
        *("qemu-system-x86_64", "-machine", "q35", "-accel", accel, "-cpu", "max", "-smp", "2"),
        *("-m", str(_MEMORY_MIB), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", str(images.kernel), "-initrd", str(images.initrd)),
        *("-device", "virtio-rng-pci", "-serial", f"file:{serial}"),
    ]


def choose_accelerator(images: Images) -> str:
    """kvm only if a guest kernel says its first line under it within 15 s."""
    if not may_use_kvm():
        return "tcg"
    with tempfile.TemporaryDirectory(prefix="mooring-kvm-") as folder:
        serial = Path(folder) / "serial"
        argv = [*_machine_argv(images, "kvm", serial), "-append", "console=ttyS0 panic=-1"]
        process = spawn(argv, Path(folder) / "log")
        try:
            end = time.monotonic() + _PROBE_SECONDS
            while time.monotonic() < end and process.poll() is None:
                if serial.exists() and b"Linux version" in serial.read_bytes():
                    return "kvm"
                time.sleep(0.2)
            return "tcg"
        finally:
            kill_group(process)


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
