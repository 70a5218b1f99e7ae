"""Memory of pages: a closed page is forgotten after a while, and an open one costs little."""

from __future__ import annotations

import datetime
from typing import Any

import gradio as gr
import pytest
from fastapi import FastAPI

from nora_diffusion.ui.security import sessions
from nora_diffusion.ui.security.sessions import Sessions


@pytest.fixture
def holder() -> Any:
    """The sessions of a small page with a state."""
    with gr.Blocks(analytics_enabled=False) as blocks:
        gr.Textbox("text", label="Prompt")
        gr.State({"weights": {}})
    site = gr.mount_gradio_app(FastAPI(), blocks, path="/").routes[-1].app
    Sessions.attach(site, blocks)
    assert blocks.state_holder is site.state_holder
    return site.state_holder


def age(holder: Any, name: str, seconds: float) -> None:
    holder.time_last_used[name] -= datetime.timedelta(seconds=seconds)


def test_a_session_has_no_copy_of_the_page(holder: Any) -> None:
    session = holder["a"]
    assert not session.config_values
    state = next(key for key, block in session.blocks_config.blocks.items() if block.get_block_name() == "state")
    session[state] = {"weights": {"dog": 1}}
    assert holder["a"][state] == {"weights": {"dog": 1}} and holder["b"][state] == {"weights": {}}
    assert set(holder["a"].config_values) == {state}  # filled as components change


def test_a_closed_page_is_forgotten_after_a_while(holder: Any) -> None:
    holder["open"], holder["closed"], holder["back"]
    holder["closed"].is_closed = holder["back"].is_closed = True
    queue = holder.blocks._queue
    queue.pending_event_ids_session["closed"] = set()
    queue.pending_messages_per_session["closed"] = object()
    for name in ("open", "closed", "back"):
        age(holder, name, sessions.CLOSED_SECONDS - 10)
    holder.delete_all_expired_state()
    assert set(holder.session_data) == {"open", "closed", "back"}
    holder["back"]  # its browser has reconnected
    for name in ("open", "closed"):
        age(holder, name, 20)
    holder.delete_all_expired_state()
    assert set(holder.session_data) == set(holder.time_last_used) == {"open", "back"}
    assert not queue.pending_event_ids_session and not queue.pending_messages_per_session


def test_a_running_event_keeps_its_messages(holder: Any) -> None:
    queue = holder.blocks._queue
    holder["a"].is_closed = True
    queue.pending_event_ids_session["a"] = {"event"}
    queue.event_ids_to_events["event"] = object()
    queue.pending_messages_per_session["a"] = object()
    age(holder, "a", sessions.CLOSED_SECONDS + 1)
    holder.delete_all_expired_state()
    assert "a" in queue.pending_messages_per_session and "a" not in holder.session_data


def test_the_number_of_sessions_is_limited(holder: Any) -> None:
    holder["first"], holder["second"]
    holder["first"]
    for number in range(sessions.MAX_SESSIONS - 1):
        holder[str(number)]
    assert len(holder.session_data) == len(holder.time_last_used) == sessions.MAX_SESSIONS
    assert "first" in holder.session_data and "second" not in holder.session_data
