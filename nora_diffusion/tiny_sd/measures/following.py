"""Does the base follow prompts? An independent probe reads images of captions that were not in the training data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..recipe.stage_diffusion import TRAINING_FILE
from ..world.render import render
from ..world.scenes import PROBE_SEED, UNSEEN_SEED, Scene, random_scene
from . import probe

FITTED, TESTED = 4000, 500  # rendered scenes that the probes are fitted to, and tested on


def _background(scene: Scene) -> str:
    """The kind; for a plain background also its color."""
    background = scene.background
    return f"{background.kind} {background.color}" if background.kind == "solid" else background.kind


def _companion(scene: Scene) -> str:
    if scene.accessory or scene.tree:
        return scene.accessory or "tree"
    if len(scene.objects) == 1:
        return "none"
    return "more of it" if len(set(scene.objects)) == 1 else "another object"


Answer = Callable[[Scene], str]
QUESTIONS: dict[str, Answer] = {
    "object": lambda scene: scene.objects[0].class_word,
    "background": _background,
    "companion": _companion,
}
"""What the probes predict from an image, each with the function that gives the true answer for a scene."""


@dataclass(frozen=True)
class Following:
    """For each question, the share of generated images that are right, and the probe's accuracy on rendered scenes."""

    right: dict[str, float]
    probe_accuracy: dict[str, float]

    def report(self) -> dict[str, float]:
        """One flat dictionary for the report file."""
        shares = {f"{name}_right": share for name, share in self.right.items()}
        return shares | {f"probe_{name}_accuracy": share for name, share in self.probe_accuracy.items()}


def training_captions(weights: Path) -> set[str]:
    """All captions that the UNet of these weights was trained on."""
    ranges = json.loads((weights / TRAINING_FILE).read_text(encoding="utf-8"))["scenes"]
    return {random_scene(seed, i).caption for seed, total in ranges for i in range(total)}


def unseen_scenes(weights: Path, count: int) -> list[Scene]:
    """The first ``count`` scenes of ``UNSEEN_SEED`` whose captions are new: not trained on, and not repeated."""
    seen = training_captions(weights)
    scenes: list[Scene] = []
    index = 0
    while len(scenes) < count:
        scene = random_scene(UNSEEN_SEED, index)
        if scene.caption not in seen:
            seen.add(scene.caption)
            scenes.append(scene)
        index += 1
    return scenes


def measure(weights: Path, generate: Callable[[list[str]], np.ndarray], prompts: int = 200) -> Following:
    """Fit and test the probes on rendered scenes, then let them read the images generated for unseen captions.

    The companion (accessory, tree, second object) is scored only where the caption names one.
    """
    network = probe.load_network()
    train, test = rendered(network, 0, FITTED, soft=True), rendered(network, FITTED, TESTED)
    scenes = unseen_scenes(weights, prompts)
    generated = probe.features(network, generate([scene.caption for scene in scenes]))
    right, accuracy = {}, {}
    for name, answer in QUESTIONS.items():
        fitted, accuracy[name] = probe.fit_and_test(labeled(train, answer), labeled(test, answer))
        asked = [i for i, scene in enumerate(scenes) if answer(scene) != "none"]
        right[name] = fitted.accuracy(generated[asked], [answer(scenes[i]) for i in asked])
    return Following(right, accuracy)


def rendered(network: Any, start: int, count: int, soft: bool = False) -> tuple[list[Scene], Any]:
    """Scenes that no stage was trained on, and the features of their images; ``soft``: of blurred images."""
    scenes = [random_scene(PROBE_SEED, start + i) for i in range(count)]
    images = np.stack([render(scene) for scene in scenes])
    return scenes, probe.features(network, probe.soften(images) if soft else images)


def labeled(data: tuple[list[Scene], Any], answer: Answer) -> probe.Labeled:
    """The features of scenes with the true answers to a question."""
    scenes, features = data
    return features, [answer(scene) for scene in scenes]
