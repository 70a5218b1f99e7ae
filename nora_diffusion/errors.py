"""The exception for mistakes that a user can fix, and helpers for errors of other libraries."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in the user's input. The message is one sentence: what is wrong and what to do.

    The command line prints it and exits with code 2, without a stack trace.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none. Other libraries' messages can be long."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory on any device. On a CPU torch raises a plain ``RuntimeError``."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
