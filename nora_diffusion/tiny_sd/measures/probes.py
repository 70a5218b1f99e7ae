"""The independent probes that read the images of a lesson, each fitted at its first use and kept in the disk cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...io import tensor_cache
from ...io.files import sha256
from ..examples import subject_object
from ..world import vocabulary as world
from ..world.render import render
from ..world.scenes import PROBE_SEED, Scene, random_background, random_object
from . import following, probe
from .following import FITTED, QUESTIONS, TESTED, labeled, rendered
from .prompt_sets import HATS

COMPANIONS = ("none", *HATS, "tree", "another object", *(f"{number} of it" for number in world.NUMBERS.values()))
"""What the probe ``companion`` tells apart."""
TENSORS = ("weight", "bias", "mean", "std")


@dataclass(frozen=True)
class Fitted:
    """A probe and its accuracy on rendered scenes that it was not fitted to."""

    probe: probe.Probe
    accuracy: float


@dataclass(frozen=True)
class Sizes:
    """Rendered images: ``scenes`` random ones, ``alone`` of each subject, ``accompanied`` of each with each companion.

    ``tested``: random scenes to test with; of the others a quarter of the fitted number.
    """

    scenes: int = FITTED
    tested: int = TESTED
    alone: int = 80
    accompanied: int = 12


Group = Callable[[Any, Sizes], dict[str, Fitted]]
"""Fits the probes that read the same images."""


def fit_scenes(network: Any, sizes: Sizes) -> dict[str, Fitted]:
    """Background and class word, from random scenes of the base's own objects."""
    train, test = rendered(network, 0, sizes.scenes, soft=True), rendered(network, sizes.scenes, sizes.tested)
    return {
        name: Fitted(*probe.fit_and_test(labeled(train, QUESTIONS[name]), labeled(test, QUESTIONS[name])))
        for name in ("background", "object")
    }


def fit_alone(network: Any, sizes: Sizes) -> dict[str, Fitted]:
    """The subject among all 25, from images of each alone on random backgrounds."""
    sets = [heldout_images(PROBE_SEED, sizes.alone), heldout_images(PROBE_SEED + 1, max(1, sizes.alone // 4))]
    train, test = (
        (probe.features(network, probe.soften(images) if soft else images), names)
        for (names, images), soft in zip(sets, (True, False), strict=True)
    )
    return {"subject": Fitted(*probe.fit_and_test(train, test))}


def fit_accompanied(network: Any, sizes: Sizes) -> dict[str, Fitted]:
    """The companion and the subject, from images of each subject with each companion (:data:`COMPANIONS`)."""
    sets = [accompanied(PROBE_SEED, sizes.accompanied), accompanied(PROBE_SEED + 1, max(1, sizes.accompanied // 4))]
    found = []
    for (names, scenes), soft in zip(sets, (True, False), strict=True):
        images = np.stack([render(scene) for scene in scenes])
        features = probe.features(network, probe.soften(images) if soft else images)
        found.append((features, names, [companion_of(scene) for scene in scenes]))
    train, test = found
    return {
        "accompanied subject": Fitted(*probe.fit_and_test((train[0], train[1]), (test[0], test[1]))),
        "companion": Fitted(*probe.fit_and_test((train[0], train[2]), (test[0], test[2]))),
    }


GROUPS: dict[str, Group] = {
    "background": fit_scenes,
    "object": fit_scenes,
    "subject": fit_alone,
    "companion": fit_accompanied,
    "accompanied subject": fit_accompanied,
}
"""The probes by name."""


class Probes:
    """The probes by name: keys of :data:`GROUPS`. ``cached``: keep them on disk until what they depend on changes."""

    def __init__(self, sizes: Sizes | None = None, cached: bool = True) -> None:
        self.sizes, self.cached = sizes or Sizes(), cached
        self._fitted: dict[str, Fitted] = {}

    @cached_property
    def network(self) -> Any:
        """The network whose features the probes read: a comparison without images needs none."""
        return probe.load_network()

    def __getitem__(self, name: str) -> Fitted:
        if name not in self._fitted:
            group = GROUPS[name]
            own = [other for other, fit in GROUPS.items() if fit is group]
            code = [Path(file) for file in (probe.__file__, __file__, following.__file__)]
            key = f"probes-{group.__name__}-{sources(*code)}"
            stored = tensor_cache.load(key) if self.cached else None
            found = group(self.network, self.sizes) if stored is None else {n: unpacked(stored, n) for n in own}
            if self.cached and stored is None:
                tensor_cache.store(key, {k: v for n in own for k, v in packed(n, found[n]).items()})
            self._fitted |= found
        return self._fitted[name]

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """The features of images that all probes read."""
        return probe.features(self.network, np.stack([np.asarray(image) for image in images]))


def sources(*code: Path) -> str:
    """A hash of the drawn world and of ``code``, on which a probe on disk depends."""
    package = Path(__file__).parents[1]
    files = [*code, *(package / "world").glob("*.py"), *(package / "sprites").iterdir()]
    return hashlib.sha256("".join(map(sha256, sorted(files))).encode()).hexdigest()[:32]


def packed(name: str, fitted: Fitted) -> dict[str, Tensor]:
    """A probe as tensors whose names begin with ``name``. Inverse: :func:`unpacked`."""
    values = {f"{name} {key}": getattr(fitted.probe, key) for key in TENSORS}
    labels = torch.tensor(list("\n".join(fitted.probe.labels).encode()))
    return values | {f"{name} labels": labels, f"{name} accuracy": torch.tensor(fitted.accuracy)}


def unpacked(stored: dict[str, Tensor], name: str) -> Fitted:
    """The probe that :func:`packed` stored under ``name``."""
    labels = bytes(stored[f"{name} labels"].tolist()).decode().split("\n")
    found = probe.Probe(tuple(labels), *(stored[f"{name} {key}"] for key in TENSORS))
    return Fitted(found, float(stored[f"{name} accuracy"]))


def heldout_images(seed: int, each: int) -> tuple[list[str], np.ndarray]:
    """The subject's name and the image of ``each`` renderings of every held-out subject on random backgrounds."""
    rng = Random(seed)
    names = [slug for slug in world.SUBJECTS for _ in range(each)]
    scenes = [Scene((subject_object(n),), random_background(rng), "", rng.getrandbits(32)) for n in names]
    return names, np.stack([render(scene) for scene in scenes])


def accompanied(seed: int, each: int) -> tuple[list[str], list[Scene]]:
    """Names and scenes: ``each`` of every held-out subject with every companion, on random backgrounds."""
    rng = Random(seed)
    pairs = [(slug, companion) for slug in world.SUBJECTS for companion in COMPANIONS for _ in range(each)]
    return [slug for slug, _ in pairs], [_accompanied(slug, companion, rng) for slug, companion in pairs]


def _accompanied(slug: str, companion: str, rng: Random) -> Scene:
    subject = subject_object(slug)
    scene = Scene((subject,), random_background(rng), "", rng.getrandbits(32), tree=companion == "tree")
    if companion in HATS:
        return replace(scene, accessory=companion)
    if companion == "another object":
        return replace(scene, objects=(subject, random_object(rng, tint=0.1)[0]))
    counts = {f"{number} of it": count for count, number in world.NUMBERS.items()}
    return replace(scene, objects=(subject,) * counts.get(companion, 1))


def companion_of(scene: Scene) -> str:
    """The true answer of the probe ``companion``."""
    if scene.accessory or scene.tree:
        return scene.accessory or "tree"
    if len(set(scene.objects)) > 1:
        return "another object"
    return f"{world.NUMBERS[len(scene.objects)]} of it" if len(scene.objects) > 1 else "none"
