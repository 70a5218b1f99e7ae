"""The one exception for mistakes that a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave: one sentence that says what is wrong and what to do.

    The command line prints the sentence and exits with code 2, without a stack trace.
    """
