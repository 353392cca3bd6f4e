"""The CLI face of the error tree, and how results are shown.

One handler for every command: a `MooringError` becomes one sentence on standard error, or its problem object on
standard output after `--json`; the exit code comes from its class. What is not in the tree is a bug: a short sentence,
and the traceback in a private file (or on standard error with MOORING_DEBUG=1). Results go to standard output,
everything said on the way (progress, warnings, questions) to standard error, so a pipe gets only the result.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import inspect
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..core.errors import DeadlineExceeded, InternalError, MooringError, NoSpace, UsageError

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", "-n", help="Only show what would be done.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]


class Terminated(Exception):
    """SIGTERM arrived and the command has cleaned up."""


class CommandLine:
    """One run of the program: its arguments and how its end is shown."""

    def __init__(self, args: Sequence[str]) -> None:
        self.args = list(args)
        # Also known before (and without) parsing, so that a usage error can be answered in JSON as well.
        own = self.args[: self.args.index("--")] if "--" in self.args else self.args
        self.as_json = "--json" in own

    def warn(self, sentence: str) -> None:
        warn(sentence)

    def run(self, build: Callable[[], typer.Typer]) -> int:
        """Builds the application, runs one command, returns the exit code. Nothing escapes but SystemExit."""
        stdout = sys.stdout
        try:
            try:
                app = build()
                run_coroutines(app)
                code = typer.main.get_command(app).main(args=self.args, prog_name="mooring", standalone_mode=False)
                sys.stdout.flush()
            except BrokenPipeError:
                return _close_pipe()
            except KeyboardInterrupt:
                return EXIT_INTERRUPTED
            except Terminated:
                return EXIT_TERMINATED
            except typer.Exit as err:
                return err.exit_code
            except SystemExit as err:
                if sys.stdout is not stdout:  # typer's own way to end when the reader of our output went away
                    sys.stdout = stdout
                    return _close_pipe()
                return err.code if isinstance(err.code, int) else 1
            except typer.Abort:
                sys.stderr.write("Aborted.\n")
                return 1
            except Exception as err:
                return self.fail(err)
            return code if isinstance(code, int) else 0
        except BrokenPipeError:
            return _close_pipe()

    def fail(self, err: BaseException) -> int:
        """Shows an error and returns its exit code."""
        error = _as_tree(err) or _usage_error(err)
        if error is not None and type(err).__name__ == "NoArgsIsHelpError":
            sys.stderr.write(f"{error.message}\n")  # a group without a sub-command: its message is its help
            return error.exit_code
        if error is None:
            if isinstance(err, OSError) and err.errno == errno.EPIPE:
                return _close_pipe()
            error = self._bug(err)
        elif debugging():
            traceback.print_exception(err)
        if self.as_json:
            sys.stdout.write(json.dumps({**error.to_problem(), "exit_code": error.exit_code}, default=str) + "\n")
            sys.stdout.flush()
        else:
            sys.stderr.write(f"error: {one_line(str(error))}\n")
        return error.exit_code

    def _bug(self, err: BaseException) -> MooringError:
        text = "".join(traceback.format_exception(err))
        sentence = f"An unexpected {type(err).__name__} happened in 'mooring {' '.join(_words(self.args))}'."
        if debugging():
            sys.stderr.write(text)
            return InternalError(sentence, hint="The traceback is above; please report it.")
        try:
            from ..core.logs import redact_text

            fd, name = tempfile.mkstemp(prefix="mooring-", suffix=".traceback")
            with os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(redact_text(text))
        except OSError:
            return InternalError(sentence, hint="MOORING_DEBUG=1 shows the traceback.")
        return InternalError(sentence, hint=f"The traceback is in {name}; please report it.")


def debugging() -> bool:
    return os.environ.get("MOORING_DEBUG", "") not in ("", "0")


def one_line(text: str) -> str:
    """Text for a terminal: control characters (a file name may hold them) shown as escapes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _words(args: Sequence[str]) -> list[str]:
    """The command words before the first option or value; the values may be private."""
    words = []
    for arg in args[:2]:
        if not arg.isidentifier():
            break
        words.append(arg)
    return words


def _as_tree(err: BaseException) -> MooringError | None:
    """The error of our tree behind an exception, looking into groups of a TaskGroup."""
    if isinstance(err, MooringError):
        return err
    if isinstance(err, BaseExceptionGroup):
        found = [error for error in map(_as_tree, err.exceptions) if error is not None]
        return found[0] if found else None
    if isinstance(err, TimeoutError) and not err.args:
        return DeadlineExceeded("The operation did not end in time.", hint="Try again, or see `mooring doctor`.")
    if isinstance(err, OSError) and err.filename is not None and err.strerror:
        if err.errno == errno.ENOSPC:
            return NoSpace(f"The disk of {err.filename} is full.", hint="Free space, then try again.")
        return UsageError(f"{err.filename}: {err.strerror}.")
    if isinstance(err, OSError) and err.errno == errno.ENOSPC:
        return NoSpace("The disk is full.", hint="Free space, then try again.")
    return None


def _usage_error(err: BaseException) -> MooringError | None:
    """typer's own refusal of the command line (an unknown option, a missing argument), known by its shape."""
    describe = getattr(err, "format_message", None)
    if describe is None or not isinstance(getattr(err, "exit_code", None), int):
        return None
    context = getattr(err, "ctx", None)
    path = context.command_path if context is not None else "mooring"
    message = str(describe()).strip()
    if message and not message.endswith((".", "?", "!")):
        message += "."
    return UsageError(message, hint=f"Try '{path} --help'.")


def _close_pipe() -> int:
    """The reader of our output went away (`| head`): end quietly, and keep the interpreter from complaining at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(null, stream.fileno())
    return 128 + signal.SIGPIPE


# --- asynchronous commands --------------------------------------------------------------------------------------------


def run_coroutines(app: typer.Typer) -> None:
    """Lets every `async def` command of `app` and of its groups run under `run_async`."""
    for command in app.registered_commands:
        if command.callback is not None and inspect.iscoroutinefunction(command.callback):
            command.callback = _synchronous(command.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            run_coroutines(group.typer_instance)


def _synchronous(function: Callable[..., Coroutine[Any, Any, T]]) -> Callable[..., T]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> T:  # Any: typer calls with what the signature of `function` says
        return run_async(function(*args, **kwargs))

    return run


def run_async(body: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end. Ctrl-C and SIGTERM cancel it, so its clean-up runs before the process ends."""
    from ..core import logs

    # Standard output is for results. A process that serves sets its own log up again.
    logs.configure(component="mooring", level="debug" if debugging() else "warning", json=False)

    async def guarded() -> T:
        terminated = False
        task = asyncio.current_task()

        def on_terminate() -> None:
            nonlocal terminated
            terminated = True
            if task is not None:
                task.cancel()

        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, on_terminate)
        try:
            return await body
        except asyncio.CancelledError:
            if terminated:
                raise Terminated from None
            raise

    return asyncio.run(guarded())


# --- showing ----------------------------------------------------------------------------------------------------------


def interactive() -> bool:
    """A person sits at the terminal: questions may be asked and progress bars drawn."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def stderr_console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def warn(sentence: str) -> None:
    sys.stderr.write(f"warning: {one_line(sentence)}\n")


def say(sentence: str) -> None:
    """A remark on the way, not part of the result."""
    sys.stderr.write(one_line(sentence) + "\n")


def count(number: int, noun: str = "file") -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def print_json(value: object) -> None:
    """One JSON document on standard output; file names that are not UTF-8 stay readable as escapes."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=True, default=str) + "\n")


def print_line(text: str) -> None:
    sys.stdout.write(one_line(text) + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """A table on a terminal; into a pipe the same cells separated by tabs, without a header, for `cut` and `awk`."""
    cells = [[one_line(str(cell)) if cell is not None else "" for cell in row] for row in rows]
    if not sys.stdout.isatty():
        sys.stdout.writelines("\t".join(row) + "\n" for row in cells)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    Console(highlight=False).print(table)


def print_fields(fields: Mapping[str, object]) -> None:
    """Name and value, one a line."""
    width = max((len(name) for name in fields), default=0)
    for name, value in fields.items():
        print_line(f"{name:<{width}}  {value if value is not None else '-'}")


def confirm(question: str, *, yes: bool) -> None:
    """Asks before something is destroyed. Without a terminal it must have been said with `--yes`.

    Raises `UsageError` without either, `typer.Abort` on "no".
    """
    if yes:
        return
    if not interactive():
        raise UsageError(f"{question} Nobody can be asked here.", hint="Add --yes, or look first with --dry-run.")
    if not typer.confirm(one_line(question), default=False, err=True):
        raise typer.Abort


def resolve_secret(path: Path | None, prompt: str) -> str:
    """A secret from a private file, else asked for without echo, else the first line of standard input.

    Never from the command line: other users read that in `ps`.
    """
    if path is not None:
        from ..core.secrets import read_secret

        return read_secret(path).reveal()
    if interactive():
        import getpass

        text = getpass.getpass(f"{prompt}: ")
    else:
        text = sys.stdin.readline()
    text = text.strip()
    if not text:
        raise UsageError(
            f"No {prompt.lower()} was given.", hint="Give a file of mode 0600, or write it to standard input."
        )
    return text


@contextmanager
def progress_bar(description: str, total: int | None, *, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes the bytes moved since its last call. Drawn only on a terminal, on standard error."""
    if not enabled or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr_console(), transient=True) as progress:
        task = progress.add_task(one_line(description), total=total)
        yield lambda moved: progress.advance(task, moved)
