"""A pytest plugin: runs the layers in the order of their numbers, counts them, and says loudly what was skipped.

A log record of level WARNING or above that a test did not announce fails the test: `@pytest.mark.expects_log("text")`
announces one by a part of its message. "Loudly" means: with the reason, and with the number of skips as the last line.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage_proxy.core import logs

_ROOT = Path(__file__).parent


def layer_of(path: Path) -> str:
    """The layer folder of a test file: t0_core, t1_s3, ..."""
    try:
        return path.relative_to(_ROOT).parts[0]
    except ValueError:
        return "other"


def pytest_configure(config: pytest.Config) -> None:
    logs.configure(component="tests", level="warning", json=True)
    config.addinivalue_line("markers", "expects_log(text): a WARNING or ERROR log record with this text is expected")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: layer_of(item.path))


class _Unexpected(logging.Handler):
    """Collects records that nobody announced."""

    def __init__(self, announced: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._announced = announced
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if not any(text in message for text in self._announced):
            self.found.append(f"{record.levelname} {record.name}: {message[:300]}")


@pytest.fixture(autouse=True)
def no_unannounced_logs(request: pytest.FixtureRequest) -> Iterator[None]:
    announced = [str(mark.args[0]) for mark in request.node.iter_markers("expects_log")]
    handler = _Unexpected(announced)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
    if handler.found:
        pytest.fail("logged without announcement:\n" + "\n".join(handler.found[:5]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: dict[str, Counter[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            layer = layer_of(_ROOT.parent / report.nodeid.partition("::")[0])
            counts.setdefault(layer, Counter())[outcome] += 1
    terminalreporter.section("layers")
    for layer in sorted(counts):
        line = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts[layer].items()))
        terminalreporter.write_line(f"{layer:16} {line}")
    skipped = sum(counter["skipped"] for counter in counts.values())
    terminalreporter.write_line(f"skipped in all: {skipped}" + (" (reasons above)" if skipped else ""))
