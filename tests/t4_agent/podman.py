"""Real containers: podman with runc or crun, with storage of its own."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from storage_proxy.core.wire import BindSpec

from .node import processes_with, until

CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=1024:4096", "nproc=4096:4096"]
netns = "none"
[engine]
runtime = "{runtime}"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""

_IMAGE = "localhost/t4:1"


class Podman:
    """podman with storage of its own below `place`, and a root file system of one static busybox."""

    def __init__(self, place: Path, settings: str = "", *, seconds: float = 60.0) -> None:
        self._place = place
        self._seconds = seconds  # within which each command must end
        self._conf = place / "containers.conf"
        # Debian 12's crun refuses a host with both cgroup versions mounted; runc is not everywhere.
        runtime = "runc" if shutil.which("runc") else "crun"
        self._conf.write_text(CONTAINERS_CONF.format(runtime=runtime) + settings)
        self.rootfs = place / "rootfs"
        for name in ("bin", "etc", "tmp", "data", "other", "proc", "dev", "sys", "run"):
            (self.rootfs / name).mkdir(parents=True)
        shutil.copy("/bin/busybox", self.rootfs / "bin" / "busybox")
        for name in ("sh", "cat", "ls", "id", "echo", "sha256sum", "stat", "sleep", "touch"):
            (self.rootfs / "bin" / name).symlink_to("busybox")
        (self.rootfs / "etc" / "passwd").write_text("root:x:0:0::/:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n")
        (self.rootfs / "etc" / "group").write_text("root:x:0:\nuser:x:1000:\n")

    async def __call__(self, *arguments: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *("podman", "--root", str(self._place / "root"), "--runroot", str(self._place / "runroot")),
            *arguments,
            env={**os.environ, "CONTAINERS_CONF": str(self._conf), "PODMAN_IGNORE_CGROUPSV1_WARNING": "1"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        async with asyncio.timeout(self._seconds):
            output, _ = await process.communicate()
        return process.returncode or 0, output.decode(errors="replace")

    async def image(self) -> str:
        """The same root file system as an image; its name. Podman 4.3 forgets the volumes of containers without one."""
        archive = self._place / "image.tar"
        if not archive.exists():
            with tarfile.open(archive, "w") as tar:
                tar.add(self.rootfs, ".")
            code, output = await self("import", "--quiet", str(archive), _IMAGE)
            assert code == 0, output
        return _IMAGE

    async def start(
        self,
        *specs: BindSpec,
        command: tuple[str, ...] = ("/bin/sleep", "600"),
        mount: str = "",
        options: tuple[str, ...] = (),
    ) -> str:
        """Starts a container that stays, with these folders; its name. It goes with the test, or by `remove`."""
        name = f"t4-{secrets.token_hex(4)}"
        mounts = [f"--mount={mount or spec.podman_mount()}" for spec in specs]
        code, output = await self(
            *("run", "--detach", "--name", name, *options, *mounts, "--rootfs", f"{self.rootfs}:O", *command)
        )
        assert code == 0, output
        return name

    async def execute(self, name: str, script: str) -> tuple[int, str]:
        """Runs a shell script in a container that `start` started."""
        return await self("exec", name, "/bin/sh", "-c", script)

    async def pid(self, name: str) -> int:
        """The first process of a container, as this host counts."""
        code, output = await self("inspect", "--format", "{{.State.Pid}}", name)
        assert code == 0, output
        return int(output)

    async def remove(self, name: str) -> None:
        code, output = await self("rm", "--force", "--time", "0", name)
        assert code == 0, output

    def allow_user_namespace(self, first: int) -> None:
        """Lets containers run whose root is mapped to `first` (`--uidmap=0:first:65536`)."""
        for place in (self._place.parent, self._place):
            place.chmod(0o711)  # its root file system and storage are looked up as the mapped root
        for path in (self.rootfs, *self.rootfs.rglob("*")):
            os.chown(path, first, first, follow_symlinks=False)

    async def run(self, script: str, *specs: BindSpec, user: str = "1000:1000", mount: str = "") -> tuple[int, str]:
        """Runs a shell script in a container with these folders."""
        mounts = [f"--mount={mount or spec.podman_mount()}" for spec in specs]
        return await self(
            "run", "--rm", "--user", user, *mounts, "--rootfs", f"{self.rootfs}:O", "/bin/sh", "-c", script
        )


async def podman_trouble(made: Podman) -> str | None:
    """Why containers cannot run on this host, if so."""
    code, output = await made.run("exit 7")
    return None if code == 7 else f"podman does not work on this host: {output.strip()[-300:]}"


def missing_programs() -> str | None:
    if shutil.which("podman") is None or not Path("/bin/busybox").exists():
        return "podman or a static busybox is not installed"
    return None


@asynccontextmanager
async def podman_in(place: Path, settings: str = "") -> AsyncIterator[Podman]:
    """A podman of its own below `place`, which must exist; its containers are gone at the end. `settings` go behind the
    usual ones in its containers.conf."""
    made = Podman(place, settings)
    try:
        yield made
    finally:
        await made("rm", "--all", "--force", "--time", "0")
        # The monitor of a container cleans up in a podman of its own, which would mount its storage once more.
        await until(lambda: not processes_with(str(place)), "podman has ended")
