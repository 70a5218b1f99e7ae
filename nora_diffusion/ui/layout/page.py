"""What tabs share while the page is built, and the wrapper for event handlers.

A tab is a module of ``ui/tabs``, listed in ``TABS`` of ``shell.py``, with a ``TITLE`` and a function
``build(page: Page) -> None`` that is called inside its ``gr.Tab``. It creates its components and wraps its event
handlers with ``handler``. Its only own state is ``gr.State``: everything that lives longer is in ``page.app``.
"""

from __future__ import annotations

import functools
import html
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ...errors import explanation
from ..messages import INTERNAL_ERROR, sentence
from ..runs import Run
from ..state import App

log = logging.getLogger(__name__)
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Options of events that only the page itself calls."""
UNQUEUED: dict[str, Any] = {**PRIVATE, "queue": False}
"""The same for fast handlers that skip Gradio's queue. Not for handlers that raise: Gradio would not show the error."""
ALWAYS_LAST: dict[str, Any] = {"trigger_mode": "always_last"}
"""For a handler with several triggers: it runs once at a time, and once more for the last event. With one handler per
trigger, a late answer to an early event could overwrite a newer one; Gradio's default drops the later event."""


@dataclass
class Page:
    """The components that tabs share."""

    app: App
    blocks: gr.Blocks
    """The page: ``page.blocks.load(...)`` runs when a browser opens it."""
    tabs: gr.Tabs
    """To open a tab, return ``gr.Tabs(selected=NAME)`` from a handler; NAME is the name of its module."""
    tab: gr.Tab
    """The tab that is being built: ``page.tab.select(...)`` runs when it is opened."""
    prompt: gr.Textbox
    """The prompt of the Generate tab."""
    library_changed: gr.State
    """A counter: add 1 after changing the library. Tabs re-read the library on ``library_changed.change``."""


def handler(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an event handler: an explained error becomes a toast, a bug a generic toast and a log entry.

    Works for functions and generators. Gradio shows ``gr.Error`` even with ``show_error=False``.
    """

    @functools.wraps(function)
    def plain(*args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            raise _toast_error(error) from None

    @functools.wraps(function)
    def stream(*args: Any) -> Iterator[Any]:
        try:
            yield from function(*args)
        except Exception as error:
            raise _toast_error(error) from None

    return stream if inspect.isgeneratorfunction(function) else plain


def _toast_error(error: Exception) -> Exception:
    if isinstance(error, gr.Error):
        return error
    text = explanation(error)
    if text is not None:
        return gr.Error(toast(text), duration=12, print_exception=False)
    log.error("unexpected error in a handler", exc_info=error)
    return gr.Error(INTERNAL_ERROR, duration=12, print_exception=False)


def toast(error: object) -> str:
    """A message, escaped because Gradio renders toasts as HTML."""
    return html.escape(sentence(error))


def run_buttons(run: Any, go: gr.Button, *others: gr.Button) -> None:
    """Show the run's start button again, and hide its stop buttons, after the run's event has ended.

    The run's last message would be too early: Gradio ignores a click until the event has ended.
    """
    visible = ", ".join(["true", *["false"] * len(others)])
    script = f"() => [{visible}].map((visible) => ({{__type__: 'update', visible}}))"
    for ended in (run.then, run.failure):
        ended(None, None, [go, *others], js=script, **UNQUEUED)


def run_key(request: gr.Request, work: str) -> tuple[str, str, str]:
    """The key of a run: user, page and kind of work. Only the page that started a run can stop it."""
    return request.username or "", request.session_hash or "", work


def stop_handler(app: App, act: Callable[[Run], None], work: str) -> Any:
    """Interrupt or skip the run that this page started; ``act`` is ``Run.interrupt`` or ``Run.skip``."""

    def stop(request: gr.Request) -> None:
        run = app.runs.get(run_key(request, work))
        if run is not None:
            act(run)

    return stop
