"""Settings of the Generate tab: kept over a reload, and restored from a dropped picture after a look at the changes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ...generation.sampling import MAX_PROMPT
from ...pipelines.base import default_steps
from ..engine import Engine
from ..layout.page import QUIET, Page
from ..request import MAX_PICTURES, MAX_SIDE, MAX_STEPS

KEPT = "nora_diffusion"
FIRST_PROMPT = "a red car in the forest"
REMEMBER = """
(...values) => {
  if (document.documentElement.dataset[READY] !== 'true') return [];  // first values, before the stored ones are back
  const kept = Object.fromEntries(FIELDS.map((name, n) => [name, values[n]]));
  try { localStorage.setItem(KEY, JSON.stringify(kept)); } catch (full) { /* a browser that keeps nothing */ }
  return [];
}
"""
RECALL = """
() => {
  let kept = null;
  try { kept = JSON.parse(localStorage.getItem(KEY)); } catch (spoiled) { /* as on a first visit */ }
  kept = kept && typeof kept === 'object' ? kept : {};
  document.documentElement.dataset[READY] = 'true';
  return RULES.map(([name, first, low, high, known]) => {
    const value = kept[name];
    const size = typeof value === 'string' ? value.length : Number(value);
    const fits = typeof value === typeof first && Number.isFinite(size) && low <= size && size <= high;
    return fits && (!known || known.includes(value)) ? value : first;
  });
}
"""


@dataclass
class Settings:
    """The components, named as :class:`Request` names what they set."""

    negative: gr.Textbox
    count: gr.Slider
    seed: gr.Number
    steps: gr.Slider
    guidance: gr.Slider
    width: gr.Number
    height: gr.Number
    last_seed: gr.State

    def components(self) -> dict[str, Any]:
        """What is kept over a reload and restored from a picture, by name."""
        names = ("negative", "count", "seed", "steps", "guidance", "width", "height")
        return {name: getattr(self, name) for name in names}


def defaults(engine: Engine) -> dict[str, Any]:
    """The values of a first visit. The sizes are 0, which means the base's own."""
    return {
        "prompt": FIRST_PROMPT if engine.is_embedded else "", "negative": "", "count": 1, "seed": -1,
        "steps": default_steps(engine.source.base), "guidance": engine.guidance, "width": 0, "height": 0,
    }  # fmt: skip


def build(page: Page) -> Settings:
    """Seed and number in sight, the rest folded away."""
    first = defaults(page.app.engine)
    with gr.Row():
        count = gr.Slider(1, MAX_PICTURES, first["count"], step=1, label="Pictures", scale=2, min_width=160)
        seed = gr.Number(first["seed"], label="Seed, -1: random", precision=0, minimum=-1, min_width=120,
                         elem_id="seed")  # fmt: skip
    with gr.Row():
        dice = gr.Button("Random seed", size="sm", elem_id="dice", min_width=120)
        reuse = gr.Button("Reuse last seed", size="sm", elem_id="reuse", min_width=120)
    with gr.Accordion("Settings", open=False):
        negative = gr.Textbox(label="Negative prompt", info="What to avoid", max_length=MAX_PROMPT)
        with gr.Row():
            steps = gr.Slider(1, MAX_STEPS, first["steps"], step=1, label="Steps", min_width=160)
            guidance = gr.Slider(0, 30, first["guidance"], step=0.1, label="Guidance", min_width=160)
        with gr.Row():
            width = gr.Number(0, label="Width", info="0: the base's own", precision=0, step=8, minimum=0,
                              maximum=MAX_SIDE, min_width=120)  # fmt: skip
            height = gr.Number(0, label="Height", info="0: the base's own", precision=0, step=8, minimum=0,
                               maximum=MAX_SIDE, min_width=120)  # fmt: skip
        back = gr.Button("Back to the defaults", size="sm")
    last = gr.State(None)
    settings = Settings(negative, count, seed, steps, guidance, width, height, last)
    dice.click(lambda: -1, None, seed, api_visibility="private", queue=False)
    reuse.click(lambda used: -1 if used is None else used, last, seed, api_visibility="private", queue=False)
    _keep(page, settings, first, back)
    return settings


def _keep(page: Page, settings: Settings, first: dict[str, Any], back: gr.Button) -> None:
    fields = {"prompt": page.prompt} | settings.components()
    parts = list(fields.values())
    # In the browser alone: a slow server would write old values over what somebody types meanwhile.
    gr.on([part.change for part in parts], None, parts, None, js=remember(fields), trigger_mode="always_last", **QUIET)
    page.blocks.load(None, None, parts, js=recall(first), **QUIET)
    names = [name for name in fields if name != "prompt"]
    back.click(lambda: [first[name] for name in names], None, [fields[name] for name in names], **QUIET)


def remember(fields: Iterable[str], tab: str = "") -> str:
    """The script that stores the values of these fields in the browser, by name; ``tab`` keeps those of tabs apart."""
    return _for_tab(REMEMBER.replace("FIELDS", json.dumps(list(fields))), tab)


def recall(first: Mapping[str, Any]) -> str:
    """The script that brings back stored values where they are of the right kind and range, else the first ones."""
    ranges = {
        "count": (1, MAX_PICTURES), "seed": (-1, 2**53), "steps": (1, MAX_STEPS), "guidance": (0, 30),
        "width": (0, MAX_SIDE), "height": (0, MAX_SIDE),
    }  # fmt: skip
    return recall_by([[name, value, *ranges.get(name, (0, MAX_PROMPT))] for name, value in first.items()])


def recall_by(rules: Iterable[Sequence[Any]], tab: str = "") -> str:
    """The same by rules ``[name, first, low, high]``, with a list of what it may be as a fifth where it is chosen."""
    return _for_tab(RECALL.replace("RULES", json.dumps(list(rules))), tab)


def _for_tab(script: str, tab: str) -> str:
    return script.replace("KEY", json.dumps(f"{KEPT}{tab}")).replace("READY", json.dumps(f"ready{tab}"))
