"""Can the base learn subjects? Adapters are trained on held-out subjects, and an independent probe reads new scenes."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from ...pipelines.base import open_pipeline
from ...scoring.judges import load_judge, prompt_score, subject_score
from ..examples import (
    SCORING_KINDS,
    TRIGGER,
    contrasting_colors,
    instance_prompt,
    scoring_scenes,
    subject_object,
    subject_scene,
    write_subject,
)
from ..world import vocabulary as world
from ..world.render import render
from ..world.scenes import PROBE_SEED, Background, Scene, random_background
from . import probe
from .following import FITTED, QUESTIONS, TESTED, labeled, rendered

METHODS: dict[str, dict[str, Any] | None] = {  # training settings on top of the embedded base's defaults
    "base": None,  # the control, not trained: what the class word alone achieves
    "lora": {"method": "lora", "rank": 8},
    "nora": {"method": "nora"},
    "lora_r2": {"method": "lora", "rank": 2},  # about as many trained parameters as NoRA
    "lora_xs": {"method": "lora_xs", "rank": 32},  # as many as NoRA: dense core, plain SVD
    "lora_mini": {"method": "lora_mini"},  # as many as NoRA: its chain in random subspaces
    "dora": {"method": "dora", "rank": 8},
}
TAUGHT_METHODS = ("base", "lora", "nora")  # of ``evaluate --teach``
TAUGHT_SUBJECTS = ("cyclops-purple", "tiger", "backpack-green", "tractor")  # chosen before anything was trained
_NEW_KINDS = (*SCORING_KINDS, "sky", "night", "sunset")  # backgrounds that are not in the training images
_EACH = 80  # rendered images of each held-out subject that the subject probe is fitted to


@dataclass(frozen=True)
class Lesson:
    """One subject trained with one method: images of the new scenes, and their scores.

    The independent probes measure the shares ``*_right``. The scores are mean cosines of the base's own judge: to other
    images of the subject, and to the prompts without the trigger.
    """

    subject: str
    method: str
    seconds: float
    images: list[Image.Image]
    subject_right: float
    background_right: float
    both_right: float
    subject_score: float
    prompt_score: float
    trained_parameters: int
    bytes: int


@dataclass(frozen=True)
class Probes:
    """The probes for subjects (all held-out ones) and backgrounds, and their accuracy on rendered scenes."""

    network: Any
    subject: probe.Probe
    background: probe.Probe
    accuracy: dict[str, float]


def new_scenes(slug: str) -> list[Scene]:
    """Ten scenes of a subject on backgrounds that are not in its six training images."""
    backgrounds = [*map(Background, _NEW_KINDS), Background("solid", contrasting_colors(slug)[2])]
    return [subject_scene(slug, background, jitter=0) for background in backgrounds]


def fit_probes(fitted: int = FITTED, tested: int = TESTED, each: int = _EACH) -> Probes:
    """Fit both probes to blurred rendered scenes and test them on other scenes."""
    network, answer = probe.load_network(), QUESTIONS["background"]
    train, test = rendered(network, 0, fitted, soft=True), rendered(network, fitted, tested)
    background, background_accuracy = probe.fit_and_test(labeled(train, answer), labeled(test, answer))
    subject, subject_accuracy = probe.fit_and_test(
        _heldout(network, 0, each, soft=True), _heldout(network, 1, each // 4)
    )
    return Probes(network, subject, background, {"subject": subject_accuracy, "background": background_accuracy})


def _heldout(network: Any, seed: int, each: int, soft: bool = False) -> probe.Labeled:
    """Features and names of the images of :func:`heldout_images`; ``soft``: of blurred images."""
    names, images = heldout_images(PROBE_SEED + seed, each)
    return probe.features(network, probe.soften(images) if soft else images), names


def heldout_images(seed: int, each: int) -> tuple[list[str], np.ndarray]:
    """The subject's name and the image of ``each`` renderings of every held-out subject on random backgrounds."""
    rng = Random(seed)
    names = [slug for slug in world.SUBJECTS for _ in range(each)]
    scenes = [Scene((subject_object(n),), random_background(rng), "", rng.getrandbits(32)) for n in names]
    return names, np.stack([render(scene) for scene in scenes])


def method_settings(method: str) -> dict[str, Any] | None:
    """The training settings of an entry of ``METHODS``, with the embedded base's defaults; None: not trained."""
    from ...training.settings.defaults import embedded_defaults

    own = METHODS[method]
    return None if own is None else {**embedded_defaults(own["method"]), **own}


def learn(base: Path, slug: str, settings: dict[str, Any], out: Path) -> None:
    """Train an adapter on the subject's six images."""
    from ...training import TrainConfig, train

    with tempfile.TemporaryDirectory() as images:
        write_subject(slug, Path(images))
        config = TrainConfig(
            pretrained_model_name_or_path=str(base), instance_data_dir=images, output_dir=str(out),
            instance_prompt=instance_prompt(slug), class_word=subject_object(slug).class_word, use_captions=True,
            **{"seed": 0, **settings},
        )  # fmt: skip
        train(config)


def teach(weights: Path, probes: Probes, slug: str, method: str, **settings: Any) -> Lesson:
    """Train a method on a subject and generate one image of each of the ten new scenes.

    ``settings`` override the training settings of the method. The images have the seeds ``10 s`` to ``10 s + 9``
    for the training seed ``s``.
    """
    from ...generation.sampling import sample_images
    from ...generation.settings import Sampling
    from ...loaders import load_adapter

    scenes, base, own = new_scenes(slug), weights / "pipeline", method_settings(method)
    pipe, started, trained, size = open_pipeline(base), time.monotonic(), 0, 0
    if own is not None:
        with tempfile.TemporaryDirectory() as out:
            learn(base, slug, {**own, **settings}, Path(out) / "adapter")
            info = load_adapter(pipe, Path(out) / "adapter", "subject").info
            trained, size = info.trained_parameters, info.bytes
    seconds = time.monotonic() - started
    first = len(scenes) * int(settings.get("seed", 0))
    seeds = range(first, first + len(scenes))
    images = sample_images(pipe, [scene.caption for scene in scenes], seeds, Sampling.for_base(None))
    return Lesson(slug, method, seconds, images, **_scores(weights, probes, slug, images),
                  trained_parameters=trained, bytes=size)  # fmt: skip


def _scores(weights: Path, probes: Probes, slug: str, images: list[Image.Image]) -> dict[str, float]:
    """Shares and scores of the images of a subject's new scenes."""
    scenes, judge = new_scenes(slug), load_judge(weights / "judge")
    features = probe.features(probes.network, np.stack([np.asarray(image) for image in images]))
    subject = np.array([name == slug for name in probes.subject.predict(features)])
    asked = [QUESTIONS["background"](scene) for scene in scenes]
    background = np.array([a == b for a, b in zip(probes.background.predict(features), asked, strict=True)])
    references = [Image.fromarray(render(scene)) for scene in scoring_scenes(slug)]
    return {
        "subject_right": float(subject.mean()),
        "background_right": float(background.mean()),
        "both_right": float((subject & background).mean()),
        "subject_score": subject_score(judge, images, references),
        "prompt_score": prompt_score(judge, images, [scene.caption.replace(f"{TRIGGER} ", "") for scene in scenes]),
    }


def teach_all(weights: Path) -> tuple[dict[str, float], list[Lesson]]:
    """Every subject by every method: mean shares, longest training time in seconds, accuracy of the probes."""
    probes = fit_probes()
    lessons = [teach(weights, probes, slug, method) for method in TAUGHT_METHODS for slug in TAUGHT_SUBJECTS]
    report = {f"probe_taught_{name}_accuracy": share for name, share in probes.accuracy.items()}
    for method in TAUGHT_METHODS:
        own = [lesson for lesson in lessons if lesson.method == method]
        report[f"{method}_subject_right"] = float(np.mean([lesson.subject_right for lesson in own]))
        report[f"{method}_background_right"] = float(np.mean([lesson.background_right for lesson in own]))
        report[f"{method}_seconds_at_most"] = max(lesson.seconds for lesson in own)
    return report, lessons
