"""Validation during a run: the held-out loss, scores of generated images, and which steps to save.

Scores depend only on the adapter and the settings: seeds are fixed, the random state of the training is restored
afterwards, and scores are saved on disk, so that a resumed run makes the same choice.
"""

from __future__ import annotations

import json
import logging
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...data import Pixels, SourceImage
from ...data.captions import fill, has_word, with_article, without_trigger
from ...data.similarity import find_copies
from ...errors import UserError
from ...formats.adapter_file import inspect_adapter
from ...generation.image_settings import save_image
from ...io.files import write_atomic
from ...io.run_layout import CANDIDATES, MEASURED, VALIDATION, checkpoint_steps, image_name
from ...io.untrusted import conform, parse_json
from ...loaders import load_adapter, save_adapter
from ...pipelines.base import is_embedded
from ...pipelines.components import components, without_adapters
from ...scoring.default_judge import check_judge
from ...scoring.judges import Judge, image_features, judge_hashes, load_judges, text_features
from ...scoring.metrics import agreement, diversity, likeness
from ..data.subject import Subject, captions_of, read_folder
from ..settings.config import TrainConfig, tagged
from ..settings.resolved import ResolvedConfig
from ..step.randomness import forked
from ..step.seeds import derive
from .samples import generate_images, sample_settings
from .selection import LOSS, NAMES, Point, choose, front, stalled

log = logging.getLogger(__name__)

TEMPLATES = ("{}", "{} in the snow", "{} on the beach", "{} on a wooden table")
CLASS_SEEDS = 2
MAX_SCORE = 1000.0


def is_measured(config: TrainConfig) -> bool:
    """Whether any setting turns validation on."""
    return any(getattr(config, name) is not None for name in tagged("measures"))


@dataclass
class Measure:
    """Inputs of a validation: judge models (:func:`load_judges`), real images of the subject, prompts and seeds.

    Without judges no images are generated: the held-out loss is the only score.
    """

    judges: dict[str, Judge]
    real: Sequence[Image.Image]
    prompts: Sequence[str]
    class_prompts: Sequence[str]
    seeds: Sequence[int]
    settings: dict[str, Any]
    leaks: Sequence[str] = ()
    """Names of held-out photos that are also training photos, possibly in another size or format."""
    prompt_subjects: Sequence[int] = ()
    real_subjects: Sequence[int] = ()
    """Index of the subject in each prompt and each real image, if one adapter learns several subjects."""
    photos: Sequence[SourceImage] = ()
    """The held-out photos."""
    captions: Sequence[str] = ()
    """Their captions."""

    @cached_property
    def judge_hashes(self) -> dict[str, str]:
        """See :func:`.scoring.judges.judge_hashes`."""
        return judge_hashes(self.judges)


def plan_measure(config: ResolvedConfig, subject: Subject, device: torch.device) -> Measure | None:
    """Load the judges and build the prompts; ``None`` if validation is off. Raises :class:`UserError`."""
    if not is_measured(config):
        return None
    held_out, captions = _held_out(config, subject)
    is_judged = judges_images(config)
    if not is_judged and not any(held_out):
        raise UserError(
            "validation needs held-out photos, --validation_split 2 or --validation_data_dir, or a judge of generated "
            "images, for example --judge openai/clip-vit-base-patch32"
        )
    if is_judged:
        check_judge(config.judge, config.pretrained_model_name_or_path)
    prompt_pairs = [prompts_of(config, member) for member in subject.members_or_self] if is_judged else []
    prompts, class_prompts = ([text for pair in prompt_pairs for text in pair[side]] for side in (0, 1))
    judges = load_judges(config.judge, config.dino, device) if is_judged else {}
    references = [photos or member.images for photos, member in zip(held_out, subject.members_or_self, strict=True)]
    real = [photo for photos in references for photo in photos]
    are_held_out = any(held_out)
    settings = {
        "judge": (config.judge or "tiny") if is_judged else None, "dino": config.dino,
        "prompts": prompts, "class prompts": class_prompts, "captions": captions,
        "real": "held-out photos" if are_held_out else "training photos",
        "photos": sorted(photo.sha256 for photo in real),
        "images": config.num_validation_images, "steps": config.sample_steps, "guidance": config.sample_guidance,
    }  # fmt: skip
    return Measure(
        judges,
        Pixels(real),
        prompts,
        class_prompts,
        seeds=[derive(config.seed, "validation", number) % 2**31 for number in range(config.num_validation_images)],
        settings=settings,
        leaks=_leaks(subject.images, [photo for photos in held_out for photo in photos]),
        prompt_subjects=[number for number, (texts, _) in enumerate(prompt_pairs) for _ in texts],
        real_subjects=[number for number, photos in enumerate(references) for _ in photos],
        photos=[photo for photos in held_out for photo in photos],
        captions=captions,
    )


def judges_images(config: TrainConfig) -> bool:
    """Whether validation generates images: if a setting asks for it, and on the embedded base, which has a judge."""
    asked = config.judge, config.dino, config.validation_prompts
    return any(value is not None for value in asked) or is_embedded(config.pretrained_model_name_or_path)


def _held_out(config: TrainConfig, subject: Subject) -> tuple[list[list[SourceImage]], list[str]]:
    """The held-out photos of each subject, and the captions of all of them."""
    if not config.validation_data_dir:
        return [list(member.held_out) for member in subject.members_or_self], list(subject.held_out_captions)
    photos = read_folder(config, Path(config.validation_data_dir).expanduser())[0]
    captions = captions_of(config, photos, subject.subject_prompt, subject.trigger, subject.class_word)
    return [photos], captions


def _leaks(training: Sequence[SourceImage], held_out: Sequence[SourceImage]) -> list[str]:
    return list(dict.fromkeys(pair.second.path.name for pair in find_copies(training, held_out)))


def prompts_of(config: TrainConfig, subject: Subject) -> tuple[list[str], list[str]]:
    """Prompts with the subject, and the same prompts with its class word only. Raises :class:`UserError`."""
    if not subject.class_word:
        raise UserError("validation needs the class of the subject: set --class_word, for example dog")
    phrase = with_article(f"{subject.trigger or ''} {subject.class_word}".strip())
    templates = config.validation_prompts or TEMPLATES
    for text in templates:
        if not ("{}" in text or "{noun}" in text or (subject.trigger and has_word(text, subject.trigger))):
            raise UserError(
                f"the subject is missing in {text!r} of --validation_prompts: put {{}} in its place, as in "
                "'{} in the snow'"
            )
    class_prompts = [
        without_trigger(fill(text, with_article(subject.class_word)), subject.trigger) for text in templates
    ]
    return [fill(text, phrase) for text in templates], class_prompts


def _point(values: Any) -> Point:
    """A point of ``validation.json``. Raises ``ValueError``, ``KeyError`` or ``TypeError`` if it is damaged."""
    scores = conform(values["scores"], dict[str, float], "scores", MAX_SCORE)
    if not scores.keys() & {"clip_i", LOSS} or scores.keys() - NAMES.keys():
        raise ValueError("unknown scores")
    return Point(conform(values["step"], int, "step", 2**63), scores)


@dataclass
class Validation:
    """Measures a run; stores its points in ``validation.json`` and the candidate adapters in ``candidates/``."""

    measure: Measure
    config: ResolvedConfig
    pipe: Any
    dtype: torch.dtype
    heldout_loss: Callable[[], float] | None = None
    """Measures the held-out loss of the active adapter; ``None`` without held-out photos."""
    points: list[Point] = field(default_factory=list)
    _real: dict[str, torch.Tensor] = field(default_factory=dict)
    _base: torch.Tensor | None = None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.config.folder

    def restore(self, step: int) -> None:
        """Read the points up to ``step`` of an earlier start, if they were measured with the same settings."""
        try:
            stored = parse_json((self.folder / MEASURED).read_bytes())
            same = stored["settings"] == json.loads(json.dumps(self.measure.settings))
            points = [_point(values) for values in stored["points"]]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged (%r): its points are ignored", self.folder / MEASURED, error)
            return
        if not same:
            log.warning("the settings of the validation have changed: its earlier points are ignored")
            return
        self.points = [point for point in points if point.step <= step]

    def measure_step(self, step: int, adapter_name: str, info: dict[str, Any]) -> Point | None:
        """Measure the current adapter and save it if it is a candidate; ``None`` after a failure, which is logged."""
        if any(point.step == step for point in self.points):
            self._prune()  # the run may have been killed after it had measured this step
            return None
        try:
            with forked(self.pipe.device):
                point = Point(step, self._scores(step))
                if step > 0:
                    save_adapter(self.pipe, self.candidate(step), adapter_name, info={**info, "step": step})
        except Exception as error:  # a failed judge or sampler must not end the training
            log.warning("validation failed at step %d: %s", step, error)
            return None
        self.points.append(point)
        self._write()
        self._prune()
        return point

    def _scores(self, step: int) -> dict[str, float]:
        scores = {} if self.heldout_loss is None else {LOSS: self.heldout_loss()}
        if self.measure.judges:
            scores |= self._scores_of_images(step)
        return {name: round(value, 6) for name, value in scores.items()}

    def _scores_of_images(self, step: int) -> dict[str, float]:
        measure = self.measure
        if self._base is None:
            with without_adapters(components(self.pipe)):
                self._base = self._features(self._class_images())
        groups = [self._generate(prompt, measure.seeds) for prompt in measure.prompts]
        self._save_images(step, groups)
        images = [image for group in groups for image in group]
        features = {name: image_features(judge, images) for name, judge in measure.judges.items()}
        if not self._real:
            self._real = {name: image_features(judge, measure.real) for name, judge in measure.judges.items()}
        scores = {name: self._likeness(name, values) for name, values in features.items()}
        texts = text_features(measure.judges["clip_i"], [text for text in measure.class_prompts for _ in measure.seeds])
        scores["clip_t"] = statistics.fmean(agreement(features["clip_i"], texts))
        now = self._features(self._class_images())
        scores["drift"] = 1 - statistics.fmean(agreement(now, self._base))
        if len(measure.seeds) > 1:
            by_prompt = [*features.values()][-1].split(len(measure.seeds))
            scores["diversity"] = statistics.fmean(map(diversity, by_prompt))
        return scores

    def _likeness(self, name: str, features: torch.Tensor) -> float:
        """The mean likeness of the generated images to the real images of the same subject."""
        measure = self.measure
        generated_subjects = torch.tensor(
            [n for n in measure.prompt_subjects or [0] * len(measure.prompts) for _ in measure.seeds]
        )
        real_subjects = torch.tensor(measure.real_subjects or [0] * len(measure.real))
        real = self._real[name]
        return statistics.fmean(
            value
            for n in generated_subjects.unique().tolist()
            for value in likeness(features[generated_subjects == n], real[real_subjects == n])
        )

    def _features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return image_features([*self.measure.judges.values()][-1], images)

    def _class_images(self) -> list[Image.Image]:
        seeds = self.measure.seeds[:CLASS_SEEDS]
        return [image for prompt in self.measure.class_prompts for image in self._generate(prompt, seeds)]

    def _generate(self, prompt: str, seeds: Sequence[int]) -> list[Image.Image]:
        return generate_images(self.pipe, prompt, seeds, self.config, self.dtype)

    def _save_images(self, step: int, groups: Sequence[Sequence[Image.Image]]) -> None:
        """Save the images of the first seed for the report."""
        for number, (prompt, group) in enumerate(zip(self.measure.prompts, groups, strict=True)):
            settings = sample_settings(self.pipe, prompt, self.measure.seeds[0], group[0], self.config, step)
            save_image(group[0], self.folder / VALIDATION / image_name(step, number), settings)

    def candidate(self, step: int) -> Path:
        """The folder of a step's adapter."""
        return self.folder / CANDIDATES / f"step-{step}"

    @property
    def chosen(self) -> int | None:
        """The step that :func:`choose` picks from the points so far."""
        return choose(self.points)

    @property
    def should_stop(self) -> bool:
        """Whether early stopping is on and has run out of patience."""
        return stalled(self.points, self.config.early_stopping)

    def _write(self) -> None:
        document = {
            "settings": self.measure.settings,
            "judges": self.measure.judge_hashes,
            "points": [{"step": point.step, "scores": dict(point.scores)} for point in self.points],
            "front": front(self.points),
            "chosen": self.chosen,
        }
        write_atomic(self.folder / MEASURED, json.dumps(document, indent=1))

    def _prune(self) -> None:
        """Delete all candidates except those on the Pareto front and the newest one."""
        kept = {self.candidate(step) for step in (*front(self.points), self.points[-1].step)}
        for path in checkpoint_steps(self.folder / CANDIDATES).values():
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def load_chosen(self, adapter_name: str, last: int) -> int:
        """Load the adapter of the chosen step into the pipeline; return its step, or ``last`` if nothing was loaded."""
        chosen = self.chosen
        if chosen is None or chosen == last:
            return last
        try:
            candidate = self.candidate(chosen)
            if (step := inspect_adapter(candidate, hashed=False).step) != chosen:
                raise UserError(f"{candidate} holds the adapter of step {step}")
            load_adapter(self.pipe, candidate, adapter_name, hotswap=True)
        except UserError as error:
            log.warning("the adapter of the chosen step %d cannot be read, so the last step is kept: %s", chosen, error)
            return last
        return chosen
