"""An agent that kills itself at a step of its journal: `python -m tests.t4_agent.crashing_agent --config FILE`.

The real agent in every other way. `FILE.crash` arms it: `STEP before|after`. At the next transaction of that name it
sends itself SIGKILL, before anything of it is written or right after it is on disk; the file is gone then.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from agent_plugin.journal import Journal, Statement, Step
from storage_proxy.cli import main

_COMMIT = Journal._commit


def arm(config: Path, step: Step, moment: str) -> None:
    """Tells the agent with this configuration file where to die."""
    temporary = _order(config).with_suffix(".new")
    temporary.write_text(f"{step} {moment}")
    temporary.rename(_order(config))


def is_armed(config: Path) -> bool:
    return _order(config).exists()


def _order(config: Path) -> Path:
    return config.with_name(config.name + ".crash")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    config = Path(sys.argv[sys.argv.index("--config") + 1])

    def commit(journal: Journal, step: Step, statements: Sequence[Statement]) -> None:
        moment = ""
        if is_armed(config):
            wanted, _, when = _order(config).read_text().partition(" ")
            if wanted == step:
                moment = when
                _order(config).unlink()
        if moment == "before":
            _die()
        _COMMIT(journal, step, statements)
        if moment == "after":
            _die()

    Journal._commit = commit  # type: ignore[method-assign]
    main(["agent", "serve", *sys.argv[1:]])
