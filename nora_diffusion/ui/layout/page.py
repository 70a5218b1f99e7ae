"""What the tabs of one page share while they are built, and how a handler speaks to its user.

A tab is a module of ``ui/tabs`` with a ``TITLE`` and a function ``build(page: Page) -> None``, called inside its
``gr.Tab``; it is entered in ``TABS`` of ``shell.py``. It makes its components, wires its handlers with
``handler``-wrapped functions, and keeps no state of its own beyond ``gr.State``: what lives longer is in ``page.app``.
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

from ...errors import UserError
from ..messages import INSIDE, sentence
from ..runs import Run
from ..state import App

log = logging.getLogger(__name__)
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""How events are wired that only the page itself may call."""
QUIET: dict[str, Any] = {**HIDDEN, "queue": False}
"""The same for what answers at once and must not wait in a queue. Not for what may refuse: Gradio would not say so."""
LAST: dict[str, Any] = {"trigger_mode": "always_last"}
"""For what several events set off: it answers them one after the other, the last one always. As handlers of their own
a late answer to an early event would be written over that to a later one; by itself Gradio drops the later event."""


@dataclass
class Page:
    """The parts that one tab offers to the others."""

    app: App
    blocks: gr.Blocks
    """The page itself: ``page.blocks.load(...)`` runs when a browser opens it."""
    tabs: gr.Tabs
    """``gr.Tabs(selected=NAME)`` as an output of a handler opens another tab; NAME is the module's name."""
    tab: gr.Tab
    """The tab that is being built: ``page.tab.select(...)`` refreshes what it shows."""
    prompt: gr.Textbox
    """The prompt of the Generate tab: whoever sends something there writes it."""
    library_changed: gr.State
    """A counter: add 1 after changing the library; listeners re-read it by ``library_changed.change``."""


def handler(function: Callable[..., Any]) -> Callable[..., Any]:
    """A handler of Gradio's events: a user's mistake becomes a toast, any other error an apology and a log entry.

    Works for plain functions and generators. ``gr.Error`` is shown whatever ``show_error`` says.
    """

    @functools.wraps(function)
    def plain(*args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            raise _said(error) from None

    @functools.wraps(function)
    def stream(*args: Any) -> Iterator[Any]:
        try:
            yield from function(*args)
        except Exception as error:
            raise _said(error) from None

    return stream if inspect.isgeneratorfunction(function) else plain


def _said(error: Exception) -> Exception:
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, UserError):
        return gr.Error(toast(error), title="That did not work", duration=12, print_exception=False)
    log.error("unexpected error in a handler", exc_info=error)
    return gr.Error(INSIDE, title="Error", duration=12, print_exception=False)


def toast(error: object) -> str:
    """A message that is safe to show: Gradio renders toasts as HTML."""
    return html.escape(sentence(error))


def run_buttons(run: Any, go: gr.Button, *others: gr.Button) -> None:
    """Offer a run's button again, and take back those that stop it, once the run's event is over.

    A run's own last message would come too early: until its event is over, Gradio drops a click.
    """
    shown = ", ".join(["true", *["false"] * len(others)])
    again = f"() => [{shown}].map((visible) => ({{__type__: 'update', visible}}))"
    for over in (run.then, run.failure):
        over(None, None, [go, *others], js=again, **QUIET)


def who(request: gr.Request, work: str) -> tuple[str, str, str]:
    """The key of a run: what a page started, only that page may stop, and each kind of work by itself."""
    return request.username or "", request.session_hash or "", work


def stopper(app: App, act: Callable[[Run], None], work: str) -> Any:
    """Interrupt or skip what this user's page does, and what nobody else does."""

    def stop(request: gr.Request) -> None:
        run = app.runs.get(who(request, work))
        if run is not None:
            act(run)

    return stop
