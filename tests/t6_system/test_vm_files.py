"""What can be told of the virtual machines without starting one: the scripts, the Vagrantfile, the choices made."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vm import image, tools
from tests.vm.machine import MachineError, call
from tests.vm.qemu import cpu_can_virtualise
from tests.vm.runner import Report, choose, count

ROOT = Path(__file__).parents[2]
VM = ROOT / "tests" / "vm"
SCRIPTS = ("provision.sh", "uml-init.sh")


def run(*argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, cwd=ROOT, env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_are_sound(script: str) -> None:
    assert run("bash", "-n", str(VM / script)).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed; only the syntax was checked")
    result = run("shellcheck", str(VM / script))
    assert result.returncode == 0, result.stdout


def test_provisioning_refuses_before_it_changes_anything() -> None:
    result = run("bash", str(VM / "provision.sh"), "everything")
    assert (result.returncode, "usage" in result.stderr) == (2, True)
    if os.geteuid() == 0:
        prefix = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        text = (VM / "provision.sh").read_text()  # another user may not reach the file itself
        result = run(*prefix, "bash", "-c", text, env={"MOORING_SOURCE": "/nowhere"})
    else:
        result = run("bash", str(VM / "provision.sh"))
    assert result.returncode == 1
    assert "must run as root" in result.stderr


def test_the_units_find_their_program_where_it_is_installed() -> None:
    script = (VM / "provision.sh").read_text()
    for unit in (ROOT / "configs" / "systemd").glob("*.service"):
        (program,) = re.findall(r"(?m)^ExecStart=(\S+)", unit.read_text())
        assert f"{program} #" in script or f"{program}\n" in script, f"{unit.name} starts {program}"


def test_the_vagrantfile_is_valid(tmp_path: Path) -> None:
    if shutil.which("vagrant") is None:
        pytest.skip("vagrant is not installed")
    env = {"VAGRANT_HOME": str(tmp_path), "VAGRANT_CHECKPOINT_DISABLE": "1"}
    for settings in ({}, {"MOORING_VM_DRIVER": "qemu", "MOORING_VM_KERNEL": "/k", "MOORING_VM_INITRD": "/i"}):
        result = run("vagrant", "validate", "--ignore-provider", env={**env, **settings})
        assert result.returncode == 0, result.stdout + result.stderr


def test_an_ordinary_run_passes_the_scenarios_by() -> None:
    argv = (sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/vm")
    result = run(*argv)
    assert result.returncode == 5, f"nothing is collected: {result.stdout}"
    result = run(*argv, env={"MOORING_VM": "x"})
    assert result.returncode == 0, f"all of them can be imported: {result.stdout}"
    names = {path.name for path in (VM / "scenarios").glob("test_*.py")}
    assert names == {name for name in names if f"scenarios/{name}::" in result.stdout}


@pytest.mark.parametrize(
    ("wanted", "kvm", "uml", "chosen"),
    [
        ("auto", True, True, ["qemu"]),
        ("auto", False, True, ["uml", "qemu"]),
        ("auto", False, False, ["qemu"]),
        ("all", False, True, ["uml", "qemu", "vagrant"]),
        ("all", True, False, ["qemu", "vagrant"]),
        ("uml", True, False, ["uml"]),
    ],
)
def test_which_backends_run(wanted: str, kvm: bool, uml: bool, chosen: list[str]) -> None:
    assert choose(wanted, kvm=kvm, uml=uml) == chosen


def test_a_kvm_device_alone_is_not_believed() -> None:
    assert cpu_can_virtualise("processor : 0\nflags\t\t: fpu vme vmx sse\n")
    assert cpu_can_virtualise("flags : fpu svm\n")
    assert not cpu_can_virtualise("flags\t\t: fpu hypervisor svm_lock\nmodel name : vmx\n")


def test_the_cache_knows_what_an_image_is_made_of(tmp_path: Path) -> None:
    for name in ("tests/vm/provision.sh", "tests/vm/image.py", "tests/vm/uml-init.sh", "requirements.lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    first = image.cache_name("bookworm", "2026-01", ["a", "b"], tmp_path)
    assert first.startswith("bookworm-2026-01-")
    assert image.cache_name("bookworm", "2026-01", ["a", "b"], tmp_path) == first
    others = [
        image.cache_name("trixie", "2026-01", ["a", "b"], tmp_path),
        image.cache_name("bookworm", "2026-02", ["a", "b"], tmp_path),
        image.cache_name("bookworm", "2026-01", ["a", "b", "c"], tmp_path),
    ]
    for name in ("tests/vm/provision.sh", "requirements.lock"):
        (tmp_path / name).write_text("changed")
        others.append(image.cache_name("bookworm", "2026-01", ["a", "b"], tmp_path))
    assert len({first, *others}) == 6


def test_the_cache_is_outside_the_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert image.cache_dir() == tmp_path / "mooring" / "vm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert not image.cache_dir().is_relative_to(ROOT)


def test_the_tree_is_packed_without_what_is_made_from_it(tmp_path: Path) -> None:
    archive = tmp_path / "source.tar"
    image.pack_source(archive)
    names = run("tar", "-tf", str(archive)).stdout.splitlines()
    assert {"./pyproject.toml", "./requirements.lock", "./tests/vm/provision.sh"} <= set(names)
    assert not [name for name in names if {".git", ".venv", "__pycache__"} & set(name.split("/"))]


def test_outcomes_are_counted(tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    junit.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="tests.vm.test_a" name="one"/>'
        '<testcase classname="tests.vm.test_a" name="two"><skipped message="no systemd"/></testcase>'
        '<testcase classname="tests.vm.test_b" name="three"><failure message="x">y</failure></testcase>'
        '<testcase classname="tests.vm.test_b" name="four"><error message="x">y</error></testcase>'
        "</testsuite></testsuites>"
    )
    report = Report("uml", boot=3.0)
    count(junit, report)
    assert (report.passed, report.failed, report.skipped) == (
        1,
        ["test_b::three", "test_b::four"],
        ["test_a::two: no systemd"],
    )
    assert not report.good
    assert report.lines()[0].startswith("uml: 1 passed, 2 failed, 1 skipped (boot 3 s")
    assert not Report("uml").good, "a run that ran nothing is none"


def test_missing_programs_are_named_as_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "_SEARCHED", "/nonexistent")
    packages = tools.missing_packages(["qemu", "uml"])
    assert {"mmdebstrap", "qemu-system-x86", "seabios", "user-mode-linux"} <= set(packages)
    assert "vagrant" not in packages
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    said = tools.install_missing(["qemu"])
    assert said is not None
    assert "ask an administrator" in said
    assert "qemu-system-x86" in said


def test_a_command_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="not within 1 s: sleep 60"):
        call(["sleep", "60"], deadline=1)
    result = call(["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (result.code, sorted(result.output.split())) == (7, ["err", "out"])
    with pytest.raises(MachineError, match="exit code 7"):
        result.check("it")
