"""Teaches subjects to the base: adapters are trained together, and each is measured alone."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

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
from ...scoring.judges import Judge, load_judge, prompt_score, subject_score
from ...training.measuring.heldout_loss import HeldOutPhotos, encode_photos, heldout_losses
from ...training.measuring.samples import sample
from ...training.planning.opening import lower_precision
from ...training.settings.config import Precision
from ...training.step.denoiser import TextEmbeddings, encode_prompts
from ...training.step.objective import Objective
from ..examples import TRIGGER, instance_prompt, scoring_scenes, subject_object, write_subject
from ..world.render import render
from . import probe
from .following import QUESTIONS
from .methods import is_trained, method_settings
from .teaching import TAUGHT_METHODS, TAUGHT_SUBJECTS, Lesson, Probes, Student, fit_probes, new_scenes

log = logging.getLogger(__name__)

ADAPTER = "subject"


class Classroom:
    """Teaches subjects to the base of ``weights``: several lessons train in one batch, and each is measured alone.

    The base is opened once and the held-out photos of a subject are encoded once. ``precision``: of training and images
    (default: the best for this machine).
    """

    def __init__(self, weights: Path, probes: Probes, precision: Precision | None = None) -> None:
        self.weights, self.probes = weights, probes
        self.precision = precision or best_precision(torch.device("cpu"))
        self.pipe = open_pipeline(weights / "pipeline")
        lower_precision(self.pipe, self.dtype)
        self.objective = Objective.of(self.pipe.scheduler)
        self.judge = load_judge(weights / "judge")
        self._held_out: dict[str, tuple[HeldOutPhotos, TextEmbeddings]] = {}

    @property
    def dtype(self) -> torch.dtype:
        return MIXED_DTYPES[self.precision]

    def teach(self, students: Sequence[Student]) -> list[Lesson]:
        """Train the adapters together, then measure one after another, so that a lesson depends on no other one."""
        started, used = time.monotonic(), time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            errors = self._train([s for s in students if is_trained(s.method)], Path(folder))
            seconds = (time.monotonic() - started) / len(students)
            lessons = [self._measured(s, Path(folder), seconds, errors.get(s.name, "")) for s in students]
        cpu = (time.process_time() - used) / len(students)
        return [replace(lesson, cpu_seconds=cpu) for lesson in lessons]

    def _train(self, students: Sequence[Student], folder: Path) -> dict[str, str]:
        """Train into ``folder``; return the errors of adapters that could not be trained, such as divergence."""
        from ...training import TrainConfig, train_subjects

        if not students:
            return {}
        for slug in {student.subject for student in students}:
            write_subject(slug, folder / "subjects" / slug)
        config = TrainConfig(
            subjects=str(write_atomic(folder / "subjects.yaml", _listing(students, folder))),
            pretrained_model_name_or_path=str(self.weights / "pipeline"), output_dir=str(folder / "runs"),
            use_captions=True, mixed_precision=self.precision,
        )  # fmt: skip
        try:
            # On CPUs the backward pass of fused attention is several times slower in bf16, at this size.
            with sdpa_kernel(SDPBackend.MATH):
                train_subjects(config)
        except UserError as error:
            failed = [s for s in students if not (folder / "runs" / s.name / FILE_NAME).is_file()]
            if len(failed) == len(students):
                raise
            return {student.name: str(error) for student in failed}
        return {}

    def _measured(self, student: Student, folder: Path, seconds: float, error: str) -> Lesson:
        if error:
            log.warning("%s could not be trained, and counts as failed: %s", student.name, error)
            return Lesson(student.subject, student.method, seconds, [], error=error)
        trained = size = 0
        if is_trained(student.method):
            info = load_adapter(self.pipe, folder / "runs" / student.name, ADAPTER).info
            trained, size = info.trained_parameters, info.bytes
        try:
            scenes = new_scenes(student.subject)
            first = len(scenes) * int(student.settings.get("seed", 0))
            seeds, prompts = range(first, first + len(scenes)), [scene.caption for scene in scenes]
            images = sample(self.pipe, prompts, seeds, Sampling.for_base(None), self.dtype)
            loss = self.heldout_loss(student.subject)
        finally:
            if is_trained(student.method):
                delete_adapter(self.pipe, ADAPTER)
        scores = _scores(self.judge, self.probes, student.subject, images)
        lesson = Lesson(student.subject, student.method, seconds, images)
        return replace(lesson, **scores, heldout_loss=loss, trained_parameters=trained, bytes=size)  # type: ignore[arg-type]

    def heldout_loss(self, slug: str) -> float:
        """The mean denoising loss on the subject's scoring images, with their captions, for the active adapter."""
        if slug not in self._held_out:
            with tempfile.TemporaryDirectory() as folder:
                write_subject(slug, Path(folder))
                photos = read_images(Path(folder) / SCORING_FOLDER)
                shape = (photos[0].size[0], photos[0].size[1])
                encoded = encode_photos(self.pipe, photos, Transform([shape]))
            captions = [scene.caption for scene in scoring_scenes(slug)]
            with torch.no_grad():
                self._held_out[slug] = encoded, encode_prompts(self.pipe, captions)
        photos_, embeddings = self._held_out[slug]
        return float(heldout_losses(self.pipe, self.objective, photos_, embeddings, self.dtype).mean())


def _listing(students: Sequence[Student], folder: Path) -> str:
    """The list of subjects for the trainer: an entry for each adapter."""
    entries = [
        {
            "name": student.name, "instance_data_dir": str(folder / "subjects" / student.subject),
            "instance_prompt": instance_prompt(student.subject),
            "class_word": subject_object(student.subject).class_word,
            **method_settings(student.method), "seed": 0, **student.settings,
        }
        for student in students
    ]  # fmt: skip
    return json.dumps(entries, indent=1)  # which is YAML


def _scores(judge: Judge, probes: Probes, slug: str, images: list[Image.Image]) -> dict[str, float]:
    """Shares and scores of the images of a subject's new scenes."""
    scenes = new_scenes(slug)
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
    room = Classroom(weights, probes)
    lessons = [
        lesson
        for method in TAUGHT_METHODS
        for slug in TAUGHT_SUBJECTS
        for lesson in room.teach([Student("one", slug, method)])  # alone, so that its seconds are its own
    ]
    report = {f"probe_taught_{name}_accuracy": share for name, share in probes.accuracy.items()}
    for method in TAUGHT_METHODS:
        own = [lesson for lesson in lessons if lesson.method == method]
        report[f"{method}_subject_right"] = float(np.mean([lesson.subject_right for lesson in own]))
        report[f"{method}_background_right"] = float(np.mean([lesson.background_right for lesson in own]))
        report[f"{method}_seconds_at_most"] = max(lesson.seconds for lesson in own)
    return report, lessons
