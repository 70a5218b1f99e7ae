"""The server as a program: it finishes what it accepted, and its end is a success."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.serving.http.config import ServeConfig
from nora_diffusion.serving.http.server import started


def test_requests_at_work_are_finished(tiny_base: Path, library: Path) -> None:
    answers: list[int] = []
    events = threading.Event()
    body = {"prompt": "a red car", "steps": 100, "width": 16, "height": 16, "sampler": "ddim", "stream": True}

    def ask(url: str) -> None:
        with httpx.stream("POST", f"{url}v1/pictures", json=body, timeout=None) as answer:
            for line in answer.iter_lines():
                events.set()
                answers.extend([answer.status_code] if line == "event: picture" else [])

    with started(ServeConfig(BaseSource(str(tiny_base), "cpu"), [str(library / "shown")], port=0)) as url:
        thread = threading.Thread(target=ask, args=(url,))
        thread.start()
        events.wait()
    thread.join()
    assert answers == [200]


def test_requests_that_are_left_get_an_answer(tiny_base: Path, library: Path) -> None:
    """Not a closed connection, nor the stack traces of tasks that uvicorn cancels."""
    lines: list[str] = []
    begun = threading.Event()
    body = {"prompt": "a car", "steps": 900, "width": 16, "height": 16, "sampler": "ddim", "count": 16, "stream": True}

    def ask(url: str) -> None:
        with httpx.stream("POST", f"{url}v1/pictures", json=body, timeout=None) as answer:
            for line in answer.iter_lines():
                begun.set()
                lines.append(line)

    source = BaseSource(str(tiny_base), "cpu")
    with started(ServeConfig(source, [str(library / "shown")], port=0, max_steps=900, drain=0)) as url:
        thread = threading.Thread(target=ask, args=(url,))
        thread.start()
        begun.wait()
    thread.join()
    assert lines.count("event: error") == 16 and "event: done" in lines
    assert all('"status": 503' in data for kind, data in pairwise(lines) if kind == "event: error")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_it(tiny_base: Path, library: Path, number: signal.Signals) -> None:
    command = ["serve", "--base", str(tiny_base), "--subjects", str(library / "shown"), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    program = subprocess.Popen(
        [sys.executable, "-m", "nora_diffusion", *command], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert program.stdout is not None
    url = program.stdout.readline().split(" at ")[1].split(";")[0]
    assert httpx.get(f"{url}ready").status_code == 200
    program.send_signal(number)
    out, err = program.communicate()
    assert program.returncode == 0 and "stopping" in out and "Traceback" not in err, err
