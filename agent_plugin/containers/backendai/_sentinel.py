"""Runs as a program of its own (`python -I -S _sentinel.py ROOT...`): frees who waits for an agent that was killed.

The kernel notices that nobody reads its questions any more when it asks the next one. So when standard input closes,
which the agent holds open while it lives, this program looks up a name in every automount point below the roots: each
turns catatonic then, and whoever waits in it gets ENOENT. If another agent has taken over, it answers the look-up, and
nothing changes. Imports as little as it can.
"""

import contextlib
import os
import signal
import sys


def main(roots: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a service manager ends the whole unit; the agent's end is ours
    while sys.stdin.buffer.read(4096):
        pass
    with open("/proc/self/mountinfo", "rb") as table:
        lines = table.read().splitlines()
    for line in lines:
        left, _, right = line.partition(b" - ")
        place = left.split(b" ")[4]
        if not right.startswith(b"autofs mooring "):
            continue
        if any(place == root or place.startswith(root + b"/") for root in (os.fsencode(root) for root in roots)):
            with contextlib.suppress(OSError):
                os.lstat(place + b"/.mooring")


main(sys.argv[1:])
