"""The first process of a session without a container runtime: makes its namespaces and root, drops all rights, execs.

Run as a program of its own (`python -I -S enter.py JSON`), so it imports nothing but the standard library. The JSON has
`root`, `binds` ([source, target, read_only]), `uid`, `gid`, `workdir`, `argv`, `env`. Exit codes are podman's: 125 the
session could not be made, 126 and 127 the command could not be run, else the command's own.

The binds stay slaves of the mounts they come from, so an unmount or a repair by the agent reaches the session.
"""

import ctypes
import json
import os
import signal
import sys
import warnings  # noqa: F401  # os.execvpe imports it late, when the new root has no standard library any more
from typing import Any, NoReturn

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x20000000,
    0x40000000,
)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_SLAVE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 19
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
CANNOT_ENTER, CANNOT_INVOKE, NOT_FOUND = 125, 126, 127

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    words = [os.fsencode(text) or None for text in (source, target, kind)]
    check(libc.mount(*words, ctypes.c_ulong(flags), os.fsencode(data) or None), f"mount {target}")


def make_root(root: str, binds: list[tuple[str, str, bool]]) -> None:
    """In the new mount namespace: everything outside stays a slave, the root is a bind of itself."""
    mount("", "/", flags=MS_REC | MS_SLAVE)
    mount(root, root, flags=MS_BIND)
    mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")  # noqa: S108
    for device in ("null", "zero", "random", "urandom"):
        path = f"{root}/dev/{device}"
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o666))
        mount(f"/dev/{device}", path, flags=MS_BIND)
    for source, target, read_only in binds:
        path = root + target
        mount(source, path, flags=MS_BIND)
        if read_only:
            mount("", path, flags=MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    mount("", root, flags=MS_REMOUNT | MS_BIND | MS_RDONLY)


def change_root(root: str) -> None:
    """pivot_root onto itself (pivot_root(2), "pivot_root(".", ".")"): nothing of the machine's tree stays reachable."""
    os.chdir(root)
    if libc.syscall(155 if os.uname().machine == "x86_64" else 41, b".", b".") == 0:
        check(libc.umount2(b".", MNT_DETACH), "umount the old root")
    else:  # the machine itself runs from an initramfs
        os.chroot(".")
    os.chdir("/")


def drop_rights(uid: int, gid: int) -> None:
    """With an empty bounding set even uid 0 has no capability after exec."""
    capability = 0
    while libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def run(spec: dict[str, Any]) -> NoReturn:  # Any: JSON
    libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    try:
        make_root(spec["root"], spec["binds"])
        change_root(spec["root"])
        os.chdir(spec["workdir"])
        drop_rights(spec["uid"], spec["gid"])
    except OSError as err:
        sys.stderr.write(f"the session could not be made: {err.strerror} ({err.filename})\n")
        os._exit(CANNOT_ENTER)
    try:
        os.execvpe(spec["argv"][0], spec["argv"], spec["env"])  # noqa: S606
    except OSError as err:
        sys.stderr.write(f"{spec['argv'][0]}: {err.strerror}\n")
        sys.stderr.flush()
        os._exit(NOT_FOUND if isinstance(err, FileNotFoundError) else CANNOT_INVOKE)


def main() -> int:
    spec = json.loads(sys.argv[1])
    try:
        flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
        check(libc.unshare(flags), "unshare")
    except OSError as err:
        sys.stderr.write(f"the session could not be made: {err.strerror} ({err.filename})\n")
        return CANNOT_ENTER
    child = os.fork()  # the first child is pid 1 of the new pid namespace; all of the session ends with it
    if child == 0:
        run(spec)
    for number in (signal.SIGINT, signal.SIGQUIT):  # a person's Ctrl-C is for the command
        signal.signal(number, signal.SIG_IGN)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
