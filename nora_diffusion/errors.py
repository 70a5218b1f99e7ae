"""The one exception for mistakes that a user can mend, and what other libraries' errors say."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave: one sentence that says what is wrong and what to do.

    The command line prints the sentence and exits with code 2, without a stack trace.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing: other libraries explain at length."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on any kind of device; on a CPU torch says so in words only."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
