"""Runs as a program of its own (`python -I -S _prober.py`): asks about paths in children that nobody waits for.

Reads lines `KIND ID PATH-AS-HEX [ID PATH-AS-HEX ...]` from standard input, forks one child per line, and the child asks
one path after the other: `stat` for kind s, `statvfs` for kind v. It answers each with `ID ERRNO` on standard output:
one short write, so answers never mix. A child on a frozen mount answers never; the parent neither knows nor cares. Ends
when standard input closes. Imports nothing but built-in modules, so that it starts in milliseconds and forks cheaply.
"""

import errno
import os
import signal
import sys


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C on a terminal reaches the whole group; our end is stdin's end
    for line in sys.stdin:
        kind, *words = line.split()
        questions = list(zip(words[::2], words[1::2], strict=True))
        try:
            if os.fork() == 0:
                try:
                    for number, raw in questions:
                        code = errno.EIO
                        try:
                            if kind == "s":
                                os.stat(bytes.fromhex(raw))  # noqa: PTH116 - pathlib takes long to import
                            else:
                                os.statvfs(bytes.fromhex(raw))
                            code = 0
                        except OSError as err:
                            code = err.errno or errno.EIO
                        finally:
                            os.write(1, f"{number} {code}\n".encode())
                finally:
                    os._exit(0)
        except OSError as err:
            for number, _ in questions:
                os.write(1, f"{number} {err.errno or errno.EIO}\n".encode())


main()
