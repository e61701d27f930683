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
    from moesurgery.cli._console import console

    # Headers of large models make hundreds of thousands of small objects and hardly any cycles.
    gc.set_threshold(200_000, 20, 20)
    try:
        from moesurgery.cli._app import app

        given = sys.argv[1:] if arguments is None else arguments
        code = app(given[0] if given else "")(args=arguments, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else DONE
    except SurgeryError as error:
        if os.environ.get(DEBUG):
            traceback.print_exc()
        console.error(error.message, error.hint)
        return FAILED
    except BrokenPipeError:
        # The reader of our output is gone (`| head`); Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        console.note("interrupted")
        return INTERRUPTED
    except Exception as error:
        return _other(error)


def _other(error: Exception) -> int:
    """Show a usage error of Typer's, or report a bug of ours in one line."""
    from moesurgery.cli._console import console

    if type(error).__name__ == "Abort":
        console.note("interrupted")
        return INTERRUPTED
    message = getattr(error, "format_message", None)
    if message is not None:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "moesurgery"
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
    sys.exit(main())
