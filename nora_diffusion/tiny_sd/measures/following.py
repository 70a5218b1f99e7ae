"""Does the base follow prompts? Captions that it never trained on, read back by the independent probe."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count as count_up
from pathlib import Path
from typing import Any

import numpy as np

from ..recipe.stage_diffusion import TRAINING_FILE
from ..world.render import render
from ..world.scenes import Scene, random_scene
from . import probe

PROBE_SEED, UNSEEN_SEED = 900_002, 900_003  # no training stage draws from them

# What is asked of a picture, and what the scene behind its caption says about it.
QUESTIONS: dict[str, Callable[[Scene], str]] = {
    "object": lambda scene: scene.things[0].class_word,
    "background": lambda scene: f"{scene.ground.kind} {scene.ground.a}" if _plain(scene) else scene.ground.kind,
    "companion": lambda scene: scene.accessory or ("tree" if scene.tree else _others(scene)),
}


def _plain(scene: Scene) -> bool:
    return scene.ground.kind == "solid"


def _others(scene: Scene) -> str:
    if len(scene.things) == 1:
        return "none"
    return "more of it" if len(set(scene.things)) == 1 else "another object"


@dataclass(frozen=True)
class Following:
    """Shares of pictures whose answer is right, and of rendered scenes that the probe itself reads right."""

    right: dict[str, float]
    probe_accuracy: dict[str, float]
    prompts: int

    def report(self) -> dict[str, float]:
        """Flat numbers for the report file."""
        shares = {f"{name}_right": share for name, share in self.right.items()}
        return shares | {f"probe_{name}_accuracy": share for name, share in self.probe_accuracy.items()}


def training_captions(weights: Path) -> set[str]:
    """Every caption that the UNet of these weights was trained on."""
    ranges = json.loads((weights / TRAINING_FILE).read_text(encoding="utf-8"))["scenes"]
    return {random_scene(seed, i).caption for seed, total in ranges for i in range(total)}


def unseen_scenes(weights: Path, count: int) -> list[Scene]:
    """The first ``count`` scenes of their own seed whose captions are no training captions, each caption once."""
    seen = training_captions(weights)
    out: list[Scene] = []
    for i in count_up():
        scene = random_scene(UNSEEN_SEED, i)
        if scene.caption not in seen:
            seen.add(scene.caption)
            out.append(scene)
        if len(out) == count:
            return out
    raise AssertionError


def measure(
    weights: Path,
    generate: Callable[[list[str]], np.ndarray],
    prompts: int = 200,
    fitted: int = 4000,
    tested: int = 500,
) -> Following:
    """Fit the probes to softened scenes, test them on others, and let them read pictures of unseen captions.

    The companion (accessory, tree, second object) is judged only where a caption names one.
    """
    network = probe.load_network()
    train, test = rendered(network, 0, fitted, soft=True), rendered(network, fitted, tested)
    scenes = unseen_scenes(weights, prompts)
    drawn = probe.features(network, generate([scene.caption for scene in scenes]))
    right, accuracy = {}, {}
    for name, answer in QUESTIONS.items():
        fit = probe.fit(train[1], [answer(scene) for scene in train[0]])
        accuracy[name] = fit.accuracy(test[1], [answer(scene) for scene in test[0]])
        asked = [i for i, scene in enumerate(scenes) if answer(scene) != "none"]
        right[name] = fit.accuracy(drawn[asked], [answer(scenes[i]) for i in asked])
    return Following(right, accuracy, prompts)


def rendered(network: Any, start: int, count: int, soft: bool = False) -> tuple[list[Scene], Any]:
    """Rendered scenes that no stage trained on, and their features; ``soft``: of softened pictures."""
    scenes = [random_scene(PROBE_SEED, start + i) for i in range(count)]
    pictures = np.stack([render(scene) for scene in scenes])
    return scenes, probe.features(network, probe.soften(pictures) if soft else pictures)
