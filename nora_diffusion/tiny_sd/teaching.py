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

from . import probe, world
from .examples import TRIGGER, plain_colours, subject_thing, write_subject
from .following import PROBE_SEED, QUESTIONS, rendered
from .render import render
from .scenes import Ground, Scene, random_ground

SUBJECTS = ("cyclops-purple", "tiger", "backpack-green", "tractor")  # fixed before anything was trained
METHODS: dict[str, dict[str, Any] | None] = {
    "base": None,  # the control: what the class word alone is worth
    "lora": {"method": "lora", "rank": 8, "inner_rank": None},
    "nora": {},
}
_NEW = ("forest", "desert", "mountains", "road", "wall", "sea", "sky", "night", "sunset")  # in no training picture
_EACH = 80  # rendered pictures of each held-out subject that the probe is fitted to


@dataclass(frozen=True)
class Lesson:
    """One subject learned by one method: its pictures on the new prompts, and what the probes read in them."""

    subject: str
    method: str
    seconds: float
    pictures: list[Image.Image]
    subject_right: float
    background_right: float


@dataclass(frozen=True)
class Probes:
    """The probes of subjects (among all held-out ones) and of backgrounds, and their accuracy on rendered scenes."""

    network: Any
    subject: probe.Probe
    background: probe.Probe
    accuracy: dict[str, float]


def new_scenes(slug: str) -> list[Scene]:
    """Ten scenes of a subject on backgrounds that its six training pictures do not show."""
    thing, plain = subject_thing(slug), Ground("solid", plain_colours(slug)[2])
    grounds = [*(Ground(kind) for kind in _NEW), plain]
    return [Scene((thing,), g, f"a {TRIGGER} {thing.class_word} {g.phrase}", 0) for g in grounds]


def fit_probes(fitted: int = 4000, tested: int = 500, each: int = _EACH) -> Probes:
    """Fit both probes to rendered scenes and test them on others."""
    network, answer = probe.load_network(), QUESTIONS["background"]
    train, test = rendered(network, 0, fitted), rendered(network, fitted, tested)
    background = probe.fit(train[1], [answer(scene) for scene in train[0]])
    known, unknown = _heldout(network, 0, each), _heldout(network, 1, each // 4)
    subject = probe.fit(known[1], known[0])
    accuracy = {
        "subject": subject.accuracy(unknown[1], unknown[0]),
        "background": background.accuracy(test[1], [answer(scene) for scene in test[0]]),
    }
    return Probes(network, subject, background, accuracy)


def _heldout(network: Any, seed: int, each: int) -> tuple[list[str], Any]:
    """Names and features of pictures of every held-out subject on random grounds."""
    names, pictures = heldout_pictures(PROBE_SEED + seed, each)
    return names, probe.features(network, pictures)


def heldout_pictures(seed: int, each: int) -> tuple[list[str], np.ndarray]:
    """``each`` rendered pictures of every held-out subject on random grounds, and whose they are."""
    rng = Random(seed)
    names = [slug for slug in world.SUBJECTS for _ in range(each)]
    scenes = [Scene((subject_thing(n),), random_ground(rng), "", rng.getrandbits(32)) for n in names]
    return names, np.stack([render(scene) for scene in scenes])


def learn(base: Path, slug: str, values: dict[str, Any], out: Path) -> None:
    """Train an adapter on the subject's six pictures."""
    from ..training import TrainConfig, train
    from ..training.defaults import EMBEDDED

    word = subject_thing(slug).class_word
    with tempfile.TemporaryDirectory() as photos:
        write_subject(slug, Path(photos))
        config = TrainConfig(
            pretrained_model_name_or_path=str(base), instance_data_dir=photos, output_dir=str(out), seed=0,
            instance_prompt=f"a {TRIGGER} {word}", class_word=word, use_captions=True, **{**EMBEDDED, **values},
        )  # fmt: skip
        train(config)


def teach(weights: Path, probes: Probes, slug: str, method: str) -> Lesson:
    """Learn one subject, and draw it once in each new scene (seeds 0 to 9)."""
    from ..base import open_pipeline
    from ..generation import EMBEDDED_GUIDANCE, run
    from ..loaders import load_adapter

    scenes, base, values = new_scenes(slug), weights / "pipeline", METHODS[method]
    pipe, started = open_pipeline(base), time.monotonic()
    if values is not None:
        with tempfile.TemporaryDirectory() as out:
            learn(base, slug, values, Path(out) / "adapter")
            load_adapter(pipe, Path(out) / "adapter", "subject")
    seconds = time.monotonic() - started
    pictures = run(pipe, [s.caption for s in scenes], list(range(len(scenes))), 20, EMBEDDED_GUIDANCE)
    seen = probe.features(probes.network, np.stack([np.asarray(p) for p in pictures]))
    return Lesson(
        slug, method, seconds, pictures,
        probes.subject.accuracy(seen, [slug] * len(scenes)),
        probes.background.accuracy(seen, [QUESTIONS["background"](s) for s in scenes]),
    )  # fmt: skip


def teach_all(weights: Path) -> tuple[dict[str, float], list[Lesson]]:
    """Every subject by every method: shares over all pictures, the longest time in seconds, the probes' accuracy."""
    probes = fit_probes()
    lessons = [teach(weights, probes, slug, method) for method in METHODS for slug in SUBJECTS]
    report = {f"probe_taught_{name}_accuracy": share for name, share in probes.accuracy.items()}
    for method in METHODS:
        own = [lesson for lesson in lessons if lesson.method == method]
        report[f"{method}_subject_right"] = float(np.mean([lesson.subject_right for lesson in own]))
        report[f"{method}_background_right"] = float(np.mean([lesson.background_right for lesson in own]))
        report[f"{method}_seconds_at_most"] = max(lesson.seconds for lesson in own)
    return report, lessons
