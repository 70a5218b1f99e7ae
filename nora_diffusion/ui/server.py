"""Starting the app: a private working folder, closed defaults, Gradio."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..pipelines.base import EMBEDDED_WEIGHTS
from . import security
from .config import AppConfig
from .state import App

"""How often Gradio looks for old files in its cache, and how old they may grow."""


def serve(config: AppConfig) -> None:
    """Serve the app until Ctrl-C. Raises :class:`UserError` before anything starts when the settings will not do."""
    with started(config) as (app, url):
        shown = f" for the user {config.credentials[0]!r}" if config.auth else ""
        print(f"The app is at {url}{shown}; Ctrl-C ends it.", flush=True)
        threading.Thread(target=app.warm_up, daemon=True).start()
        wait_for_signal()


def wait_for_signal() -> None:
    """Wait for Ctrl-C or SIGTERM, so that the private folder is removed after either."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with contextlib.suppress(KeyboardInterrupt):
        while not ended.wait(1.0):  # a wait without end would keep Ctrl-C from Windows
            pass
    print("\nstopped")


@contextmanager
def started(config: AppConfig) -> Iterator[tuple[App, str]]:
    """A running server and its address; all its temporary files are gone afterwards."""
    config.check()
    scratch = Path(tempfile.mkdtemp(prefix="nora_app_"))  # mode 0700
    work = scratch / "work"  # a file in the working folder could be served: keep it empty
    work.mkdir()
    before = Path.cwd()
    blocks = None
    try:
        app = App(config=_absolute(config), scratch=scratch)
        _ = app.library
        security.clean_environment(scratch)
        os.chdir(work)
        blocks, url = _launch(app)
        yield app, url
    finally:
        if blocks is not None:
            blocks.close(verbose=False)
        os.chdir(before)
        shutil.rmtree(scratch, ignore_errors=True)


def _absolute(config: AppConfig) -> AppConfig:
    return replace(config, source=config.source.absolute(), library=str(config.library_folder))


def _launch(app: App) -> tuple[Any, str]:
    from starlette.middleware import Middleware

    from .shell import build

    config = app.config
    hosts = security.known_hosts(config)
    blocks, look = build(app)
    blocks.queue(max_size=64, default_concurrency_limit=16, api_open=False)
    _let_it_start_slowly()
    try:
        _, url, _ = blocks.launch(
            server_name=config.listen, server_port=config.port or _free_port(config.listen), prevent_thread_lock=True,
            auth=security.Password(*config.credentials) if config.auth else None,
            share=False, mcp_server=False, ssr_mode=False, enable_monitoring=False, run_history=False, pwa=False,
            _frontend=False,  # else it asks itself for its page, and gives up on a busy machine after 3 seconds
            show_error=False, quiet=True, inbrowser=False, debug=False, strict_cors=True, footer_links=[], root_path="",
            allowed_paths=[], blocked_paths=[str(path) for path in blocked(app)], max_file_size=security.MAX_UPLOAD,
            app_kwargs={
                "middleware": [Middleware(security.Gatekeeper, hosts=hosts, storage=app.scratch)],
                "docs_url": None, "redoc_url": None, "openapi_url": None,
            },
            **look,
        )  # fmt: skip
    except OSError as error:
        raise UserError(
            f"port {config.port} on {config.listen} is busy or not allowed: choose another --port"
        ) from error
    return blocks, url


def _let_it_start_slowly() -> None:
    """Gradio gives its server 5 seconds to start, which a busy machine may need: here it has as long as it lives."""
    from gradio import http_server

    def run_in_thread(server: Any) -> None:
        server.thread = threading.Thread(target=server.run, daemon=True)
        server.thread.start()
        while not server.started:
            server.thread.join(0.01)
            if not server.thread.is_alive():
                raise OSError("the server ended while it started")

    http_server.Server.run_in_thread = run_in_thread


def blocked(app: App) -> list[Path]:
    """Folders that are never served, whatever a handler returns: models, caches, adapters, the program itself."""
    cache = Path(os.environ.get("HF_HOME", "~/.cache")).expanduser()
    name = app.config.source.base
    base = [Path(name)] if name and Path(name).exists() else []
    return [app.config.library_folder, cache, Path("~/.cache").expanduser(), EMBEDDED_WEIGHTS.parents[1], *base]


def _free_port(host: str) -> int:
    import socket

    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
