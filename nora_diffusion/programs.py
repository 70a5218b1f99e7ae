"""The edge of a program: errors and signals become messages and exit codes, and the process ends with them."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn, ParamSpec

from .errors import Terminated, UserError, explanation, reason, stop_signal

Parameters = ParamSpec("Parameters")

BROKEN_PIPE = 141
"""Exit code when the reader of the output has gone, as in ``| head``: that of a process ended by SIGPIPE."""


def run_program(main: Callable[Parameters, int], *args: Parameters.args, **kwargs: Parameters.kwargs) -> NoReturn:
    """Run the main function of a program, and end the process with its exit code.

    Python ends the whole process with SIGABRT if a daemon thread is inside torch while the interpreter is finalized: a
    base that is being loaded, an image that is being generated. If such threads are left, the process therefore ends
    without that, after every non-daemon thread and after the ``atexit`` functions of what ``main`` imports.
    """
    code = 1  # that of a bug

    def end() -> None:
        if any(thread.daemon for thread in threading.enumerate()):
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, broken, or none
                    stream.flush()
            os._exit(code)

    atexit.register(end)  # before main imports anything: what is registered first is called last
    try:
        code = main(*args, **kwargs)
    except SystemExit as stop:  # of argparse
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    sys.exit(code)


def program(main: Callable[Parameters, int]) -> Callable[Parameters, int]:
    """Decorate the entry point of a program: errors become one sentence on stderr and exit codes.

    Returns 2 for an error that :func:`explanation` explains, 130 for Ctrl-C, 143 for SIGTERM, 141 if the reader of the
    output has gone.
    A bug keeps its stack trace, and Python's exit code 1. Output is never lost to a console's code page: characters
    that it does not have are printed as escapes.
    """

    @functools.wraps(main)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> int:
        try:
            if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
                sys.stdout.reconfigure(errors="backslashreplace")
            try:
                with _termination_raised():
                    return main(*args, **kwargs)
            finally:
                _flush_output()
        except KeyboardInterrupt as stop:
            number = stop_signal(stop)
            with contextlib.suppress(OSError):
                print(f"stopped by {number.name}: finished files stay, unfinished ones were removed", file=sys.stderr)
            return 128 + number
        except BrokenPipeError as error:
            if error.filename is None:
                return BROKEN_PIPE
            raise
        except Exception as error:
            text = explanation(error)
            if text is None:
                raise
            with contextlib.suppress(OSError):
                print(f"error: {text}", file=sys.stderr)
            return 2

    return guarded


@contextlib.contextmanager
def _termination_raised() -> Iterator[None]:
    """Within the block SIGTERM raises :class:`Terminated`, unless it is handled already, or in another thread."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if threading.current_thread() is not threading.main_thread() or not free:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _flush_output() -> None:
    """Write what was printed. If that fails, discard it, or else the interpreter fails on it again at its exit."""
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # the output has no file descriptor
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"cannot write the output: {reason(error)}") from error
