"""The command line: a file for each command, which parses, calls and renders.

Public: `main`, the one place where an error becomes an exit code (`_exit_codes`). Modules with an underscore are shared
by commands. Nothing here computes, and nothing but `_console` prints.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback

from moesurgery.cli._exit_codes import DONE, FAILED, INTERRUPTED
from moesurgery.errors import SurgeryError

DEBUG = "MOESURGERY_DEBUG"


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; never lets a traceback through unless MOESURGERY_DEBUG is set."""
    from moesurgery.cli._console import console, drop_output

    # Headers of large models make hundreds of thousands of small objects and hardly any cycles.
    gc.set_threshold(200_000, 20, 20)
    given = sys.argv[1:] if arguments is None else arguments
    console.reset()
    with console.activity(" ".join(["moesurgery", *given[:1]])):
        try:
            code = _run(given)
        except SystemExit as error:  # click ends so where the reader of its help is gone
            code = error.code if isinstance(error.code, int) else FAILED
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output(sys.stdout)  # Python would complain again at exit
    return code


def _run(given: list[str]) -> int:
    from moesurgery.cli._console import console

    try:
        from moesurgery.cli._app import app

        code = app(given[0] if given else "")(args=given, standalone_mode=False)
        if code == INTERRUPTED:  # some versions of Typer turn Ctrl-C into this
            return _interrupted()
        return code if isinstance(code, int) else DONE
    except SurgeryError as error:
        if os.environ.get(DEBUG):
            traceback.print_exc()
        console.error(error.message, error.hint)
        return FAILED
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        return _other(error)


def _interrupted() -> int:
    """Say in one line that it was interrupted, and what became of the work where that is known."""
    from moesurgery.cli._console import console

    console.quiet = False
    console.note(console.if_interrupted)
    return INTERRUPTED


def _other(error: Exception) -> int:
    """Show a usage error of Typer's, or report a bug of ours in one line."""
    from moesurgery.cli._console import console

    if type(error).__name__ == "Abort":
        return _interrupted()
    if type(error).__name__ == "NoArgsIsHelpError":
        console.result(str(error))
        return DONE
    message = getattr(error, "format_message", None)
    if message is not None:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "moesurgery"
        if near := getattr(error, "possibilities", None):
            console.error(f"no such option: {error.option_name}", f"did you mean {near[0]}? See `{path} --help`")  # type: ignore[attr-defined]
            return FAILED
        console.error(message(), f"see `{path} --help`")
        return FAILED
    if os.environ.get(DEBUG):
        traceback.print_exc()
    console.error(
        f"this is a bug in moesurgery: {type(error).__name__}: {error}",
        f"set {DEBUG}=1 for the traceback and report it; nothing was written over",
    )
    return FAILED


def run() -> None:
    """Entry point of the `moesurgery` script."""
    code = main()
    if code == INTERRUPTED:
        os._exit(code)  # a second Ctrl-C while threads and torch end would print a traceback
    sys.exit(code)
