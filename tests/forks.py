"""Runs an action in a forked child, which may be killed in the middle."""

from __future__ import annotations

import os
from collections.abc import Callable


def run_in_fork(action: Callable[[], int]) -> int:
    """The number that ``action`` returns in a forked child, or minus the signal that killed it.

    Raises ``ValueError`` if the action raised, whose stack trace is lost.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, str(action()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as end:
        result = end.read()
    _, status = os.waitpid(child, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else int(result)
