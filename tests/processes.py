"""What runs on this machine, read from /proc (a minimal Debian has no `ps`)."""

from __future__ import annotations

import os
from pathlib import Path


def command_lines() -> list[str]:
    """The arguments of every process, joined by spaces; kernel threads and zombies have none."""
    lines = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                raw = (place / "cmdline").read_bytes()
            except OSError:
                continue
            if raw:
                lines.append(os.fsdecode(raw).replace("\0", " ").strip())
    return lines
