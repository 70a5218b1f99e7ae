"""Draws and trains pseudo-subjects: each finished one is an adapter file in the working folder."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...data.captions import with_article
from ...errors import UserError
from ...formats.adapter_file import FILE_NAME
from ...generation.image_settings import save_image
from ...generation.sampling import describe_image, sample_images
from ...generation.settings import Sampling
from ...io.files import write_atomic
from ...io.run_layout import LOG
from ...io.untrusted import NOT_TEXT
from ...pipelines.base import BaseSource
from ..many.subjects import train_subjects
from ..settings.config import TrainConfig
from ..step.seeds import derive
from .objects import PLACES, KnownObject

TRIGGER = "sks"
PROBE_STEPS = 3


@dataclass(frozen=True)
class PseudoSubject:
    """An object that the base draws, as if it were new: captioned with a trigger and its class word."""

    name: str
    known: KnownObject
    seed: int

    def prompt(self, number: int) -> str:
        """The prompt of an image."""
        phrase = self.known.phrase
        named = phrase if phrase.startswith(("a ", "an ", "the ")) else with_article(phrase)
        return f"{named}{_place(number)}"

    def caption(self, number: int) -> str:
        """The caption of an image in training."""
        return f"a {TRIGGER} {self.known.class_word}{_place(number)}"


def _place(number: int) -> str:
    return f" {PLACES[number % len(PLACES)]}"


def pseudo_subjects(objects: Sequence[KnownObject], seed: int) -> list[PseudoSubject]:
    """One for each object, with a name and a seed of its own."""
    return [
        PseudoSubject(f"{number:03d}-{known.slug}", known, derive(seed, "pseudo-subject", str(number)))
        for number, known in enumerate(objects)
    ]


class Workshop:
    """The working folder: images and finished adapters of pseudo-subjects. ``config``: the settings of all runs."""

    def __init__(self, folder: Path, config: TrainConfig, images: int) -> None:
        if NOT_TEXT.search(str(folder)):
            raise UserError(f"{folder} is not a UTF-8 name, which the list of its images needs: choose another folder")
        self.folder, self.config, self.images = folder, config, images

    @property
    def source(self) -> BaseSource:
        """The base."""
        config = self.config
        return BaseSource(config.pretrained_model_name_or_path, None, "auto", config.variant, config.revision)

    def adapter(self, subject: PseudoSubject) -> Path:
        """The file of a finished pseudo-subject."""
        return self.folder / f"{subject.name}.safetensors"

    def missing(self, subjects: Sequence[PseudoSubject]) -> list[PseudoSubject]:
        """The pseudo-subjects that are not finished."""
        return [subject for subject in subjects if not self.adapter(subject).exists()]

    def draw(self, subjects: Sequence[PseudoSubject]) -> float:
        """Draw the missing images and captions of these pseudo-subjects; returns the seconds of an image, or 0."""
        todo = [(s, n) for s in subjects for n in range(self.images) if not self._image(s, n).exists()]
        if not todo:
            return 0.0
        pipe = self.source.open()
        sampling = Sampling.for_base(self.source.base, self.config.sample_steps, self.config.sample_guidance)
        started = time.monotonic()
        for subject, number in todo:
            prompt, seed = subject.prompt(number), derive(subject.seed, "image", str(number))
            (image,) = sample_images(pipe, [prompt], [seed], sampling)
            file = self._image(subject, number)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file.with_suffix(".txt"), subject.caption(number))
            save_image(image, file, describe_image(pipe, image, prompt, seed, sampling, []))
        return (time.monotonic() - started) / len(todo)

    def _image(self, subject: PseudoSubject, number: int) -> Path:
        return self.folder / "images" / subject.name / f"{number}.png"

    def probe(self, subject: PseudoSubject) -> float:
        """The seconds of a training step, measured in a run of a few steps that is deleted."""
        self._train([subject], PROBE_STEPS)
        lines = (self._runs / subject.name / LOG).read_text(encoding="utf-8").splitlines()
        shutil.rmtree(self._runs)
        return float(json.loads(lines[-1])["seconds"])

    def train(self, subjects: Sequence[PseudoSubject]) -> None:
        """Train these pseudo-subjects together and keep their adapters. Raises as :func:`train_subjects`."""
        self._train(subjects, self.config.max_train_steps)
        for subject in subjects:
            (self._runs / subject.name / FILE_NAME).replace(self.adapter(subject))
        shutil.rmtree(self._runs)

    @property
    def _runs(self) -> Path:
        return self.folder / "runs"

    def run_config(self, subject: PseudoSubject) -> TrainConfig:
        """The settings of the run of one pseudo-subject."""
        return replace(
            self.config, instance_data_dir=str(self._image(subject, 0).parent), seed=subject.seed, use_captions=True,
            instance_prompt=f"a {TRIGGER} {subject.known.class_word}", trigger=TRIGGER,
            class_word=subject.known.class_word,
        )  # fmt: skip

    def _train(self, subjects: Sequence[PseudoSubject], steps: int | None) -> None:
        own = ("instance_data_dir", "seed", "use_captions", "instance_prompt", "trigger", "class_word")
        configs = {subject.name: self.run_config(subject) for subject in subjects}
        entries = [{"name": name, **{key: getattr(config, key) for key in own}} for name, config in configs.items()]
        listing = self.folder / "subjects.yaml"
        write_atomic(listing, json.dumps(entries))  # JSON is YAML
        shared = replace(
            self.config, subjects=str(listing), output_dir=str(self._runs), overwrite_output_dir=True,
            max_train_steps=steps,
        )  # fmt: skip
        with _quiet():
            train_subjects(shared)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the findings and notes of each run: its photos are few and its steps, too."""
    logger: Any = logging.getLogger("nora_diffusion.training")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
