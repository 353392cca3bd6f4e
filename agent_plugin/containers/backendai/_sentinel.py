"""Runs as a program of its own (`python -I -S _sentinel.py ROOT...`): frees who waits for an agent that was killed.

The kernel notices that nobody reads its questions any more when it asks the next one. So when the agent has ended, this
program looks up a name in every automount point below the roots: each turns catatonic then, and whoever waits in it
gets ENOENT. If another agent has taken over, it answers the look-up, and nothing changes.

It waits for the end of its parent by pidfd: a pipe from the parent may be closed before that of the questions is, and a
question that still got into it would keep this program waiting as well. Imports as little as it can.
"""

import contextlib
import os
import select
import signal
import sys


def main(parent: int, roots: list[bytes]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a service manager ends the whole unit; the agent's end is ours
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(parent)], [], [])
    with open("/proc/self/mountinfo", "rb") as table:
        lines = table.read().splitlines()
    for line in lines:
        left, _, right = line.partition(b" - ")
        place = left.split(b" ")[4]
        if not right.startswith(b"autofs mooring "):
            continue
        if any(place == root or place.startswith(root + b"/") for root in roots):
            with contextlib.suppress(OSError):
                os.lstat(b"%s/.mooring-%d" % (place.replace(rb"\040", b" "), os.getpid()))


main(os.getppid(), [os.fsencode(root).replace(b" ", rb"\040") for root in sys.argv[1:]])
