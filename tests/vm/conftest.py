"""The scenarios run inside a virtual machine, started by `tests/vm/runner.py`; an ordinary run passes them by."""

from __future__ import annotations

import os

collect_ignore = [] if "MOORING_VM" in os.environ else ["scenarios"]
