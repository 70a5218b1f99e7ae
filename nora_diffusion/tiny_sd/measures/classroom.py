"""Teaches subjects to the base: adapters are trained together, and each is measured alone."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...data import read_images
from ...data.folder import SCORING_FOLDER
from ...data.transforms import Transform
from ...errors import UserError
from ...formats.adapter_file import FILE_NAME
from ...generation.settings import Sampling
from ...io.files import write_atomic
from ...loaders import delete_adapter, load_adapter
from ...pipelines.base import open_pipeline
from ...pipelines.precision import MIXED_DTYPES, best_precision
from ...scoring.judges import load_judge
from ...training.measuring.heldout_loss import HeldOutPhotos, encode_photos, heldout_losses
from ...training.measuring.samples import sample
from ...training.planning.opening import lower_precision
from ...training.settings.config import Precision, TrainConfig
from ...training.settings.listing import read_subjects
from ...training.step.denoiser import encode_prompts
from ...training.step.objective import Objective
from ..examples import subject_object
from ..world.vocabulary import with_article
from .methods import is_peer, is_trained, training_settings
from .peers import Peer, train_peer
from .probes import Probes
from .prompt_sets import asked
from .scores import Drawn, Judges, failed, score
from .shown import shown_prompt, write_shown
from .teaching import TAUGHT_METHODS, TAUGHT_SUBJECTS, Lesson, Student

log = logging.getLogger(__name__)

ADAPTER = "subject"
MOST_IMAGES = 10
"""Images that are generated at once."""


class Classroom:
    """Teaches subjects to the base of ``weights``: several lessons train in one batch, and each is measured alone.

    The base is opened once and the held-out photos of a subject are encoded once. ``precision``: of training and images
    (default: the best for this machine).
    """

    def __init__(self, weights: Path, probes: Probes, precision: Precision | None = None) -> None:
        self.weights = weights
        self.precision = precision or best_precision(torch.device("cpu"))
        self.pipe = open_pipeline(weights / "pipeline")
        lower_precision(self.pipe, self.dtype)
        self.objective = Objective.of(self.pipe.scheduler)
        self.judges = Judges(load_judge(weights / "judge"), probes)
        self._held_out: dict[str, tuple[HeldOutPhotos, list[str]]] = {}
        self._untrained: dict[tuple[str, str, int], list[Image.Image]] = {}

    @property
    def dtype(self) -> torch.dtype:
        return MIXED_DTYPES[self.precision]

    def teach(self, students: Sequence[Student]) -> list[Lesson]:
        """Train the adapters together and each peer alone, then measure each, so that a lesson depends on no other."""
        groups = [[s for s in students if not is_peer(s.method)], *([s] for s in students if is_peer(s.method))]
        lessons = {
            student.name: lesson
            for group in groups
            if group
            for student, lesson in zip(group, self._taught(group), strict=True)
        }
        return [lessons[student.name] for student in students]

    def _taught(self, students: Sequence[Student]) -> list[Lesson]:
        """The lessons of adapters that train together, or of one peer."""
        started, used = time.monotonic(), time.process_time()
        with tempfile.TemporaryDirectory() as name:
            folder, first = Path(name), students[0]
            peer = self._train_peer(first, folder) if is_peer(first.method) else None
            errors = {first.name: peer.error} if peer else self._train(students, folder)
            seconds = (time.monotonic() - started) / len(students)
            lessons = [self._measured(s, folder, peer, seconds, errors.get(s.name, "")) for s in students]
        cpu = (time.process_time() - used) / len(students)
        return [replace(lesson, cpu_seconds=cpu) for lesson in lessons]

    def _config(self, students: Sequence[Student], folder: Path) -> TrainConfig:
        """The runs of these students in ``folder``, and what is shown to them."""
        for subject, shown in {(student.subject, student.shown) for student in students}:
            write_shown(subject, folder / "subjects" / f"{subject}-{shown}", shown)
        return TrainConfig(
            subjects=str(write_atomic(folder / "subjects.yaml", _listing(students, folder))),
            pretrained_model_name_or_path=str(self.weights / "pipeline"), output_dir=str(folder / "runs"),
            use_captions=True, mixed_precision=self.precision,
        )  # fmt: skip

    def _train_peer(self, student: Student, folder: Path) -> Peer:
        config = read_subjects(self._config([student], folder))[student.name]
        with efficient_attention():
            return train_peer(config, student.method)

    def _train(self, students: Sequence[Student], folder: Path) -> dict[str, str]:
        """Train into ``folder``; return the errors of adapters that could not be trained, such as divergence."""
        from ...training import train_subjects

        students = [student for student in students if is_trained(student.method)]
        if not students:
            return {}
        try:
            with efficient_attention():
                train_subjects(self._config(students, folder))
        except UserError as error:
            unfinished = [s for s in students if not (folder / "runs" / s.name / FILE_NAME).is_file()]
            if len(unfinished) == len(students):
                raise
            return {student.name: str(error) for student in unfinished}
        return {}

    def _measured(self, student: Student, folder: Path, peer: Peer | None, seconds: float, error: str) -> Lesson:
        if error:
            log.warning("%s could not be trained, and counts as failed: %s", student.name, error)
            return Lesson(
                student.subject,
                student.method,
                seconds,
                scores=failed(student.prompts, "+" in student.subject),
                error=error,
            )
        with self._loaded(student, folder, peer) as (pipe, trained, size):
            images = {name: self._images(pipe, student, name) for name in student.prompts}
            loss = self.heldout_loss(student.subject, pipe)
        scores = {"heldout_loss": loss}
        for name, drawn in images.items():
            untrained = partial(self._untrained_images, student, name)
            scores |= score(name, self.judges, Drawn(asked(name, student.subject), drawn, student.shown, untrained))
        return Lesson(student.subject, student.method, seconds, images, scores, trained, size)

    @contextmanager
    def _loaded(self, student: Student, folder: Path, peer: Peer | None) -> Iterator[tuple[Any, int, int]]:
        """The pipeline with what was trained, its number of parameters and its bytes."""
        if peer is not None:
            yield peer.pipe, peer.trained, peer.bytes
        elif not is_trained(student.method):
            yield self.pipe, 0, 0
        else:
            info = load_adapter(self.pipe, folder / "runs" / student.name, ADAPTER).info
            try:
                yield self.pipe, info.trained_parameters, info.bytes
            finally:
                delete_adapter(self.pipe, ADAPTER)

    def _images(self, pipe: Any, student: Student, name: str) -> list[Image.Image]:
        """The images of a prompt set by the active adapter."""
        prompts = [scene.caption for _, scene in asked(name, student.subject)]
        first = len(prompts) * int(student.settings.get("seed", 0))
        found: list[Image.Image] = []
        for start in range(0, len(prompts), MOST_IMAGES):
            own = prompts[start : start + MOST_IMAGES]
            seeds = range(first + start, first + start + len(own))
            found += sample(pipe, own, seeds, Sampling.for_base(None), self.dtype)
        return found

    def _untrained_images(self, student: Student, name: str) -> list[Image.Image]:
        key = student.subject, name, int(student.settings.get("seed", 0))
        if key not in self._untrained:
            self._untrained[key] = self._images(self.pipe, student, name)
        return self._untrained[key]

    def heldout_loss(self, subject: str, pipe: Any = None) -> float:
        """The mean denoising loss on the subject's scoring images, with their captions, for the active adapter.

        ``pipe``: a peer's own (default: the classroom's).
        """
        pipe = pipe or self.pipe
        if subject not in self._held_out:
            with tempfile.TemporaryDirectory() as folder:
                write_shown(subject, Path(folder))
                photos = read_images(Path(folder) / SCORING_FOLDER)
                shape = (photos[0].size[0], photos[0].size[1])
                encoded = encode_photos(self.pipe, photos, Transform([shape]))
                captions = [photo.path.with_suffix(".txt").read_text().strip() for photo in photos]
            self._held_out[subject] = encoded, captions
        photos_, captions = self._held_out[subject]
        with torch.no_grad():
            embeddings = encode_prompts(pipe, captions)  # of the text encoder with its adapter, if it has one
        return float(heldout_losses(pipe, self.objective, photos_, embeddings, self.dtype).mean())


def efficient_attention() -> AbstractContextManager[None]:
    """On CPUs the backward pass of fused attention is several times slower in bf16, at this size."""
    return sdpa_kernel(SDPBackend.MATH)


def _listing(students: Sequence[Student], folder: Path) -> str:
    """The list of subjects for the trainer: an entry for each adapter."""
    return json.dumps([_entry(student, folder) for student in students], indent=1)  # which is YAML


def _entry(student: Student, folder: Path) -> dict[str, Any]:
    settings = {**training_settings(student.method), "seed": 0, **student.settings}
    word = subject_object(student.subject.split("+")[0]).class_word
    if settings.get("with_prior_preservation"):
        settings.setdefault("class_prompt", with_article(word))
    return {
        "name": student.name, "instance_data_dir": str(folder / "subjects" / f"{student.subject}-{student.shown}"),
        "instance_prompt": shown_prompt(student.subject), "class_word": word, **settings,
    }  # fmt: skip


def teach_all(weights: Path) -> tuple[dict[str, float], list[Lesson]]:
    """Every subject by every method: mean shares, longest training time in seconds, accuracy of the probes."""
    probes = Probes(cached=False)
    room = Classroom(weights, probes)
    lessons = [
        lesson
        for method in TAUGHT_METHODS
        for slug in TAUGHT_SUBJECTS
        for lesson in room.teach([Student("one", slug, method)])  # alone, so that its seconds are its own
    ]
    report = {f"probe_taught_{name}_accuracy": probes[name].accuracy for name in ("subject", "background")}
    for method in TAUGHT_METHODS:
        own = [lesson for lesson in lessons if lesson.method == method]
        for share in ("subject_right", "background_right"):
            report[f"{method}_{share}"] = float(np.mean([lesson.scores[share] for lesson in own]))
        report[f"{method}_seconds_at_most"] = max(lesson.seconds for lesson in own)
    return report, lessons
