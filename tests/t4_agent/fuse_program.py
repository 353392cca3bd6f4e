"""A mount program that behaves as it is told: an empty folder, served over the kernel's own protocol (/dev/fuse).

No real one can be made to hang on command without stopping it. Written to a file by `write_program`, it is started by
the s3fs driver in the place of s3fs. It looks into the file `behave` beside it before each answer:

    answer       at once
    late N       sizes of the file system only after N seconds
    hang         never again: it sleeps and nothing wakes it
    work         never, but it wakes up all the time, like one that waits for a server
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import sys
import time
from pathlib import Path

# https://github.com/torvalds/linux/blob/master/include/uapi/linux/fuse.h
_IN = struct.Struct("IIQQIIII")
_OUT = struct.Struct("IiQ")
_ATTR = struct.pack("QII QQQQQQ IIIIIIIIII", 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0o40755, 2, 0, 0, 0, 4096, 0)
_INIT = struct.pack("IIII HHII HHI 28x", 7, 23, 65536, 0, 12, 9, 131072, 1, 0, 0, 0)
_GETATTR, _STATFS, _INIT_CALL, _OPENDIR, _READDIR, _RELEASEDIR, _DESTROY = 3, 17, 26, 27, 28, 29, 38
_LOOKUP, _FORGET, _INTERRUPT, _BATCH_FORGET = 1, 2, 36, 42
_ANSWERS = {
    _INIT_CALL: _INIT,
    _GETATTR: _ATTR,
    _STATFS: bytes(80),
    _OPENDIR: bytes(16),
    _READDIR: b"",
    _RELEASEDIR: b"",
    _DESTROY: b"",
}


def write_program(place: Path) -> Path:
    """The program, ready to be started; `behave` in the same folder says what it does."""
    program = place / "s3fs"
    program.write_text(f"#!{sys.executable} -IS\n" + Path(__file__).read_text(encoding="utf-8"))
    program.chmod(0o700)
    behave(place, "answer")
    return program


def behave(place: Path, how: str) -> None:
    new = place / "behave.new"
    new.write_text(how)
    new.replace(place / "behave")


def main() -> None:
    if sys.argv[1] == "--version":
        print("Amazon Simple Storage Service File System V1.90 (commit:unknown) with OpenSSL")
        return
    orders = Path(__file__).with_name("behave")
    fd = os.open("/dev/fuse", os.O_RDWR)
    data = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"s3fs", os.fsencode(sys.argv[2]), b"fuse.s3fs", 6, data) != 0:
        raise OSError(ctypes.get_errno(), "mount")
    while True:
        try:
            request = os.read(fd, 200_000)
        except OSError as err:
            if err.errno == errno.ENODEV:
                return
            raise
        _, call, unique, *_ = _IN.unpack_from(request)
        how, _, seconds = orders.read_text().partition(" ")
        if how == "hang":
            while True:
                signal.pause()
        while how == "work":
            time.sleep(0.2)
            how = orders.read_text()
        if how == "late" and call == _STATFS:
            time.sleep(float(seconds))
        if call in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            continue
        body = _ANSWERS.get(call)
        code = 0 if body is not None else -(errno.ENOENT if call == _LOOKUP else errno.ENOSYS)
        try:
            os.write(fd, _OUT.pack(_OUT.size + len(body or b""), code, unique) + (body or b""))
        except OSError as err:
            if err.errno != errno.ENOENT:  # the caller was interrupted meanwhile
                raise


if __name__ == "__main__":
    main()
