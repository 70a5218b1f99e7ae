"""Errors of the machine and of the input become one sentence; bugs keep their stack trace."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from nora_diffusion.errors import MAX_MESSAGE, UserError, explanation, printable
from nora_diffusion.programs import program

Capture = pytest.CaptureFixture[str]


def os_error(number: int, name: str | None = None) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number), name)

    return fail


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


EXPLAINED = {
    "user error": (raising(UserError("give --prompt")), "give --prompt"),
    "full disk": (os_error(errno.ENOSPC, "/a/file"), "/a/file: No space left on device; free space"),
    "quota": (os_error(errno.EDQUOT, "/a/file"), "free space or choose another folder"),
    "no permission": (os_error(errno.EACCES, "/a/file"), "/a/file: Permission denied; change its permissions"),
    "read-only disk": (os_error(errno.EROFS, "/a/file"), "/a/file: Read-only file system"),
    "removed folder": (lambda: Path("/nowhere/x").write_text("x"), "/nowhere/x: No such file or directory; check"),
    "long name": (lambda: Path("n" * 300).write_text("x"), "File name too long; choose a shorter name"),
    "rename": (lambda: Path("/nowhere/x").rename("/nowhere/y"), "/nowhere/x or /nowhere/y: "),
    "name that is not UTF-8": (lambda: Path(os.fsdecode(b"/nowhere/\xff")).read_text(), r"/nowhere/\udcff: No such"),
    "no number, no name": (raising(OSError("the server is gone")), "the server is gone"),
    "timeout": (raising(TimeoutError("timed out")), "timed out"),
    "NUL": (lambda: Path("a\0b").read_text(), "a path contains a NUL character"),
    "memory": (raising(MemoryError()), "the memory is full"),
    "memory of a GPU": (raising(torch.OutOfMemoryError("CUDA out of memory")), "the memory is full"),
    "memory of torch": (raising(RuntimeError("DefaultCPUAllocator: can't allocate memory")), "the memory is full"),
    "lone surrogate": (lambda: "a\ud83d".encode(), r"'a\ud83d' has characters that utf-8 does not have"),
    "code page": (lambda: "Łódź".encode("cp1252"), r"characters that charmap does not have"),
    "Latin-1 text": (lambda: b"caf\xe9".decode(), "not utf-8 text (byte 3"),
    "JSON": (lambda: json.loads("{"), "a file cannot be read: Expecting property name"),
    "nested JSON": (lambda: json.loads("[" * 100_000), "nested too deeply"),
    "long number in JSON": (lambda: json.loads("9" * 5000), "a file cannot be read"),
    "YAML": (lambda: yaml.safe_load("a: ]"), "a file cannot be read: while parsing"),
    "nested YAML": (lambda: yaml.safe_load("[" * 2000), "nested too deeply"),
    "date in YAML": (lambda: yaml.safe_load("2026-02-31"), "a file cannot be read: day is out of range"),
    "number in YAML": (lambda: yaml.safe_load("!!int x"), "a file cannot be read"),
}


def caught(work: Callable[[], object]) -> BaseException:
    try:
        work()
    except BaseException as error:
        return error
    raise AssertionError("it did not fail")


@pytest.mark.parametrize("case", EXPLAINED)
def test_errors_of_the_machine_and_the_input_are_explained(case: str, capsys: Capture) -> None:
    work, expected = EXPLAINED[case]
    text = explanation(caught(work))
    assert text is not None and expected in text and "\n" not in text
    assert program(lambda: int(work() is None))() == 2
    assert capsys.readouterr().err == f"error: {text}\n"


def endless(depth: int = 0) -> int:
    return endless(depth + 1)


BUGS = {
    "type": raising(TypeError("f() takes 1 argument")),
    "key": raising(KeyError("step")),
    "index": lambda: [][0],
    "attribute": raising(AttributeError("no attribute")),
    "assert": raising(AssertionError()),
    "value": raising(ValueError("too many values to unpack")),
    "runtime": raising(RuntimeError("shapes do not match")),
    "recursion": endless,
    "argument of a parser": lambda: json.loads(None),  # type: ignore[arg-type]
    "division": lambda: 1 / 0,
}


@pytest.mark.parametrize("case", BUGS)
def test_bugs_keep_their_stack_trace(case: str) -> None:
    error = caught(BUGS[case])
    assert explanation(error) is None
    with pytest.raises(type(error)):
        program(lambda: int(BUGS[case]() is None))()


def test_an_error_in_a_function_that_a_parser_calls_is_a_bug() -> None:
    """Only the frames after the last one of this package count."""
    module: dict[str, object] = {"__name__": "nora_diffusion.hook"}
    exec("def hook(pairs):\n    raise ValueError('bug')", module)
    error = caught(lambda: json.loads("{}", object_pairs_hook=module["hook"]))  # type: ignore[arg-type]
    assert explanation(error) is None


def test_messages_are_bounded_and_printable() -> None:
    caption = "the caption " * 2000
    text = str(UserError(f"the caption {caption!r} is too long: shorten it"))
    assert len(text) < MAX_MESSAGE and text.startswith("the caption 'the caption") and text.endswith(": shorten it")
    assert printable(text) == text and "[…]" in text
    # Each line has its own bound: a list of failures stays complete.
    lines = [f"subject {i}: {'x' * 5000}" for i in range(50)]
    assert [line[:10] for line in printable("\n".join(lines)).split("\n")] == [line[:10] for line in lines]
    assert str(UserError("\x1b[2J\0 \ud83d \u202e \r \x9b1m")) == r"\x1b[2J\x00 \ud83d \u202e \x0d \x9b1m".replace(
        r"\x0d", r"\r"
    )
    assert str(UserError("Zoë's 犬 🐕, two\nlines")) == "Zoë's 犬 🐕, two\nlines"
    assert str(pickle.loads(pickle.dumps(UserError(text)))) == text
