"""Runs as a program of its own (`python -I -S _mender.py SECONDS`): puts mounts into other mount namespaces.

Reads lines `ID PID STARTED MOUNT-ID ATTRIBUTES SOURCE TARGET` (paths as hex) from standard input and forks one child
per line. The child clones the mount at SOURCE, enters the mount namespace and the root of that process and puts the
clone onto TARGET, if the mount with that id is still what is seen there. It answers `ID STEP ERRNO`; the step `done` is
success.

A process that has entered a container's root is at home nowhere: it opens nothing there but the mount point, loads
nothing, and ends. One that hangs is ended by its own alarm after SECONDS.
"""

import errno
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # -S leaves only the standard library

from agent_plugin.kernel.namespaces import start_time
from agent_plugin.kernel.syscalls import (
    Attribute,
    Propagation,
    clone_tree,
    enter_mount_namespace,
    move_mount,
    set_mount,
)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    seconds = float(sys.argv[1])
    for line in sys.stdin:
        number, pid, started, mount_id, attributes, source, target = line.split()
        try:
            if os.fork() == 0:
                signal.setitimer(signal.ITIMER_REAL, seconds)
                job = _Job(int(pid), int(started), int(mount_id), Attribute(int(attributes)))
                code = errno.EIO
                try:
                    code = job.run(Path(os.fsdecode(bytes.fromhex(source))), os.fsdecode(bytes.fromhex(target)))
                except OSError as err:
                    code = err.errno or errno.EIO
                finally:
                    os.write(1, f"{number} {job.step} {code}\n".encode())
                    os._exit(0)
        except OSError as err:
            os.write(1, f"{number} fork {err.errno or errno.EIO}\n".encode())


class _Job:
    def __init__(self, pid: int, started: int, mount_id: int, attributes: Attribute) -> None:
        self.step = "source"
        self._pid = pid
        self._started = started
        self._mount_id = mount_id
        self._attributes = attributes

    def run(self, source: Path, target: str) -> int:
        """Returns 0, or an errno; `step` tells how far it came."""
        tree = clone_tree(source)
        # A slave of its source: what is stacked there later arrives by itself, and nothing goes back.
        set_mount(tree, attributes=self._attributes, propagation=Propagation.SLAVE)
        self.step = "gone"
        process = os.pidfd_open(self._pid)
        root = os.open(f"/proc/{self._pid}/root", os.O_PATH | os.O_DIRECTORY)
        if start_time(self._pid) != self._started:  # else both descriptors are of another process
            return errno.ESRCH
        self.step = "enter"
        descriptors = os.open("/proc/self/fdinfo", os.O_PATH | os.O_DIRECTORY)
        enter_mount_namespace(process)
        os.fchdir(root)
        os.chroot(".")
        self.step = "changed"
        place = os.open(target, os.O_PATH | os.O_NOFOLLOW)
        if _mount_id(descriptors, place) != self._mount_id:
            return errno.ESTALE
        self.step = "move"
        move_mount(tree, place)
        self.step = "done"
        return 0


def _mount_id(descriptors: int, fd: int) -> int:
    """The id, as in mountinfo, of the mount that a descriptor is on. Asks the kernel only, not the mount."""
    info = os.open(str(fd), os.O_RDONLY, dir_fd=descriptors)
    for line in os.read(info, 4096).splitlines():
        name, _, value = line.partition(b":")
        if name == b"mnt_id":
            return int(value)
    return -1


main()
