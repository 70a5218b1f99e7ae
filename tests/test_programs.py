"""The edge of a program: exit codes, output that nobody reads, and an end beside threads that are inside torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nora_diffusion.programs import program


@pytest.fixture
def heeded() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt; a shell starts background jobs with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
def test_signals_and_help_keep_their_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        before = signal.getsignal(number)
        assert program(lambda number=number: int(signal.raise_signal(number) is None))() == code  # type: ignore[misc]
        assert signal.getsignal(number) is before
        assert (
            capsys.readouterr().err == f"stopped by {number.name}: finished files stay, unfinished ones were removed\n"
        )
    with pytest.raises(SystemExit):
        program(lambda: sys.exit(0))()


PRINTS = "from nora_diffusion.programs import program, run_program\n@program\ndef main():\n    {}\n    return 0\n"


def run(code: str, redirect: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a shell, which reports its exit code after the output."""
    command = f'"{sys.executable}" -c "$CODE" {redirect}'
    variables = {**os.environ, "CODE": f"{PRINTS.format(code)}run_program(main)", **environment}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, errors="replace", env=variables
    )


@pytest.mark.skipif(os.name == "nt", reason="pipes and redirections of a POSIX shell")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads(unbuffered: str) -> None:
    done = run("[print(i, flush=not i) for i in range(100_000)]", "| head -1", PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stdout, done.stderr) == (141, "0\n", "")
    done = run("print('x')", ">&-", PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (0, "")
    if Path("/dev/full").exists():
        done = run("print('x')", "> /dev/full", PYTHONUNBUFFERED=unbuffered)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "No space left on device" in done.stderr
        assert run("open('/nowhere/x')", "2> /dev/full").returncode == 2


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp437", "latin-1", "utf-8"])
def test_any_text_can_be_printed_on_any_console(encoding: str) -> None:
    """Whatever the console has is printed as it is, all else as escapes."""
    done = run(r"print('caf\u00e9 \u0141 \U0001f415 \udcff end')", PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("caf") and r"\udcff end" in done.stdout
    assert (r"\u0141" in done.stdout) == (encoding != "utf-8")


ENDINGS = {
    "done": ("return 0", 0),
    "an error": ("return 2", 2),
    "help": ("sys.exit(0)", 0),
    "wrong flag": ("sys.exit(2)", 2),
    "a sentence": ("sys.exit('no')", 1),
    "nothing": ("sys.exit()", 0),
    "a bug": ("raise KeyError('x')", 1),
}
BUSY = """
import atexit, sys, threading, time, torch
from nora_diffusion.programs import run_program

def busy():
    while True:
        torch.nn.Linear(64, 64)(torch.zeros(64, 64)).sum().backward()

def late():
    time.sleep(0.3)
    print("saved")

def main(word):
    atexit.register(print, "cleaned up")
    threading.Thread(target=busy, daemon=True).start()
    threading.Thread(target=late).start()
    print(word)
    {}

run_program(main, "begun")
"""


@pytest.mark.parametrize("case", ENDINGS)
def test_a_thread_inside_torch_does_not_abort_the_end(case: str) -> None:
    """Other threads are waited for, ``atexit`` functions are called, output is written, the exit code stays."""
    ending, code = ENDINGS[case]
    done = subprocess.run([sys.executable, "-c", BUSY.format(ending)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "begun\nsaved\ncleaned up\n")
    assert ("KeyError" in done.stderr) == (case == "a bug") and "terminate" not in done.stderr
