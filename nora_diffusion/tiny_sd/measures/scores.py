"""The scores of a lesson's images, one function for each prompt set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from PIL import Image
from torch import Tensor

from ...scoring.judges import Judge, image_features, prompt_score, subject_score
from ..examples import scoring_scenes, subject_object
from ..world.render import render
from ..world.scenes import Scene
from ..world.vocabulary import RARE_WORDS
from . import probe
from .following import QUESTIONS
from .probes import Probes, companion_of
from .shown import shown_scenes

Asked = Sequence[tuple[str, Scene]]
"""The member of the lesson's subject that each image shows, and its scene."""


@dataclass(frozen=True)
class Judges:
    """What reads images: the base's own judge, and independent probes."""

    clip: Judge
    probes: Probes


@dataclass(frozen=True)
class Drawn:
    """The images of a prompt set. ``untrained``: the base's images of the same prompts and seeds, where needed."""

    asked: Asked
    images: Sequence[Image.Image]
    shown: int
    untrained: Callable[[], Sequence[Image.Image]]


def scenes_scores(judges: Judges, drawn: Drawn) -> dict[str, float]:
    """Subject and background, each by a probe, scores of the judge, and backgrounds copied from the training images.

    ``told_apart`` (several members): the share in which the probe prefers the right member among these.
    """
    features, asked = judges.probes.features(drawn.images), drawn.asked
    subject = np.array(_right(judges, "subject", features, [slug for slug, _ in asked]))
    background = np.array(
        _right(judges, "background", features, [QUESTIONS["background"](scene) for _, scene in asked])
    )
    scores = {
        "subject_right": float(subject.mean()),
        "background_right": float(background.mean()),
        "both_right": float((subject & background).mean()),
        "subject_score": _mean_by_member(judges, drawn),
        "prompt_score": prompt_score(judges.clip, drawn.images, [_without_trigger(scene) for _, scene in asked]),
        "copied_background": copied_backgrounds(judges.probes, features, drawn),
    }
    names = list(dict.fromkeys(slug for slug, _ in asked))
    if len(names) > 1:
        scores["told_apart"] = told_apart(judges.probes["subject"].probe, features, [slug for slug, _ in asked])
    return scores


def copied_backgrounds(probes: Probes, features: Tensor, drawn: Drawn) -> float:
    """The share of images whose background is one of the training images', and not the one asked for."""
    read = probes["background"].probe.predict(features)
    answer = QUESTIONS["background"]
    copied = [
        found in {answer(scene) for scene in shown_scenes(slug, drawn.shown)} - {answer(wanted)}
        for found, (slug, wanted) in zip(read, drawn.asked, strict=True)
    ]
    return float(np.mean(copied))


def told_apart(fitted: probe.Probe, features: Tensor, truth: Sequence[str]) -> float:
    """The share of images for which the probe prefers the right subject among those of ``truth``."""
    names = sorted(set(truth))
    chosen = fitted.scores(features)[:, [fitted.labels.index(name) for name in names]].argmax(1).tolist()
    return float(np.mean([names[index] == name for index, name in zip(chosen, truth, strict=True)]))


def companions_scores(judges: Judges, drawn: Drawn) -> dict[str, float]:
    """Does the subject still obey? Shares with the right companion, with the right subject, and with both."""
    features = judges.probes.features(drawn.images)
    companion = np.array(_right(judges, "companion", features, [companion_of(scene) for _, scene in drawn.asked]))
    subject = np.array(_right(judges, "accompanied subject", features, [slug for slug, _ in drawn.asked]))
    return {
        "companion_right": float(companion.mean()),
        "accompanied_right": float(subject.mean()),
        "obeyed": float((companion & subject).mean()),
    }


def class_scores(judges: Judges, drawn: Drawn) -> dict[str, float]:
    """Has the class word changed? Share with the right class, distance to the base's images, likeness to the subject.

    ``class_distance``: mean of ``1 - cosine`` between the images with and without the adapter, by prompt and seed.
    ``class_likeness``: the subject score of the images, which for the base is not 0 either.
    """
    right = _right(
        judges, "object", judges.probes.features(drawn.images),
        [subject_object(slug).class_word for slug, _ in drawn.asked],
    )  # fmt: skip
    pairs = image_features(judges.clip, drawn.images) * image_features(judges.clip, drawn.untrained())
    return {
        "class_right": float(np.mean(right)),
        "class_distance": max(0.0, float(1 - pairs.sum(-1).mean())),
        "class_likeness": _mean_by_member(judges, drawn),
    }


def _right(judges: Judges, name: str, features: Tensor, truth: Sequence[str]) -> list[bool]:
    return [a == b for a, b in zip(judges.probes[name].probe.predict(features), truth, strict=True)]


def _mean_by_member(judges: Judges, drawn: Drawn) -> float:
    """The subject score: each member's images with its own scoring images."""
    found = []
    for slug in dict.fromkeys(slug for slug, _ in drawn.asked):
        own = [image for image, (name, _) in zip(drawn.images, drawn.asked, strict=True) if name == slug]
        references = [Image.fromarray(render(scene)) for scene in scoring_scenes(slug)]
        found += [subject_score(judges.clip, own, references)] * len(own)
    return float(np.mean(found))


def _without_trigger(scene: Scene) -> str:
    return " ".join(word for word in scene.caption.split() if word not in RARE_WORDS)


Scorer = Callable[[Judges, Drawn], dict[str, float]]
SCORERS: Mapping[str, Scorer] = MappingProxyType(
    {"scenes": scenes_scores, "companions": companions_scores, "class": class_scores}
)
"""By prompt set."""
Better = Literal["higher", "lower"]
BETTER: Mapping[str, Better] = MappingProxyType({
    "heldout_loss": "lower",
    "subject_score": "higher",
    "prompt_score": "higher",
    "subject_right": "higher",
    "background_right": "higher",
    "both_right": "higher",
    "copied_background": "lower",
    "told_apart": "higher",
    "companion_right": "higher",
    "accompanied_right": "higher",
    "obeyed": "higher",
    "class_right": "higher",
    "class_distance": "lower",
    "class_likeness": "lower",
})  # fmt: skip
"""All scores, and which value is better."""


def score(name: str, judges: Judges, drawn: Drawn) -> dict[str, float]:
    """The scores of a prompt set's images."""
    return SCORERS[name](judges, drawn)


NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "scenes": (
        "subject_right", "background_right", "both_right", "subject_score", "prompt_score", "copied_background",
    ),
    "companions": ("companion_right", "accompanied_right", "obeyed"),
    "class": ("class_right", "class_distance", "class_likeness"),
})  # fmt: skip
"""The scores of each prompt set. ``scenes`` of several members have ``told_apart`` too."""


def failed(prompts: Sequence[str], several: bool = False) -> dict[str, float]:
    """The scores of a lesson without an adapter: the worst values."""
    names = [name for prompt_set in prompts for name in NAMES[prompt_set]]
    names += ["told_apart"] * (several and "scenes" in prompts)
    return {name: 0.0 if BETTER[name] == "higher" else math.inf for name in ("heldout_loss", *names)}
