"""The `mooring` command.

`main` builds one typer application: the proxy's own sub-commands, then those of the other packages, found by the
entry-point group `mooring.commands`; each entry point is a function `register(app: typer.Typer) -> None`. A plug-in
that fails to load is a warning on standard error and the rest works.

What a command may rely on, in this package and in plug-ins:

* it may be `async def`; it then runs under `asyncio.run`, Ctrl-C and SIGTERM cancel it, its clean-up runs;
* it raises classes of `core.errors` and prints no error itself: `cli.output` renders them (one sentence on standard
  error, or the problem object on standard output after `--json`) and takes the exit code from the class;
* it ends with another exit code by `raise typer.Exit(code)`.

Every module that defines commands is imported for `mooring --help`, so it imports only typer and `core.errors` at its
top, and everything heavy inside the functions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Annotated

import typer

from .output import CommandLine

__all__ = ["build_app", "main"]

COMMAND_GROUP = "mooring.commands"


def _version(value: bool) -> None:
    if value:
        from .. import __version__

        sys.stdout.write(f"mooring {__version__}\n")
        raise typer.Exit


def build_app(*, warn: Callable[[str], None] | None = None) -> typer.Typer:
    """The whole application. `warn` gets one sentence for each plug-in that did not load."""
    app = typer.Typer(
        name="mooring",
        help="S3 buckets as folders in compute sessions.",
        no_args_is_help=True,
        add_completion=True,
        rich_markup_mode=None,  # typer's rich help would double the start-up time of every command
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
        ] = False,
    ) -> None:
        """S3 buckets as folders in compute sessions."""

    from . import config, credential, doctor, folder, node, proxy, session, up, volume

    for part in (up, doctor, folder, volume, node, credential, session, config, proxy):
        part.register(app)
    for point in sorted(entry_points(group=COMMAND_GROUP)):
        try:
            point.load()(app)
        except Exception as err:  # whatever a foreign package does wrong must not take `mooring` down
            if warn is not None:
                warn(
                    f"The commands of plug-in {point.name!r} ({point.value}) did not load: {type(err).__name__}: {err}"
                )
    return app


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command and ends the process with its exit code."""
    line = CommandLine(sys.argv[1:] if args is None else list(args))
    sys.exit(line.run(lambda: build_app(warn=line.warn)))
