"""Runs inside a container as a program of its own: `python reading.py FILE LOG INTERVAL LENGTH`.

Opens and reads FILE every INTERVAL seconds and appends a line `BEGUN ENDED ERRNO` to LOG: monotonic seconds, which are
the same for the host, and 0 for a read that brought LENGTH bytes, -1 for one that brought another number of them. A
read that takes longer than the interval delays the next one, as it would in any program.
"""

import os
import sys
import time


def main(path: str, log: str, interval: float, length: int) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    due = time.monotonic()
    while True:
        begun, code = time.monotonic(), 0
        try:
            file = os.open(path, os.O_RDONLY)
            try:
                code = 0 if len(os.read(file, length + 1)) == length else -1
            finally:
                os.close(file)
        except OSError as err:
            code = err.errno or -1
        os.write(out, b"%.6f %.6f %d\n" % (begun, time.monotonic(), code))
        due = max(due + interval, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))


main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
