"""The command line: commands parse, call and render. `main` is the one place with exit codes.

0 done, valid or same; 1 the answer is no; 2 could not; 130 interrupted.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback

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
        return code if isinstance(code, int) else 0
    except SurgeryError as error:
        if os.environ.get(DEBUG):
            traceback.print_exc()
        console.error(error.message, error.hint)
        return 2
    except BrokenPipeError:
        # The reader of our output is gone (`| head`); Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except KeyboardInterrupt:
        console.note("interrupted")
        return 130
    except Exception as error:
        return _other(error)


def _other(error: Exception) -> int:
    """Show a usage error of Typer's, or report a bug of ours in one line."""
    from moesurgery.cli._console import console

    if type(error).__name__ == "Abort":
        console.note("interrupted")
        return 130
    message = getattr(error, "format_message", None)
    if message is not None:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "moesurgery"
        console.error(message(), f"see `{path} --help`")
        return 2
    if os.environ.get(DEBUG):
        traceback.print_exc()
    console.error(
        f"this is a bug in moesurgery: {type(error).__name__}: {error}",
        f"set {DEBUG}=1 for the traceback and report it; nothing was written over",
    )
    return 2


def run() -> None:
    """Entry point of the `moesurgery` script."""
    sys.exit(main())
