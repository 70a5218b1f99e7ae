"""The DreamBooth protocol: adapters x subjects x prompts x seeds, scored by DINO, CLIP-I, CLIP-T and diversity.

Subjects with held-out images also give each adapter's held-out loss, if asked for also under noise of the weights.

Every image is a cell of a grid (:mod:`.grid`), in a file named by the hash of its settings. So a stopped evaluation
resumes, and one with more seeds or adapters generates only the new images. See Ruiz et al., arXiv 2208.12242, section
4.2.
"""

from __future__ import annotations

import hashlib
import statistics
from pathlib import Path
from typing import Any

from ..data.captions import fill
from ..io.images import load_image
from ..pipelines.base import base_id
from ..pipelines.precision import dtype_name
from ..scoring.judges import Judge, image_features, judge_hashes, load_judges, text_features
from ..scoring.metrics import agreement, diversity, likeness
from .axes import Cell, axis
from .contenders import Contender
from .grid import Grid, base_description
from .heldout import HeldOut
from .prompts import KINDS
from .scoreboard import Scoreboard, Scored
from .settings import EvaluationConfig, GridConfig, check_evaluation
from .subjects import EvaluatedSubject


def evaluate(config: EvaluationConfig) -> Scoreboard:
    """Generate the missing images and score all of them.

    Raises :class:`UserError`, before any image is generated if settings or files are invalid.
    """
    from tqdm.auto import tqdm

    contenders, subjects = check_evaluation(config)
    device, dtype = config.source.resolve()
    judges = load_judges(config.judge, config.dino, device)
    pipe = config.source.open()
    actual = {"base": base_id(pipe), "judge": config.judge or "tiny", "dtype": dtype_name(dtype)}
    board = Scoreboard(config.settings() | actual, contenders, subjects, Path(config.out).expanduser())
    board.hashes = hashes(pipe, judges)
    total = sum(len(s.templates) for s in subjects) * len(contenders) * config.seeds
    with tqdm(total=total, desc="images", mininterval=0.5) as bar:
        for subject in subjects:
            scorer = Scorer(subject, judges)
            board.real[subject.name] = scorer.real()
            held_out = HeldOut(pipe, subject, dtype) if subject.held_out else None
            for contender in contenders:
                bar.set_postfix_str(f"{subject.name}, {contender.label}")
                grid = Grid(_grid(config, contender, subject), pipe)
                start = bar.n
                for done, _ in grid.make():
                    bar.update(start + done - bar.n)
                board.scored += scorer.score(contender.label, grid)
                if held_out is not None:
                    adapter = contender.adapter(subject.name), contender.weight
                    board.heldout.setdefault(contender.label, {})[subject.name] = held_out.losses(*adapter)
                    for level in config.weight_noise:
                        loss = held_out.loss_under_noise(*adapter, level)
                        board.noisy.setdefault(contender.label, {}).setdefault(f"{level:g}", []).append(loss)
    return board


def hashes(pipe: Any, judges: dict[str, Judge]) -> dict[str, str]:
    """The identity of the base (``base``) and of each judge, for results files."""
    marks = [f"{value:.4g}" for value in base_description(pipe)["fingerprint"]]  # the last digits depend on the machine
    return judge_hashes(judges) | {"base": hashlib.sha256(" ".join(marks).encode()).hexdigest()}


def _grid(config: EvaluationConfig, contender: Contender, subject: EvaluatedSubject) -> GridConfig:
    cell = Cell(config.sampling, adapter=contender.adapter(subject.name), weight=contender.weight)
    prompts = [fill(template, subject.phrase) for template in subject.templates]
    return GridConfig(cell, axis("seed", range(config.seeds)), axis("prompt", prompts), out=config.out)


class Scorer:
    """Scores the images of one subject against its real ones, whose features are computed once."""

    def __init__(self, subject: EvaluatedSubject, judges: dict[str, Judge]) -> None:
        self.subject, self.judges = subject, judges
        self.references = {name: image_features(judge, subject.references) for name, judge in judges.items()}
        self.class_prompts = text_features(judges["clip_i"], [fill(t, subject.class_phrase) for t in subject.templates])

    def real(self) -> dict[str, float]:
        """The mean similarity of the real images to each other: an upper limit for DINO and CLIP-I."""
        return {name: 1 - diversity(features) for name, features in self.references.items()}

    def score(self, label: str, grid: Grid) -> list[Scored]:
        """One row per prompt: the mean scores over its seeds."""
        rows = []
        for number, template in enumerate(self.subject.templates):
            files = [file for (_, y, _), file in grid.files.items() if y == number]
            images = [load_image(file) for file in files]
            features = {name: image_features(judge, images) for name, judge in self.judges.items()}
            scores = {name: statistics.fmean(likeness(features[name], self.references[name])) for name in features}
            scores["clip_t"] = statistics.fmean(agreement(features["clip_i"], self.class_prompts[number : number + 1]))
            if len(files) > 1:
                scores["diversity"] = diversity([*features.values()][-1])
            prompt, kind = fill(template, self.subject.phrase), KINDS.get(template, "")
            rows.append(Scored(label, self.subject.name, prompt, files, scores, kind))
        return rows
