"""`make vm-test`: builds or finds the image, runs the scenarios in virtual machines, and says what passed where.

python -m tests.vm.runner test [--backend auto|all|qemu|uml|vagrant] [PYTEST ARGUMENT ...]
python -m tests.vm.runner clean
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import image, qemu, uml, vagrant
from .image import Images
from .machine import GUEST_PYTHON, GUEST_SOURCE, Ability, Machine, MachineError
from .tools import install_missing

BACKENDS = ("uml", "qemu", "vagrant")
SCENARIOS = "tests/vm/scenarios"
POWER_CUT = f"{SCENARIOS}/test_power_cut.py"
_SUITE_SECONDS = 5400.0


def choose(wanted: str, *, kvm: bool, uml: bool) -> list[str]:
    """The backends to run. `auto`: QEMU alone where the hardware helps it; elsewhere the quick one first, then the
    emulated one, which is slow but has systemd.
    """
    if wanted == "all":
        return [name for name in BACKENDS if uml or name != "uml"]
    if wanted != "auto":
        return [wanted]
    return ["qemu"] if kvm or not uml else ["uml", "qemu"]


@dataclass(slots=True)
class Report:
    """What one backend showed. Durations in seconds."""

    machine: str
    boot: float = 0.0
    setup: float = 0.0
    tests: float = 0.0
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def good(self) -> bool:
        return self.error is None and not self.failed and self.passed > 0

    def lines(self) -> list[str]:
        head = (
            f"{self.machine}: {self.passed} passed, {len(self.failed)} failed, {len(self.skipped)} skipped"
            f" (boot {self.boot:.0f} s, set-up {self.setup:.0f} s, scenarios {self.tests:.0f} s)"
        )
        lines = [head, *(f"    FAILED {name}" for name in self.failed), *(f"    skipped {why}" for why in self.skipped)]
        return [*lines, f"    ERROR {self.error}"] if self.error else lines


def count(junit: Path, report: Report) -> None:
    """Adds the outcomes of a JUnit file. A file that is missing or broken is an error of the run."""
    for case in ElementTree.parse(junit).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            report.failed.append(name)
        elif skip is not None:
            report.skipped.append(f"{name}: {skip.get('message')}")
        else:
            report.passed += 1


class Run:
    """One backend from boot to power-off. `place` keeps what helps to find out why something failed."""

    def __init__(self, machine: Machine, place: Path) -> None:
        self._machine = machine
        self._place = place
        self._calls = 0
        self.report = Report(machine.name)

    def all(self, tests: Sequence[str]) -> None:
        report, machine = self.report, self._machine
        began = time.monotonic()
        with machine:
            machine.start()
            report.boot = time.monotonic() - began
            say(f"{machine.name} is up after {report.boot:.0f} s; setting up the host")
            archive = self._place / "source.tar"
            image.pack_source(archive)
            machine.install(archive)
            archive.unlink()
            report.setup = time.monotonic() - began - report.boot
            say(f"set up after {report.setup:.0f} s; running the scenarios")
            began = time.monotonic()
            if tests:
                self._pytest(*tests)
            else:
                self._scenarios()
            report.tests = time.monotonic() - began

    def _scenarios(self) -> None:
        if Ability.POWER_CUT not in self._machine.abilities:
            self._pytest(SCENARIOS)
            return
        self._pytest(SCENARIOS, f"--ignore={POWER_CUT}")
        if self._pytest(POWER_CUT, "-k", "before"):
            say("cutting the power")
            self._machine.cut()
            self._machine.start()
            self._pytest(POWER_CUT, "-k", "after")

    def _pytest(self, *arguments: str) -> bool:
        """Runs pytest inside; shows its output; True if everything passed."""
        self._calls += 1
        machine = self._machine
        settings = {
            "MOORING_VM": machine.name,
            "MOORING_VM_ABILITIES": ",".join(sorted(machine.abilities)),
            "MOORING_VM_SLOWNESS": f"{machine.slowness:g}",
        }
        words = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
        options = ["--junitxml=/tmp/junit.xml", "-p", "no:cacheprovider", "-o", "timeout=1800", "-rA"]
        words += [GUEST_PYTHON, "-m", "pytest", *options, *map(shlex.quote, arguments)]
        result = machine.run(f"cd {GUEST_SOURCE} && rm -f /tmp/junit.xml && {' '.join(words)}", _SUITE_SECONDS)
        (self._place / f"pytest-{self._calls}.txt").write_text(result.output)
        try:
            junit = self._place / f"junit-{self._calls}.xml"
            machine.get("/tmp/junit.xml", junit)
        except MachineError:
            raise MachineError(f"pytest did not run:\n{result.output[-3000:]}") from None
        failed = len(self.report.failed)
        count(junit, self.report)
        if result.code != 0:
            sys.stdout.write(result.output[-20_000:] + "\n")
            if len(self.report.failed) == failed:
                raise MachineError(f"pytest ended with {result.code}")
        return result.code == 0


def make(backend: str, place: Path, images: Images) -> Machine:
    if backend == "uml":
        return uml.Uml(place, images)
    if backend == "vagrant":
        return vagrant.Vagrant(place, images)
    return qemu.Qemu(place, images, os.environ.get("MOORING_VM_ACCEL"))


def _run_one(backend: str, place: Path, images: Images, tests: Sequence[str]) -> Report:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(mode=0o700)
    machine = make(backend, place, images)
    say(f"starting {machine.name}")
    run = Run(machine, place)
    try:
        run.all(tests)
    except MachineError as err:
        run.report.error = str(err)
    finally:
        for pattern in ("*.qcow2", "*.cow", "*.img"):
            for disk in place.glob(pattern):
                disk.unlink()
    say(f"logs of {machine.name} are in {place}")
    return run.report


def run_tests(wanted: str, tests: Sequence[str]) -> int:
    """Exit code: 0 if every backend passed, 1 if something failed, 3 if this host cannot do it."""
    if reason := image.unsupported():
        say(f"nothing can be run: {reason}")
        return 3
    kvm = qemu.may_use_kvm()
    backends = choose(wanted, kvm=kvm, uml=True)
    if missing := install_missing(backends):
        say(missing)
        return 3
    backends = choose(wanted, kvm=kvm, uml=uml.works())
    images = image.ensure(say)
    reports = []
    for backend in backends:
        place = image.cache_dir() / "last" / backend
        place.parent.mkdir(parents=True, exist_ok=True)
        with image.locked(place.with_suffix(".lock")):
            reports.append(_run_one(backend, place, images, tests))
    say("results")
    for report in reports:
        for line in report.lines():
            sys.stdout.write(f"  {line}\n")
    return 0 if all(report.good for report in reports) else 1


def say(text: str) -> None:
    sys.stdout.write(f"vm-test: {text}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.vm.runner", description="Scenarios in virtual machines.")
    commands = parser.add_subparsers(dest="command", required=True)
    test = commands.add_parser("test", help="build the image if need be, and run")
    test.add_argument("--backend", default="auto", choices=["auto", "all", *BACKENDS])
    test.add_argument("tests", nargs="*", help="what to run instead of the scenarios, as pytest takes it")
    commands.add_parser("clean", help="remove the cached images")
    arguments = parser.parse_args()
    if arguments.command == "clean":
        image.clean()
        return 0
    # Ended from outside, it still stops its machines.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return run_tests(arguments.backend or "auto", arguments.tests)
    except MachineError as err:
        say(str(err))
        return 1


if __name__ == "__main__":
    sys.exit(main())
