"""Measuring a run on the way: likeness, prompts kept, drift of the class, diversity; and the steps worth keeping.

Measuring is a function of the adapter and the settings alone: seeds are fixed, the random state of the training is put
back, and what was measured is on disk, so that a resumed run makes the same choice.
"""

from __future__ import annotations

import json
import logging
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...data import SourceImage, read_images
from ...data.captions import fill, has_word, with_article, without_trigger
from ...data.similarity import find_duplicates
from ...errors import UserError
from ...generation.image_settings import save_image
from ...io.files import write_atomic
from ...io.run_layout import CANDIDATES, MEASURED, VALIDATION, checkpoint_steps, image_name
from ...loaders import load_adapter, save_adapter
from ...pipelines.components import without_adapters
from ...scoring.judges import Judge, check_judge, image_features, load_judges, text_features
from ...scoring.metrics import agreement, diversity, likeness
from ..data.subject import Subject
from ..settings.config import TrainConfig, tagged
from ..settings.resolved import ResolvedConfig
from ..step.randomness import derive, forked
from .samples import generate_images, sample_settings
from .selection import Point, choose, front, stalled

log = logging.getLogger(__name__)

TEMPLATES = ("{}", "{} in the snow", "{} on the beach", "{} on a wooden table")
CLASS_SEEDS = 2


def is_measured(config: TrainConfig) -> bool:
    """Whether any setting asks for measuring."""
    return any(getattr(config, name) is not None for name in tagged("measures"))


@dataclass
class Measure:
    """What is measured and by whom: judges (:func:`load_judges`), real pictures and prompts."""

    judges: dict[str, Judge]
    real: Sequence[Image.Image]
    prompts: Sequence[str]
    class_prompts: Sequence[str]
    seeds: Sequence[int]
    settings: dict[str, Any]
    leaks: Sequence[str] = ()
    """Held-out photos that are learned from as well, if only in another size or format."""
    who: Sequence[int] = ()
    whose: Sequence[int] = ()
    """Which subject each prompt asks for, and each real picture shows, where one adapter learns several."""


def plan_measure(config: ResolvedConfig, subject: Subject, device: torch.device) -> Measure | None:
    """Load the judges and build the prompts; ``None`` if no setting asks for it. Raises :class:`UserError`."""
    if not is_measured(config):
        return None
    check_judge(config.judge, config.pretrained_model_name_or_path)
    asked = [prompts_of(config, member) for member in subject.members_or_self]
    prompts, class_prompts = ([text for own in asked for text in own[side]] for side in (0, 1))
    judges = load_judges(config.judge, config.dino, device)
    if config.validation_data_dir:
        held_out = [read_images(Path(config.validation_data_dir).expanduser())]
    else:
        held_out = [list(member.held_out) for member in subject.members_or_self]
    references = [own or member.images for own, member in zip(held_out, subject.members_or_self, strict=True)]
    real = [photo for own in references for photo in own]
    are_held_out = any(held_out)
    settings = {
        "judge": config.judge or "tiny", "dino": config.dino, "prompts": prompts, "class prompts": class_prompts,
        "real": "held-out photos" if are_held_out else "training photos",
        "photos": sorted(photo.sha256 for photo in real),
        "images": config.num_validation_images, "steps": config.sample_steps, "guidance": config.sample_guidance,
    }  # fmt: skip
    return Measure(
        judges,
        [photo.image for photo in real],
        prompts,
        class_prompts,
        seeds=[derive(config.seed, "validation", number) % 2**31 for number in range(config.num_validation_images)],
        settings=settings,
        leaks=_leaks(subject.images, [photo for own in held_out for photo in own]),
        who=[number for number, (texts, _) in enumerate(asked) for _ in texts],
        whose=[number for number, own in enumerate(references) for _ in own],
    )


def _leaks(learned: Sequence[SourceImage], held_out: Sequence[SourceImage]) -> list[str]:
    ours = set(map(id, learned))
    pairs = [
        pair
        for pair in find_duplicates([*learned, *held_out])
        if id(pair.first) in ours and id(pair.second) not in ours
    ]
    return list(dict.fromkeys(pair.second.path.name for pair in pairs))


def prompts_of(config: TrainConfig, subject: Subject) -> tuple[list[str], list[str]]:
    """Prompts with the subject in them, and the same with anybody of its class. Raises :class:`UserError`."""
    if not subject.class_word:
        raise UserError("measuring needs the class of the subject: give --class_word, for example dog")
    phrase = with_article(f"{subject.trigger or ''} {subject.class_word}".strip())
    templates = config.validation_prompts or TEMPLATES
    for text in templates:
        if not ("{}" in text or "{noun}" in text or (subject.trigger and has_word(text, subject.trigger))):
            raise UserError(
                f"the subject is not in {text!r} of --validation_prompts: put {{}} where it goes, as in "
                "'{} in the snow'"
            )
    plain = [without_trigger(fill(text, with_article(subject.class_word)), subject.trigger) for text in templates]
    return [fill(text, phrase) for text in templates], plain


@dataclass
class Validation:
    """The points measured so far, in ``validation.json``, and the adapters worth keeping, in ``candidates/``."""

    measure: Measure
    config: ResolvedConfig
    pipe: Any
    dtype: torch.dtype
    points: list[Point] = field(default_factory=list)
    _real: dict[str, torch.Tensor] = field(default_factory=dict)
    _base: torch.Tensor | None = None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.config.folder

    def restore(self, step: int) -> None:
        """Take up what was measured until ``step``, if it was measured in the same way."""
        try:
            stored = json.loads((self.folder / MEASURED).read_text(encoding="utf-8"))
            same = stored["settings"] == json.loads(json.dumps(self.measure.settings))
            points = [Point(int(p["step"]), dict(p["scores"])) for p in stored["points"]]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged (%r): what it measured is left out", self.folder / MEASURED, error)
            return
        if not same:
            log.warning("validation is measured otherwise than before: its earlier points are left out")
            return
        self.points = [point for point in points if point.step <= step]

    def at(self, step: int, adapter_name: str, info: dict[str, Any]) -> Point | None:
        """Measure, keep the adapter if it is worth it; ``None`` if that fails, which is only a warning."""
        if any(point.step == step for point in self.points):
            return None
        try:
            with forked(self.pipe.device):
                point = Point(step, self._scores(step))
                if step > 0:
                    save_adapter(self.pipe, self.candidate(step), adapter_name, info={**info, "step": step})
        except Exception as error:  # no part of the training, whatever a judge or a sampler stumbles over
            log.warning("nothing measured at step %d: %s", step, error)
            return None
        self.points.append(point)
        self._write()
        self._prune()
        return point

    def _scores(self, step: int) -> dict[str, float]:
        measure = self.measure
        if self._base is None:
            with without_adapters(self.pipe):
                self._base = self._look(self._class_pictures())
        pictures = [self._render(prompt, measure.seeds) for prompt in measure.prompts]
        self._keep(step, pictures)
        flat = [image for group in pictures for image in group]
        features = {name: image_features(judge, flat) for name, judge in measure.judges.items()}
        if not self._real:
            self._real = {name: image_features(judge, measure.real) for name, judge in measure.judges.items()}
        scores = {name: self._likeness(name, seen) for name, seen in features.items()}
        asked = text_features(measure.judges["clip_i"], [text for text in measure.class_prompts for _ in measure.seeds])
        scores["clip_t"] = statistics.fmean(agreement(features["clip_i"], asked))
        now = self._look(self._class_pictures())
        scores["drift"] = 1 - statistics.fmean(agreement(now, self._base))
        if len(measure.seeds) > 1:
            groups = [*features.values()][-1].split(len(measure.seeds))
            scores["diversity"] = statistics.fmean(map(diversity, groups))
        return {name: round(value, 6) for name, value in scores.items()}

    def _likeness(self, name: str, seen: torch.Tensor) -> float:
        """The mean over the pictures of their likeness to the photos of the subject that each was asked for."""
        measure = self.measure
        who = torch.tensor([n for n in measure.who or [0] * len(measure.prompts) for _ in measure.seeds])
        whose = torch.tensor(measure.whose or [0] * len(measure.real))
        real = self._real[name]
        return statistics.fmean(
            value for n in who.unique().tolist() for value in likeness(seen[who == n], real[whose == n])
        )

    def _look(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        return image_features([*self.measure.judges.values()][-1], pictures)

    def _class_pictures(self) -> list[Image.Image]:
        seeds = self.measure.seeds[:CLASS_SEEDS]
        return [image for prompt in self.measure.class_prompts for image in self._render(prompt, seeds)]

    def _render(self, prompt: str, seeds: Sequence[int]) -> list[Image.Image]:
        return generate_images(self.pipe, prompt, seeds, self.config, self.dtype)

    def _keep(self, step: int, pictures: Sequence[Sequence[Image.Image]]) -> None:
        """Keep the first seed's pictures, for the report."""
        for number, (prompt, group) in enumerate(zip(self.measure.prompts, pictures, strict=True)):
            settings = sample_settings(self.pipe, prompt, self.measure.seeds[0], group[0], self.config, step)
            save_image(group[0], self.folder / VALIDATION / image_name(step, number), settings)

    def candidate(self, step: int) -> Path:
        """Where the adapter of a step is kept."""
        return self.folder / CANDIDATES / f"step-{step}"

    @property
    def chosen(self) -> int | None:
        """The step that the rule picks among those measured."""
        return choose(self.points)

    @property
    def enough(self) -> bool:
        """Whether it is time to stop early."""
        return stalled(self.points, self.config.early_stopping)

    def _write(self) -> None:
        document = {
            "settings": self.measure.settings,
            "points": [{"step": point.step, "scores": dict(point.scores)} for point in self.points],
            "front": front(self.points),
            "chosen": self.chosen,
        }
        write_atomic(self.folder / MEASURED, json.dumps(document, indent=1))

    def _prune(self) -> None:
        """Keep the adapters on the Pareto front and the newest one."""
        kept = {self.candidate(step) for step in (*front(self.points), self.points[-1].step)}
        for place in checkpoint_steps(self.folder / CANDIDATES).values():
            if place not in kept:
                shutil.rmtree(place, ignore_errors=True)

    def put_chosen(self, adapter_name: str, last: int) -> int:
        """Load the chosen step's adapter into the pipeline; returns its step, or ``last`` if that one stays."""
        chosen = self.chosen
        if chosen is None or chosen == last:
            return last
        try:
            load_adapter(self.pipe, self.candidate(chosen), adapter_name, hotswap=True)
        except UserError as error:
            log.warning("the chosen step %d cannot be read, so the last step is kept: %s", chosen, error)
            return last
        return chosen
