"""`mooring config`: samples, reference and check of the configuration files.

The models are found by the entry-point group `mooring.configs`: a name (`proxy`, `manager`, `agent`) and its
`ConfigModel`.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import UsageError
from .output import JsonOption, print_json, print_line

if TYPE_CHECKING:
    from ..core.config import ConfigModel

CONFIG_GROUP = "mooring.configs"


def _complete(incomplete: str) -> list[str]:
    return [name for name in entry_points(group=CONFIG_GROUP).names if name.startswith(incomplete)]


NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Which process: proxy, manager or agent.", autocompletion=_complete)
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Print samples of configuration files, and check them.", no_args_is_help=True)
    app.add_typer(group, name="config")
    group.command("sample")(sample)
    group.command("reference")(reference)
    group.command("check")(check)


def find_model(name: str) -> type[ConfigModel]:
    """Raises `UsageError` for a name that no installed package brings."""
    points = entry_points(group=CONFIG_GROUP)
    if name not in points.names:
        known = ", ".join(sorted(points.names)) or "none is installed"
        raise UsageError(f"There is no configuration called {name!r}.", hint=f"Known: {known}.")
    model: type[ConfigModel] = points[name].load()
    return model


def sample(name: NameArgument) -> None:
    """Print a commented sample: every key with its meaning and default."""
    from ..core.config import sample as render

    sys.stdout.write(render(find_model(name), title=f"Mooring {name}: sample configuration"))


def reference(name: NameArgument) -> None:
    """Print all keys as Markdown tables."""
    from ..core.config import reference as render

    sys.stdout.write(render(find_model(name)))


def check(
    name: NameArgument,
    file: Annotated[Path, typer.Argument(help="The TOML file to check.")],
    as_json: JsonOption = False,
) -> None:
    """Read a file as its process would at start: keys, values, modes of files with secrets, environment on top."""
    from ..core.config import load_config

    load_config(find_model(name), file)
    if as_json:
        print_json({"config": name, "file": str(file), "ok": True})
    else:
        print_line(f"{file}: ok")
