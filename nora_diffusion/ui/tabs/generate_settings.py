"""Sampling settings of the Generate tab, stored in the browser over a reload."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ...generation.samplers import SAMPLERS
from ...generation.settings import MAX_PROMPT
from ..backend import Backend
from ..layout.page import ALWAYS_LAST, UNQUEUED, Page
from ..request import LIMITS, MAX_SEED

STORAGE_KEY = "nora_diffusion"
OWN_SAMPLER = "own"
SAMPLER_CHOICES = [("The base's own", OWN_SAMPLER), *((sampler.title, name) for name, sampler in SAMPLERS.items())]
FIRST_PROMPT = "a red car in the forest"
SAVE = """
(...values) => {
  if (document.documentElement.dataset[READY] !== 'true') return [];  // the stored values are not restored yet
  const stored = Object.fromEntries(FIELDS.map((name, n) => [name, values[n]]));
  try { localStorage.setItem(KEY, JSON.stringify(stored)); } catch (error) { /* storage is full or disabled */ }
  return [];
}
"""
RESTORE = """
() => {
  let stored = null;
  try { stored = JSON.parse(localStorage.getItem(KEY)); } catch (error) { /* not JSON: use the defaults */ }
  stored = stored && typeof stored === 'object' ? stored : {};
  document.documentElement.dataset[READY] = 'true';
  return RULES.map(([name, initial, low, high, choices]) => {
    const value = stored[name];
    const size = typeof value === 'string' ? value.length : Number(value);
    const valid = typeof value === typeof initial && Number.isFinite(size) && low <= size && size <= high;
    return valid && (!choices || choices.includes(value)) ? value : initial;
  });
}
"""


@dataclass
class Settings:
    """The components of the settings."""

    negative: gr.Textbox
    count: gr.Slider
    seed: gr.Number
    steps: gr.Slider
    guidance: gr.Slider
    width: gr.Number
    height: gr.Number
    apart: gr.Checkbox
    sampler: gr.Dropdown
    hires: gr.Slider
    hires_strength: gr.Slider
    last_seed: gr.State

    def components(self) -> dict[str, Any]:
        """The components that are stored over a reload and restored from an image, by name."""
        names = ("negative", "count", "seed", "steps", "guidance", "width", "height", "apart", "sampler", "hires",
                 "hires_strength")  # fmt: skip
        return {name: getattr(self, name) for name in names}


def defaults(engine: Backend) -> dict[str, Any]:
    """Initial values. Width and height 0 mean the base's default size."""
    return {
        "prompt": FIRST_PROMPT if engine.is_embedded else "", "negative": "", "count": 1, "seed": -1,
        "steps": engine.steps, "guidance": engine.guidance, "width": 0, "height": 0,
        "apart": True, "sampler": OWN_SAMPLER, "hires": 1, "hires_strength": 0.5,
    }  # fmt: skip


def build(page: Page) -> Settings:
    """Number of images and seed visible, the rest in an accordion."""
    initial = defaults(page.app.engine)
    with gr.Row():
        count = gr.Slider(*LIMITS["count"], initial["count"], step=1, label="Number of images", scale=2, min_width=160)
        seed = gr.Number(initial["seed"], label="Seed (-1 = random)", precision=0, minimum=-1, maximum=MAX_SEED,
                         min_width=170, elem_id="seed")  # fmt: skip
    with gr.Row():
        dice = gr.Button("Random seed", size="sm", elem_id="dice", min_width=120)
        reuse = gr.Button("Reuse last seed", size="sm", elem_id="reuse", min_width=120)
    with gr.Accordion("Sampling settings", open=False):
        negative = gr.Textbox(label="Negative prompt", max_length=MAX_PROMPT)
        with gr.Row():
            steps = gr.Slider(*LIMITS["steps"], initial["steps"], step=1, label="Steps", min_width=160)
            guidance = gr.Slider(*LIMITS["guidance"], initial["guidance"], step=0.1, label="CFG scale", min_width=160)
        sampler = gr.Dropdown(SAMPLER_CHOICES, value=initial["sampler"], label="Sampler", elem_id="sampler")
        with gr.Row():
            width, height = (
                gr.Number(0, label=label, info="0 = model default", precision=0, step=8, minimum=0,
                          maximum=LIMITS["width"][1], min_width=120)
                for label in ("Width", "Height")
            )  # fmt: skip
        with gr.Row(visible=not page.app.engine.is_remote):
            hires = gr.Slider(*LIMITS["hires"], initial["hires"], step=0.25, label="Second pass: enlarge by",
                              info="1 = no second pass", min_width=160)  # fmt: skip
            hires_strength = gr.Slider(*LIMITS["hires_strength"], initial["hires_strength"], step=0.05,
                                       label="Second pass: changes", min_width=160)  # fmt: skip
        apart = gr.Checkbox(
            initial["apart"], label="Keep subjects apart", elem_id="apart", visible=not page.app.engine.is_remote,
            info="Where the prompt names the subjects of several adapters, each acts on its own subject only",
        )  # fmt: skip
        reset = gr.Button("Reset to defaults", size="sm")
    last = gr.State(None)
    settings = Settings(
        negative, count, seed, steps, guidance, width, height, apart, sampler, hires, hires_strength, last
    )
    dice.click(lambda: -1, None, seed, api_visibility="private", queue=False)
    reuse.click(lambda used: -1 if used is None else used, last, seed, api_visibility="private", queue=False)
    _persist(page, settings, initial, reset)
    return settings


def _persist(page: Page, settings: Settings, initial: dict[str, Any], reset: gr.Button) -> None:
    fields = {"prompt": page.prompt} | settings.components()
    components = list(fields.values())
    # In the browser only: a slow server would overwrite what the user types in the meantime.
    changes = [component.change for component in components]
    gr.on(changes, None, components, None, js=save_script(fields), **ALWAYS_LAST, **UNQUEUED)
    page.blocks.load(None, None, components, js=restore_script(_rules(initial)), **UNQUEUED)
    names = [name for name in fields if name != "prompt"]
    reset.click(lambda: [initial[name] for name in names], None, [fields[name] for name in names], **UNQUEUED)


def _rules(initial: Mapping[str, Any]) -> list[list[Any]]:
    rules = [[name, value, *LIMITS.get(name, (0, MAX_PROMPT))] for name, value in initial.items()]
    return [[*rule, *([[value for _, value in SAMPLER_CHOICES]] if rule[0] == "sampler" else [])] for rule in rules]


def save_script(fields: Iterable[str], tab: str = "") -> str:
    """The script that stores the values of these fields in the browser; each ``tab`` has its own storage key."""
    return _for_tab(SAVE.replace("FIELDS", json.dumps(list(fields))), tab)


def restore_script(rules: Iterable[Sequence[Any]], tab: str = "") -> str:
    """The script that restores stored values; invalid ones are replaced by the initial value.

    A rule is ``[name, initial, low, high]``, and a list of valid values for a choice. Strings are limited in length.
    """
    return _for_tab(RESTORE.replace("RULES", json.dumps(list(rules))), tab)


def _for_tab(script: str, tab: str) -> str:
    return script.replace("KEY", json.dumps(f"{STORAGE_KEY}{tab}")).replace("READY", json.dumps(f"ready{tab}"))
