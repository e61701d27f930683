"""The command line: a file for each command, which parses, calls and renders.

Public: `main`, the one place where an error becomes an exit code (`_exit_codes`). Modules with an underscore are shared
by commands. Nothing here computes, and nothing but `_console` prints.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from contextlib import suppress

from moesurgery.cli._exit_codes import DONE, FAILED, INTERRUPTED
from moesurgery.errors import SurgeryError

DEBUG = "MOESURGERY_DEBUG"


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; never lets a traceback through unless MOESURGERY_DEBUG is set."""
    from moesurgery.cli._console import console

    # Headers of large models make hundreds of thousands of small objects and hardly any cycles.
    gc.set_threshold(200_000, 20, 20)
    given = sys.argv[1:] if arguments is None else arguments
    console.reset()
    with console.activity(" ".join(["moesurgery", *given[:1]])):
        try:
            code = _run(given)
        except SystemExit as error:  # click ends so where the reader of its help is gone
            code = error.code if isinstance(error.code, int) else FAILED
    return code


def _run(given: list[str]) -> int:
    from moesurgery.cli._console import console

    try:
        from moesurgery.cli._app import app

        code = app(given[0] if given else "")(args=given, standalone_mode=False)
        console.flush()
        if code == INTERRUPTED:  # some versions of Typer turn Ctrl-C into this
            return _interrupted()
        return code if isinstance(code, int) else DONE
    except SurgeryError as error:
        if os.environ.get(DEBUG):
            traceback.print_exc()
        console.error(error.message, error.hint)
        return FAILED
    except BrokenPipeError:  # the reader of our output is gone (`| head`)
        _give_up_output()
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


def _give_up_output() -> None:
    """Point what can no longer be written at nothing: Python would complain at exit, and end with another code."""
    from moesurgery.cli._console import drop_output

    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                drop_output(stream)


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
    if (expected := _system_error(error)) is not None:
        console.error(expected.message, expected.hint)
        return 2
    console.error(
        f"this is a bug in moesurgery: {type(error).__name__}: {error}",
        f"set {DEBUG}=1 for the traceback and report it; nothing was written over",
    )
    return FAILED


def _system_error(error: Exception) -> SurgeryError | None:
    """Say what the machine refused; None for an error that is none of its."""
    if isinstance(error, MemoryError):
        return SurgeryError("there is not enough memory", "close other programs, or use fewer threads: --jobs 1")
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return SurgeryError(
            "the system allows no more threads", "raise its limit (`ulimit -u`), or use fewer: --jobs 1"
        )
    if not isinstance(error, OSError) or error.errno is None:
        return None
    where = "standard output or a file" if error.filename is None else error.filename
    return SurgeryError(
        f"{where}: {error.strerror}", f"mend that and run the same command again; {DEBUG}=1 shows where it happened"
    )


def _open_standard_streams() -> None:
    """Open what the caller closed (`>&-`): else the next file that is opened takes the place of stdout.

    In the wrong direction, so that an answer that nobody gets is an error and not silence.
    """
    for number, name, mode in ((0, "stdin", os.O_WRONLY), (1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, mode)  # the lowest number that is free
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def run() -> None:
    """Entry point of the `moesurgery` script."""
    _open_standard_streams()
    code = main()
    _give_up_output()
    if code == INTERRUPTED:
        os._exit(code)  # a second Ctrl-C while threads and torch end would print a traceback
    sys.exit(code)
