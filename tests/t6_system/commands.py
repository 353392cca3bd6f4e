"""Running `mooring` as a user does: as a program, with its output and exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEADLINE = 60.0
PROGRAM = (sys.executable, "-m", "storage_proxy")


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, without what would point a command at some stack of the machine."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MOORING_", "AWS_"))}
    return {**env, "COLUMNS": "200", **(more or {})}


def mooring(
    *args: str, text: str | None = None, env: Mapping[str, str] | None = None, deadline: float = DEADLINE
) -> Done:
    """Runs one command to its end. `text` is its standard input."""
    done = subprocess.run(
        [*PROGRAM, *args],
        input=text if text is not None else "",
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        env=environment(env),
        timeout=deadline,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def ok(*args: str, **options: Any) -> Done:
    done = mooring(*args, **options)
    assert done.code == 0, done
    return done
