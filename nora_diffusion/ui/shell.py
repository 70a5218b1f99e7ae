"""The page: title and tabs."""

from __future__ import annotations

import html
import importlib
from dataclasses import replace
from typing import Any

import gradio as gr

from ..generation.settings import MAX_PROMPT
from .config import CACHE_SECONDS
from .layout.cards import line
from .layout.page import Page
from .layout.theme import appearance
from .state import App
from .tabs.generate_settings import defaults

TABS = ("generate", "mix", "library", "train", "compare", "inspect")
"""Modules of ``ui/tabs``, in page order."""
REMOTE_TABS = ("generate", "library", "compare")
"""Those that need no base on this machine."""
NOT_HERE = (
    "Images are made on a server, which has the adapters too. Mix, Train and Inspect need a base on the machine of the "
    "app: start it without --server for them."
)


def build(app: App) -> tuple[Any, dict[str, Any]]:
    """The page, and the arguments of ``gr.mount_gradio_app`` for its appearance."""
    with gr.Blocks(title="nora_diffusion", delete_cache=CACHE_SECONDS, analytics_enabled=False) as blocks:
        gr.HTML(f"<h1>nora_diffusion</h1><p>{html.escape(app.engine.title)}</p>", elem_id="title")
        prompt = gr.Textbox(
            defaults(app.engine)["prompt"], label="Prompt", lines=3, max_lines=8, max_length=MAX_PROMPT, render=False,
            elem_id="prompt", placeholder="Describe the image",
        )  # fmt: skip
        changed = gr.State(0)
        with gr.Tabs(selected=TABS[0]) as tabs:
            page = Page(app, blocks, tabs, tab=None, prompt=prompt, library_changed=changed)
            for name in REMOTE_TABS if app.engine.is_remote else TABS:
                module = importlib.import_module(f".tabs.{name}", __package__)
                with gr.Tab(module.TITLE, id=name) as tab:
                    module.build(replace(page, tab=tab))
        if app.engine.is_remote:
            gr.HTML(line(NOT_HERE), elem_id="not-here")
    return blocks, appearance()
