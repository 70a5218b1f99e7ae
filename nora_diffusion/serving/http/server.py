"""Start the server, and stop it: what was accepted is finished first."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...web.listening import bind, run_in_thread, wait_until_started
from .access.keys import Keys
from .access.quotas import Quotas
from .catalog import Catalog
from .config import ServeConfig
from .engines import portable, renewed_on_hangup, running
from .state import State
from .telemetry.tracing import tracing
from .uploads import Uploads

ANSWER_SECONDS = 5
"""Time for the answers to requests that are ended at a stop."""


def serve(config: ServeConfig) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises :class:`UserError` before anything starts if a setting is wrong."""
    with started(config) as url:
        with contextlib.suppress(KeyboardInterrupt):  # also SIGTERM: see nora_diffusion.programs.program
            print(f"The server is running at {url}; press Ctrl-C to stop it.", flush=True)
            wait()
        print(
            f"\nstopping: requests are finished first, for up to {config.drain:g} seconds; Ctrl-C ends them now",
            flush=True,
        )


def wait() -> None:
    """Wait for Ctrl-C or SIGTERM, which raise."""
    never = threading.Event()
    while not never.wait(1.0):  # on Windows, Ctrl-C does not interrupt a wait without a timeout
        pass


@contextmanager
def started(config: ServeConfig) -> Iterator[str]:
    """A running server; its address. At the end it takes no more requests, and finishes those at work."""
    config.check()
    if config.engine == "ray":
        config = portable(config)
    traces = tracing(config.trace)
    file = Path(config.keys).expanduser() if config.keys else None
    keys, quotas = Keys.of(file) if file else None, Quotas(file.with_name(f"{file.name}.used") if file else None)
    uploads = Uploads(Path(config.uploads).expanduser()) if config.uploads else None
    catalog = Catalog(config.subjects, uploads)
    try:
        with running(config, catalog) as engine, _requests_logged():
            engine.set_weights(keys.weights if keys else {})
            state = State(config, engine, catalog, keys, quotas, tracing=traces)
            with served(state) as url, renewed_on_hangup(state):
                yield url
    finally:  # after the requests that were at work
        quotas.write()
        traces.end()


@contextmanager
def served(state: State) -> Iterator[str]:
    """Serve from a thread; returns the address."""
    import uvicorn

    from ...web.connections import HTTP, patient
    from .application import application

    config = state.config
    listener = bind(config.host, config.port)
    server = uvicorn.Server(uvicorn.Config(
        application(state), log_level="warning", timeout_keep_alive=30,
        timeout_graceful_shutdown=int(config.drain) + ANSWER_SECONDS,
        **{**HTTP, "http": patient(config.client_timeout), "limit_concurrency": config.connections},
    ))  # fmt: skip
    thread = run_in_thread(server, listener)
    try:
        wait_until_started(server, thread)
        yield _url(config.host, listener.getsockname()[1])
    finally:
        _stop(server, thread, state)


def _stop(server: Any, thread: threading.Thread, state: State) -> None:
    """Finish the requests at work, for ``drain`` seconds or until a second Ctrl-C; those that are left get a 503."""
    server.should_exit = True
    with contextlib.suppress(KeyboardInterrupt):
        thread.join(state.config.drain)
    state.engine.close(drain=not thread.is_alive())  # before uvicorn cancels its tasks: their clients get an answer
    thread.join(ANSWER_SECONDS)
    server.force_exit = True


@contextmanager
def _requests_logged() -> Iterator[None]:
    """Lines of JSON about requests to the standard error."""
    log, handler = logging.getLogger("nora_diffusion.requests"), logging.StreamHandler(sys.stderr)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"
