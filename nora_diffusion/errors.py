"""The exception for mistakes that a user can fix, and the sentence for errors of the machine or the input.

:mod:`.programs` turns them into messages and exit codes.
"""

from __future__ import annotations

import errno
import os
import re
import reprlib
import signal
import sys
import traceback

MAX_MESSAGE = 1200
"""Characters of one line of a message; from a longer one the middle is cut, which is the user's own text."""
UNPRINTABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
PARSERS = {"PIL", "json", "safetensors", "safetensors_rust", "tokenizers", "yaml", "zipfile"}
"""Top-level packages whose ``ValueError`` and ``RecursionError`` are about the text or file that they parse."""
FREE_SPACE, OTHER_FOLDER = "free space or choose another folder", "change its permissions or choose another path"
REMEDIES = {
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EACCES: OTHER_FOLDER,
    errno.EPERM: OTHER_FOLDER,
    errno.EROFS: OTHER_FOLDER,
    errno.ENOENT: "check the path; another program may have removed it",
    errno.EEXIST: "choose another path",
    errno.ENOTDIR: "choose another path",
    errno.EISDIR: "choose another path",
    errno.ELOOP: "remove the link, which leads to itself",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "close files, or raise the limit on open files (ulimit -n)",
}


class UserError(ValueError):
    """A mistake in the user's input. The message is one sentence: what is wrong and what to do.

    The command line prints it and exits with code 2, without a stack trace. Text of the user in it may have any length
    and any characters: see :func:`printable`.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised as Ctrl-C is, so that what is being written is removed."""


def stop_signal(stop: KeyboardInterrupt) -> signal.Signals:
    """The signal that stopped a program; its exit code is 128 + the signal's number."""
    return signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT


def printable(text: str) -> str:
    """``text`` for a message: control characters and lone surrogates escaped, each line at most 1,200 characters."""
    text = UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    if len(text) <= MAX_MESSAGE:
        return text
    return "\n".join(
        line if len(line) <= MAX_MESSAGE else f"{line[: MAX_MESSAGE // 2]} […] {line[-MAX_MESSAGE // 3 :]}"
        for line in text.split("\n")
    )


def quoted(value: object) -> str:
    """``repr(value)``, shortened: for errors that quote what a user gave."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = shortener.maxlong = 100
    return shortener.repr(value)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none. Other libraries' messages can be long."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def last_line(error: BaseException) -> str:
    """The last line of an error's message, or its type if it has none: for messages that contain a traceback."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory on any device. On a CPU torch raises a plain ``RuntimeError``."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def explanation(error: BaseException) -> str | None:
    """The sentence for the user about an error, or ``None`` if it is a bug, whose stack trace must be shown.

    How the two are told apart: an error is the user's if its class says that the machine or the input caused it,
    wherever it was raised (``UserError``; ``OSError``: disk, permissions, names, network; out of memory on any device;
    out of threads; ``UnicodeError``), or if a parser raised it about what it read (``ValueError``, ``RecursionError``
    and the parser's own classes, from a call into :data:`PARSERS`), or if the system refused a name with a NUL.
    Everything else is a bug: a ``ValueError`` or ``RecursionError`` of this package or of torch, and every
    ``TypeError``, ``KeyError``, ``AttributeError``, ``RuntimeError`` ...
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return printable(os_error(error))
    if out_of_memory(error):
        return "the memory is full: use smaller images or batches, or close other programs that use the device"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "no more threads can be started: raise the limit on processes (ulimit -u), or close other programs"
    if isinstance(error, UnicodeEncodeError):
        wrong = error.object[error.start : error.end][:20]
        return f"the text {error.object[:60]!a} has characters that {error.encoding} does not have: {wrong!a}"
    if isinstance(error, UnicodeDecodeError):
        return f"a file or name is not {error.encoding} text (byte {error.start}: {error.reason}): save it as UTF-8"
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return "a path contains a NUL character: remove it"
    if isinstance(error, RecursionError) and _raised_in_parser(error):
        return "a file is nested too deeply to be read: remove levels of brackets or indentation"
    if _raised_in_parser(error) and (isinstance(error, ValueError) or _package(type(error).__module__) in PARSERS):
        return printable(f"a file cannot be read: {first_line(error)}")
    return None


def os_error(error: OSError) -> str:
    """An ``OSError`` as a sentence: the file, the system's reason, and what to do."""
    names = " or ".join(os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, str | bytes))
    remedy = REMEDIES.get(error.errno or 0)
    return (f"{names}: " if names else "") + reason(error) + (f"; {remedy}" if remedy else "")


def reason(error: OSError) -> str:
    """The system's reason for an error, without file names."""
    return error.strerror or first_line(error)


def _raised_in_parser(error: BaseException) -> bool:
    """Whether this package, or a program, called a parser that raised the error."""
    packages = [_package(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [index for index, package in enumerate(packages) if package in ("__main__", _package(__name__))]
    return not PARSERS.isdisjoint(packages[own[-1] + 1 if own else 0 :])


def _package(module: str) -> str:
    return module.partition(".")[0]
