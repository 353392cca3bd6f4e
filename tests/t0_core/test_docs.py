"""The documents say what the code does: promises have tests, units verify, generated files are fresh, links resolve."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from storage_proxy.cli import build_app

ROOT = Path(__file__).resolve().parents[2]


def marked_numbers() -> set[int]:
    """The numbers of all `@pytest.mark.semantics(N)` in the tests."""
    found: set[int] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.semantics":
                found.update(arg.value for arg in node.args if isinstance(arg, ast.Constant))
    return found


def test_every_promise_has_a_test_of_its_number() -> None:
    text = (ROOT / "docs" / "SEMANTICS.md").read_text(encoding="utf-8")
    promised = {int(number) for number in re.findall(r"^(\d+)\. \*\*", text, flags=re.MULTILINE)}
    assert promised == set(range(1, len(promised) + 1))
    assert promised == marked_numbers()


def test_generated_files_are_fresh() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "docs.generate", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "systemd").glob("*.service")), ids=lambda path: path.name)
def test_units_verify(path: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    program = tmp_path / "mooring"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / path.name
    unit.write_text(path.read_text().replace("/usr/bin/mooring", str(program)))
    result = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    complaints = [line for line in result.stderr.splitlines() if path.name in line]
    assert not complaints, result.stderr


def test_the_agent_unit_has_no_mount_namespace_of_its_own() -> None:
    text = (ROOT / "configs" / "systemd" / "mooring-agent.service").read_text()
    settings = {line.partition("=")[0] for line in text.splitlines() if "=" in line and not line.startswith("#")}
    assert not settings & {
        "ProtectSystem",
        "ProtectHome",
        "PrivateTmp",
        "ReadOnlyPaths",
        "PrivateMounts",
        "PrivateDevices",
    }
    assert "KillMode=process" in text


def test_links_in_the_documents_resolve() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_lock_file_pins_every_dependency_with_hashes_and_names_no_host() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text
    locked = set(re.findall(r"^([a-z0-9-]+)==", text, flags=re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    names = {re.split(r"[\[<>=; ]", item)[0].lower() for item in wanted}
    assert names <= locked
    assert text.count("--hash=sha256:") >= len(locked)


def test_the_import_rules_hold() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([str(program)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout


def test_every_route_is_in_the_api_document() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = {re.sub(r"\{\w+\}", "{}", path) for path in re.findall(r"`(/[^` ]*)`", text)}
    served: set[str] = set()
    for folder in ("storage_proxy/api", "storage_proxy/web", "manager_ext/api", "agent_plugin"):
        for path in (ROOT / folder).rglob("*.py"):
            found = re.findall(
                r'\.(?:add_)?(?:get|post|put|delete|patch|head|options)\(\s*f?"([/{][^"]*)"', path.read_text()
            )
            served.update(
                re.sub(r"\{\w+\}", "{}", re.sub(r"^\{one\}", "/v1/folders/{folder}", route)) for route in found
            )
    assert len(served) > 40
    assert served <= documented, served - documented


def documented_commands() -> list[list[str]]:
    """The words after `mooring` of every command line in the documents, up to a `--`."""
    found = []
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^ {4}.*?\.venv/bin/mooring (.*)$", text, flags=re.MULTILINE):
            words = shlex.split(line)
            found.append(words[: words.index("--")] if "--" in words else words)
    return found


@pytest.mark.parametrize("words", documented_commands(), ids=" ".join)
def test_documented_commands_exist_with_their_options(words: list[str]) -> None:
    command: Any = typer.main.get_command(build_app())
    rest = list(words)
    while hasattr(command, "commands"):
        name = rest.pop(0)
        assert name in command.commands, f"no command {name!r}"
        command = command.commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known


def test_every_command_is_in_the_documents() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    commands: Any = typer.main.get_command(build_app())
    missing = [name for name in commands.commands if f"mooring {name}" not in text]
    assert not missing
