"""Two subjects side by side: their prompts, the true images, and the probe that reads both halves of an image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import UserError
from ...io import tensor_cache
from ..examples import subject_object
from ..measures import probe
from ..measures.probes import Fitted, packed, sources, unpacked
from ..world import vocabulary as world
from ..world.render import render
from ..world.scenes import PROBE_SEED, Background, Scene, SceneObject, random_background, random_object

Pair = tuple[str, str]
"""The subject on the left and the one on the right."""

TRIGGERS = dict(
    zip(
        (
            "panda", "boba", "gremlin-green", "skate", "tiger", "backpack-green", "cyclops-purple", "tractor",
            "stripemug-red", "android-pink", "parrot", "castle",
        ),
        world.RARE_WORDS,
        strict=True,
    )
)  # fmt: skip
"""Subjects with a trigger of their own."""
KINDS = ("snow", "grass", "night", "wall")
"""Backgrounds of the prompts."""
HALVES = ((0, 38), (32, 64))
"""Columns of the left and of the right object in a scene of two; the left one is larger."""
FITTED, TESTED, SHARE = 3000, 400, 0.55


def parse_pair(text: str) -> Pair:
    """``A+B``. Raises :class:`UserError` unless both are different known subjects."""
    one, plus, two = text.partition("+")
    if not plus or one == two or not {one, two} <= set(TRIGGERS):
        raise UserError(f"{text!r} is not a pair LEFT+RIGHT of two different subjects of {', '.join(TRIGGERS)}")
    return one, two


def words(subject: str) -> str:
    """Trigger and class word."""
    return f"{TRIGGERS[subject]} {subject_object(subject).class_word}"


def prompts(pair: Pair, kinds: Sequence[str] = KINDS, *, by_class: bool = False) -> list[str]:
    """A prompt for each background; ``by_class``: without triggers, for the base."""
    one, two = (subject_object(name).class_word if by_class else words(name) for name in pair)
    return [f"a {one} next to a {two} {Background(kind).phrase}" for kind in kinds]


def true_scenes(pair: Pair, kinds: Sequence[str], jitters: Sequence[int]) -> tuple[list[Image.Image], list[str]]:
    """Rendered images of both subjects and their prompts: for each background one for each jitter."""
    objects = subject_object(pair[0]), subject_object(pair[1])
    scenes = [
        Scene(objects, Background(kind), text, jitter)
        for kind, text in zip(kinds, prompts(pair, kinds), strict=True)
        for jitter in jitters
    ]
    return [Image.fromarray(render(scene)) for scene in scenes], [scene.caption for scene in scenes]


def halves(images: np.ndarray) -> list[np.ndarray]:
    """The left and the right half of images (N, 64, 64, 3), each enlarged to the whole size."""
    return [
        np.stack([
            np.asarray(Image.fromarray(x).crop((a, 0, b, 64)).resize((64, 64), Image.Resampling.BICUBIC))
            for x in images
        ])
        for a, b in HALVES
    ]  # fmt: skip


class Reader:
    """Names the object in each half of an image: one of the held-out subjects, or the class of any other object.

    ``accuracy``: on rendered scenes of two objects, left and right together.
    """

    def __init__(self, network: Any, fitted: probe.Probe, accuracy: float) -> None:
        self.network, self.probe, self.accuracy = network, fitted, accuracy

    def read(self, images: Sequence[Image.Image]) -> list[tuple[str, str]]:
        """``(left, right)`` of each image."""
        left, right = (
            self.probe.predict(probe.features(self.network, half))
            for half in halves(np.stack([np.asarray(image) for image in images]))
        )
        return list(zip(left, right, strict=True))


def cached_reader() -> Reader:
    """The reader, from the disk cache unless the code or the images that it depends on have changed."""
    settings = hashlib.sha256(f"{HALVES} {FITTED} {TESTED} {SHARE}".encode()).hexdigest()[:8]
    key = f"probes-halves-{settings}-{sources(Path(probe.__file__))}"
    network, stored = probe.load_network(), tensor_cache.load(key)
    if stored is None:
        fitted = probe.fit(*_labeled(network, PROBE_SEED + 2, FITTED, soft=True))
        accuracy = fitted.accuracy(*_labeled(network, PROBE_SEED + 3, TESTED, soft=False))
        stored = packed("half", Fitted(fitted, accuracy))
        tensor_cache.store(key, stored)
    found = unpacked(stored, "half")
    return Reader(network, found.probe, found.accuracy)


def _labeled(network: Any, seed: int, count: int, soft: bool) -> tuple[Tensor, list[str]]:
    """Features and names of both halves of random scenes of two objects; ``soft``: blurred."""
    rng, images, names = Random(seed), list[np.ndarray](), list[tuple[str, str]]()
    while len(images) < count:
        (one, left), (two, right) = _drawn(rng), _drawn(rng)
        if one != two:
            images.append(render(Scene((one, two), random_background(rng), "", rng.getrandbits(32))))
            names.append((left, right))
    stacked = np.stack(images)
    features = [probe.features(network, half) for half in halves(probe.soften(stacked) if soft else stacked)]
    return torch.cat(features), [name for side in zip(*names, strict=True) for name in side]


def _drawn(rng: Random) -> tuple[SceneObject, str]:
    """A held-out subject and its name, or another object and its class word."""
    if rng.random() < SHARE:
        name = rng.choice(list(world.SUBJECTS))
        return subject_object(name), name
    item, _ = random_object(rng)
    return item, item.class_word
