"""Can the base be taught? LoRA and NoRA learn held-out subjects, and the independent probe names them in new scenes."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from ..examples import TRIGGER, plain_colors, scoring_scenes, subject_thing, write_subject
from ..world import vocabulary as world
from ..world.render import render
from ..world.scenes import Ground, Scene, random_ground
from . import probe
from .following import PROBE_SEED, QUESTIONS, rendered

SUBJECTS = ("cyclops-purple", "tiger", "backpack-green", "tractor")  # fixed before anything was trained
METHODS: dict[str, dict[str, Any] | None] = {
    "base": None,  # the control: what the class word alone is worth
    "lora": {"method": "lora", "rank": 8, "inner_rank": None},
    "nora": {},
    "lora_r2": {"method": "lora", "rank": 2, "inner_rank": None},  # about as many trained numbers as NoRA
    "lora_xs": {"method": "lora_xs", "rank": 32, "inner_rank": None},  # as many: a dense core, the weight's plain SVD
    "lora_mini": {"method": "lora_mini"},  # as many: NoRA's chain in random subspaces
    "dora": {"method": "dora", "rank": 8, "inner_rank": None},
}
TAUGHT = ("base", "lora", "nora")  # what ``evaluate --teach`` shows; :mod:`.comparing` takes any of them
_NEW = ("forest", "desert", "mountains", "road", "wall", "sea", "sky", "night", "sunset")  # in no training picture
_EACH = 80  # rendered pictures of each held-out subject that the probe is fitted to


@dataclass(frozen=True)
class Lesson:
    """One subject learned by one method: its pictures on the new prompts, and what the judges read in them.

    The shares are the independent probes'; the scores are mean cosines of the base's own judge, to other pictures of
    the subject and to the prompts without the trigger.
    """

    subject: str
    method: str
    seconds: float
    pictures: list[Image.Image]
    subject_right: float
    background_right: float
    both_right: float
    subject_score: float
    prompt_score: float
    trained_numbers: int
    bytes: int


@dataclass(frozen=True)
class Probes:
    """The probes of subjects (among all held-out ones) and of backgrounds, and their accuracy on rendered scenes."""

    network: Any
    subject: probe.Probe
    background: probe.Probe
    accuracy: dict[str, float]


def new_scenes(slug: str) -> list[Scene]:
    """Ten scenes of a subject on backgrounds that its six training pictures do not show."""
    thing, plain = subject_thing(slug), Ground("solid", plain_colors(slug)[2])
    grounds = [*(Ground(kind) for kind in _NEW), plain]
    return [Scene((thing,), g, f"a {TRIGGER} {thing.class_word} {g.phrase}", 0) for g in grounds]


def fit_probes(fitted: int = 4000, tested: int = 500, each: int = _EACH) -> Probes:
    """Fit both probes to softened scenes and test them on others."""
    network, answer = probe.load_network(), QUESTIONS["background"]
    train, test = rendered(network, 0, fitted, soft=True), rendered(network, fitted, tested)
    background = probe.fit(train[1], [answer(scene) for scene in train[0]])
    known, unknown = _heldout(network, 0, each, soft=True), _heldout(network, 1, each // 4)
    subject = probe.fit(known[1], known[0])
    accuracy = {
        "subject": subject.accuracy(unknown[1], unknown[0]),
        "background": background.accuracy(test[1], [answer(scene) for scene in test[0]]),
    }
    return Probes(network, subject, background, accuracy)


def _heldout(network: Any, seed: int, each: int, soft: bool = False) -> tuple[list[str], Any]:
    """Names and features of pictures of every held-out subject on random grounds; ``soft``: of softened pictures."""
    names, pictures = heldout_pictures(PROBE_SEED + seed, each)
    return names, probe.features(network, probe.soften(pictures) if soft else pictures)


def heldout_pictures(seed: int, each: int) -> tuple[list[str], np.ndarray]:
    """``each`` rendered pictures of every held-out subject on random grounds, and whose they are."""
    rng = Random(seed)
    names = [slug for slug in world.SUBJECTS for _ in range(each)]
    scenes = [Scene((subject_thing(n),), random_ground(rng), "", rng.getrandbits(32)) for n in names]
    return names, np.stack([render(scene) for scene in scenes])


def learn(base: Path, slug: str, values: dict[str, Any], out: Path) -> None:
    """Train an adapter on the subject's six pictures."""
    from ...training import TrainConfig, train
    from ...training.settings.defaults import embedded_defaults

    word = subject_thing(slug).class_word
    with tempfile.TemporaryDirectory() as photos:
        write_subject(slug, Path(photos))
        config = TrainConfig(
            pretrained_model_name_or_path=str(base), instance_data_dir=photos, output_dir=str(out),
            instance_prompt=f"a {TRIGGER} {word}", class_word=word, use_captions=True,
            **{"seed": 0, **embedded_defaults(values.get("method", "nora")), **values},
        )  # fmt: skip
        train(config)


def teach(weights: Path, probes: Probes, slug: str, method: str, **values: Any) -> Lesson:
    """Learn one subject, and draw it once in each new scene (seeds 0 to 9; with ``seed=s`` 10 s to 10 s + 9).

    ``values``: settings of the training beside those of the method.
    """
    from ...generation.sampling import Sampling, sample_images
    from ...loaders import load_adapter
    from ...pipelines.base import EMBEDDED_GUIDANCE, open_pipeline

    scenes, base, own = new_scenes(slug), weights / "pipeline", METHODS[method]
    pipe, started, trained, size = open_pipeline(base), time.monotonic(), 0, 0
    if own is not None:
        with tempfile.TemporaryDirectory() as out:
            learn(base, slug, {**own, **values}, Path(out) / "adapter")
            info = load_adapter(pipe, Path(out) / "adapter", "subject").info
            trained, size = info.trained_parameters, info.bytes
    seconds = time.monotonic() - started
    seeds = [10 * int(values.get("seed", 0)) + i for i in range(len(scenes))]
    pictures = sample_images(pipe, [s.caption for s in scenes], seeds, Sampling(20, EMBEDDED_GUIDANCE))
    return Lesson(slug, method, seconds, pictures, **_judged(weights, probes, slug, pictures),
                  trained_numbers=trained, bytes=size)  # fmt: skip


def _judged(weights: Path, probes: Probes, slug: str, pictures: list[Image.Image]) -> dict[str, float]:
    """What probes and judge say of pictures of the new scenes."""
    from ...scoring.judges import load_judge, prompt_score, subject_score

    scenes, judge = new_scenes(slug), load_judge(weights / "judge")
    seen = probe.features(probes.network, np.stack([np.asarray(p) for p in pictures]))
    subject = np.array([read == slug for read in probes.subject.predict(seen)])
    asked = [QUESTIONS["background"](scene) for scene in scenes]
    background = np.array([a == b for a, b in zip(probes.background.predict(seen), asked, strict=True)])
    real = [Image.fromarray(render(scene)) for scene in scoring_scenes(slug)]
    return {
        "subject_right": float(subject.mean()),
        "background_right": float(background.mean()),
        "both_right": float((subject & background).mean()),
        "subject_score": subject_score(judge, pictures, real),
        "prompt_score": prompt_score(judge, pictures, [s.caption.replace(f"{TRIGGER} ", "") for s in scenes]),
    }


def teach_all(weights: Path) -> tuple[dict[str, float], list[Lesson]]:
    """Every subject by every method: shares over all pictures, the longest time in seconds, the probes' accuracy."""
    probes = fit_probes()
    lessons = [teach(weights, probes, slug, method) for method in TAUGHT for slug in SUBJECTS]
    report = {f"probe_taught_{name}_accuracy": share for name, share in probes.accuracy.items()}
    for method in TAUGHT:
        own = [lesson for lesson in lessons if lesson.method == method]
        report[f"{method}_subject_right"] = float(np.mean([lesson.subject_right for lesson in own]))
        report[f"{method}_background_right"] = float(np.mean([lesson.background_right for lesson in own]))
        report[f"{method}_seconds_at_most"] = max(lesson.seconds for lesson in own)
    return report, lessons
