"""The `zimage` command: which commands there are, and how their failures become one line and an exit code.

Knows no torch: each command imports what it needs when it runs, so that `zimage --help` is instant.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from .._version import __version__
from ..errors import Cancelled, RequestError, ZImageError, ZImageWarning
from .bench import bench
from .checkpoints import inspect, variants
from .convert import convert
from .generate import generate
from .options import State
from .plan import plan
from .replay import replay
from .wording import as_options

CANCELLED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells have it."""

app = typer.Typer(name="zimage", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command()(generate)
app.command()(replay)
app.command()(variants)
app.command()(inspect)
app.command()(convert)
app.command()(plan)
app.command()(bench)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit. Without `arguments` it is the process's own, whose end no Ctrl-C disturbs."""
    state = State()
    with warnings.catch_warnings():
        _show_own_warnings_plainly(state)
        try:
            try:
                code = app(args=arguments, prog_name="zimage", standalone_mode=False, obj=state)
                if code == CANCELLED:
                    raise typer.Abort
                if sys.stdout is not None:
                    sys.stdout.flush()
            finally:
                if arguments is None:
                    signal.signal(signal.SIGINT, signal.SIG_IGN)
        except BrokenPipeError:  # whoever read our output has enough of it, as `head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        except (Exception, KeyboardInterrupt) as error:
            if state.debug:
                import traceback

                traceback.print_exc()
            print(f"zimage: {_one_line(_message(error, state))}", file=sys.stderr)
            code = _exit_code(error)
    if "triton" not in sys.modules:  # which lists on stderr all that was not collected
        gc.freeze()  # the process ends: looking through torch's million objects for garbage would take half a second
    sys.exit(code)


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    """Pictures from Z-Image and Z-Image-Turbo.

    Results go to stdout, everything else to stderr. Exit codes: 0 done; 1 failed (replay: not the same bits; inspect:
    problems); 2 what was asked cannot work; 130 cancelled with Ctrl-C.
    """
    if isinstance(context.obj, State):
        context.obj.debug = debug
        context.obj.options = _options_of(context)
    if version:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def _options_of(context: typer.Context) -> dict[str, str]:
    """By parameter, the option of the command that is called: of several names the one that its help has first."""
    command = getattr(context.command, "commands", {}).get(context.invoked_subcommand)
    named = {one.name: [name for name in one.opts if name.startswith("--")] for one in getattr(command, "params", ())}
    return {parameter: names[0] for parameter, names in named.items() if names}


def _message(error: BaseException, state: State) -> str:
    if isinstance(error, typer.Abort | KeyboardInterrupt):
        return "cancelled, nothing written"
    if hasattr(error, "format_message"):  # a usage error; its class moved between versions of Typer
        return f"{error.format_message()} (see zimage --help)"
    if isinstance(error, ZImageError | OSError):
        return as_options(str(error), state.options)
    where = "" if state.debug else " (zimage --debug ... shows where)"
    return f"{type(error).__name__}: {error}{where}"


def _exit_code(error: BaseException) -> int:
    if isinstance(error, Cancelled | typer.Abort | KeyboardInterrupt):
        return CANCELLED
    if isinstance(error, RequestError):
        return 2
    return int(getattr(error, "exit_code", 1))


def _one_line(text: str) -> str:
    """The text on one line, and without what would steer the terminal."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _show_own_warnings_plainly(state: State) -> None:
    """Let a `ZImageWarning` be one line as errors are; others look as Python shows them."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
        if issubclass(category, ZImageWarning):
            print(f"zimage: warning: {_one_line(as_options(str(message), state.options))}", file=sys.stderr)
        else:
            usual(message, category, *where, **more)  # type: ignore[arg-type]

    warnings.showwarning = show
