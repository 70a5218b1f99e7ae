"""Start the app: a private working folder, closed defaults, one HTTP server."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..pipelines.base import EMBEDDED_WEIGHTS
from ..web.listening import bind, run_in_thread, wait_until_started
from .config import AppConfig
from .security.gate import Gatekeeper, known_hosts
from .security.login import HINT, Password
from .security.scratch import clean_environment, private_folder
from .security.uploads import MAX_UPLOAD, Uploads
from .state import App

SHUTDOWN_SECONDS = 5.0
"""How long requests that are still running may delay the end of the app."""


def serve(config: AppConfig) -> None:
    """Serve the app until Ctrl-C. Raises :class:`UserError` before anything starts if a setting is wrong."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())  # first, so that the private folder is always removed
    with started(config) as (app, url):
        user = f" for the user {config.credentials[0]!r}" if config.auth else ""
        print(f"The app is running at {url}{user}; press Ctrl-C to stop it.", flush=True)
        threading.Thread(target=app.warm_up, daemon=True).start()
        wait(ended)


def wait(ended: threading.Event) -> None:
    """Wait for Ctrl-C or SIGTERM."""
    with contextlib.suppress(KeyboardInterrupt):
        while not ended.wait(1.0):  # on Windows, Ctrl-C does not interrupt a wait without a timeout
            pass
    print("\nstopped")


@contextmanager
def started(config: AppConfig) -> Iterator[tuple[App, str]]:
    """A running server and its address. All its temporary files are removed at the end."""
    config.check()
    before = Path.cwd()
    with private_folder() as scratch:
        try:
            app = App(config, scratch / "files")
            clean_environment(app.scratch)
            os.chdir(scratch / "work")  # Gradio may serve files of the working folder, so it stays empty
            with _served(app) as url:
                yield app, url
        finally:
            os.chdir(before)


@contextmanager
def _served(app: App) -> Iterator[str]:
    """Serve the page from a thread; returns its address.

    A uvicorn server of our own: ``Blocks.launch`` fails if its server takes more than 5 seconds to start, which happens
    on a busy machine.
    """
    import uvicorn

    from ..web.connections import HTTP
    from .layout.event_streams import EventStreams
    from .shell import build

    listener = bind(app.config.listen, app.config.port)
    blocks, appearance = build(app)
    site = _mounted(app, blocks, appearance)
    checked = Gatekeeper(EventStreams(site), known_hosts(app.config), blocks.fns)
    server = uvicorn.Server(uvicorn.Config(checked, log_level="warning", **HTTP))
    thread = run_in_thread(server, listener)
    try:
        wait_until_started(server, thread)
        yield _url(app.config.listen, listener.getsockname()[1])
    finally:
        blocks.close(verbose=False)
        _gradio(site).stop_event.set()  # ends the heartbeat streams of open pages
        server.should_exit = True
        thread.join(SHUTDOWN_SECONDS)


def _mounted(app: App, blocks: Any, appearance: dict[str, Any]) -> Any:
    """The page as an ASGI app, with every part of Gradio off that this app does not use."""
    import gradio as gr
    from fastapi import FastAPI

    from .security.sessions import Sessions

    closed: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    password = Password(*app.config.credentials) if app.config.auth else None
    blocks.queue(max_size=64, default_concurrency_limit=16, api_open=False)
    site = gr.mount_gradio_app(
        FastAPI(**closed), blocks, path="/", auth=password, auth_message=HINT if password else None,
        mcp_server=False, ssr_mode=False, enable_monitoring=False, run_history=False, pwa=False, show_error=False,
        footer_links=[], root_path="", allowed_paths=[], blocked_paths=[str(path) for path in blocked(app)],
        max_file_size=MAX_UPLOAD, app_kwargs=closed, **appearance,
    )  # fmt: skip
    Uploads(app.scratch / "uploads").attach(_gradio(site))
    Sessions.attach(_gradio(site), blocks)
    return site


def _gradio(site: Any) -> Any:
    """Gradio's app within the site."""
    return site.routes[-1].app


def blocked(app: App) -> list[Path]:
    """Folders that are never served, whatever a handler returns: models, caches, adapters, the program itself."""
    cache = Path(os.environ.get("HF_HOME", "~/.cache")).expanduser()
    name = app.config.source.absolute().base
    base = [Path(name)] if name and Path(name).exists() else []
    return [app.library.folder, cache, Path("~/.cache").expanduser(), EMBEDDED_WEIGHTS.parents[1], *base]


def _url(host: str, port: int) -> str:
    name = "localhost" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/"
