"""Servers that listen: real ones, and one that answers whatever a test wants."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from factories import randomize

from nora_diffusion import add_adapter, open_pipeline, save_adapter
from nora_diffusion.adapters import lora
from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.serving.http.config import ServeConfig
from nora_diffusion.serving.http.server import started

Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture(scope="session")
def subjects(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapter dog."""
    folder, pipe = tmp_path_factory.mktemp("subjects"), open_pipeline(tiny_base)
    add_adapter(pipe, lora(r=2), "dog", ("unet",))
    randomize(pipe, "dog", 0, size=0.02)
    save_adapter(pipe, folder / "dog", "dog", info={"trigger": "sks", "class_word": "dog"})
    return folder


@pytest.fixture
def serve(tiny_base: Path, subjects: Path) -> Iterator[Callable[..., str]]:
    """``serve(waiting=1)``: the address of a running server."""
    with ExitStack() as stack:

        def start(**settings: Any) -> str:
            config = ServeConfig(BaseSource(str(tiny_base), "cpu"), [str(subjects)], port=0, drain=0, **settings)
            return stack.enter_context(started(config))

        yield start


class Odd:
    """A server that gives the same answer to each request, and ends it when ``ended`` is set.

    ``seen``: the headers of the requests.
    """

    def __init__(self) -> None:
        self.answer: Answer = (200, {}, b"")
        self.seen: list[dict[str, str]] = []
        self.ended = threading.Event()
        self.ended.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.seen.append(dict(self.headers))
                self.rfile.read(int(self.headers.get("content-length", 0)))
                status, headers, body = outer.answer
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
                self.wfile.flush()
                outer.ended.wait()

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def odd() -> Iterator[Odd]:
    """A server of any kind."""
    server = Odd()
    yield server
    server.close()
