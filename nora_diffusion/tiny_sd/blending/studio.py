"""Trains the subjects, draws the pairs in every mode, and scores the images."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...formats.adapter_file import FILE_NAME
from ...generation.settings import Sampling
from ...io.files import write_atomic
from ...loaders import list_adapters, load_adapter, set_adapters
from ...pipelines.base import open_pipeline
from ...pipelines.precision import MIXED_DTYPES
from ...scoring.judges import Judge, image_features, load_judge
from ...training.measuring.samples import sample
from ...training.planning.opening import lower_precision
from ...training.settings.config import Precision
from ..examples import TRIGGER, subject_object, write_subject
from .modes import MODES
from .pairs import KINDS, TRIGGERS, Pair, Reader, halves, prompts, true_scenes, words

AT_ONCE = 6
TRUTH, ALONE, BASE = "truth", "alone", "base"
REFERENCES = (TRUTH, ALONE, BASE)
"""The rendered scenes; each half from an image in which only the adapter of its subject is active; the base without
adapters, by class words."""
SPLIT = 35
"""The column between the halves."""
Scores = dict[str, list[float]]
"""The values of each image."""


def train_subjects_of(names: Sequence[str], weights: Path, out: Path, precision: Precision) -> None:
    """Train the adapters that are missing in ``out/adapters``, by the trainer's defaults."""
    from ...training import TrainConfig, train_subjects

    missing = [name for name in dict.fromkeys(names) if not (out / "adapters" / name / FILE_NAME).is_file()]
    for start in range(0, len(missing), AT_ONCE):
        entries = [_entry(name, out / "subjects" / name) for name in missing[start : start + AT_ONCE]]
        listing = write_atomic(out / "subjects.yaml", json.dumps(entries, indent=1))
        config = TrainConfig(
            subjects=str(listing), pretrained_model_name_or_path=str(weights / "pipeline"), use_captions=True,
            output_dir=str(out / "adapters"), mixed_precision=precision,
        )  # fmt: skip
        with sdpa_kernel(SDPBackend.MATH):  # faster on CPUs at this size
            train_subjects(config)


def _entry(name: str, folder: Path) -> dict[str, Any]:
    """The subject in the trainer's list; its images and captions are written to ``folder``, with its own trigger."""
    write_subject(name, folder)
    for file in folder.rglob("*.txt"):
        file.write_text(file.read_text(encoding="utf-8").replace(TRIGGER, TRIGGERS[name]), encoding="utf-8")
    return {
        "name": name, "instance_data_dir": str(folder), "instance_prompt": f"a {words(name)}",
        "trigger": TRIGGERS[name], "class_word": subject_object(name).class_word, "method": "nora", "seed": 0,
    }  # fmt: skip


class Studio:
    """Draws pairs with the base of ``weights`` and the adapters of ``out``."""

    def __init__(self, weights: Path, out: Path, reader: Reader, precision: Precision) -> None:
        self.out, self.reader, self.dtype = out, reader, MIXED_DTYPES[precision]
        self.pipe = open_pipeline(weights / "pipeline")
        lower_precision(self.pipe, self.dtype)
        self.judge: Judge = load_judge(weights / "judge")

    def draw(self, mode: str, pair: Pair, seeds: Sequence[int]) -> tuple[list[Image.Image], float]:
        """Images of each background and seed, and the CPU seconds of one."""
        if mode == TRUTH:
            return true_scenes(pair, KINDS, seeds)[0], 0.0
        texts = [text for text in prompts(pair, by_class=mode == BASE) for _ in seeds]
        numbers, sampling = list(seeds) * len(KINDS), Sampling.for_base(None)
        started = time.process_time()
        subjects = {} if mode == BASE else {self._loaded(name): words(name) for name in pair}
        drawn = []
        for active in [[name] for name in subjects] if mode == ALONE else [list(subjects)]:
            set_adapters(self.pipe, active)
            with nullcontext() if mode in REFERENCES else MODES[mode](self.pipe, subjects, pair):
                drawn.append(sample(self.pipe, texts, numbers, sampling, self.dtype))
        images = drawn[0] if mode != ALONE else [_joined(*both) for both in zip(*drawn, strict=True)]
        return images, (time.process_time() - started) / len(images)

    def _loaded(self, subject: str) -> str:
        name = subject.replace("-", "_")
        if name not in list_adapters(self.pipe).get("unet", ()):
            load_adapter(self.pipe, self.out / "adapters" / subject, name, activate=False)
        return name

    def score(self, pair: Pair, images: Sequence[Image.Image], seeds: Sequence[int]) -> Scores:
        """Each image's scores: 1 or 0 by the independent probe, and cosines of halves by the base's judge.

        ``both right``: each half shows its subject. ``blended``: a half shows the other one. ``lost``: a half shows
        neither its subject nor another object of its class. ``own``: cosine of a half to the same half of the true
        images; ``other``: to the half that shows the other subject, which is high where features mix.
        """
        left, right = pair
        read = self.reader.read(images)
        classes = {name: subject_object(name).class_word for name in pair}
        own, other = self._cosines(images, true_scenes(pair, KINDS, seeds)[0])
        return {
            "left right": [float(a == left) for a, _ in read],
            "right right": [float(b == right) for _, b in read],
            "both right": [float((a, b) == pair) for a, b in read],
            "blended": [float(a == right or b == left) for a, b in read],
            "lost": [float(a not in (left, classes[left]) or b not in (right, classes[right])) for a, b in read],
            "own": own,
            "other": other,
        }

    def _cosines(self, images: Sequence[Image.Image], truth: Sequence[Image.Image]) -> tuple[list[float], list[float]]:
        found, true = (
            [image_features(self.judge, [Image.fromarray(x) for x in half]) for half in halves(np.stack(list(arrays)))]
            for arrays in (map(np.asarray, images), map(np.asarray, truth))
        )
        (left, right), (true_left, true_right) = found, true

        def cosines(one: Tensor, other: Tensor) -> list[float]:
            values = ((left @ one.T).mean(1) + (right @ other.T).mean(1)) / 2
            return [round(value, 6) for value in values.tolist()]

        return cosines(true_left, true_right), cosines(true_right, true_left)


def _joined(left: Image.Image, right: Image.Image) -> Image.Image:
    joined = right.copy()
    joined.paste(left.crop((0, 0, SPLIT, left.height)))
    return joined
