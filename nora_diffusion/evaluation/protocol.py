"""The DreamBooth protocol: adapters x subjects x prompts x seeds, scored by DINO, CLIP-I, CLIP-T and diversity.

Subjects with held-out images also give each adapter's held-out loss.

Every image is a cell of a grid (:mod:`.grid`), in a file named by the hash of its settings. So a stopped evaluation
resumes, and one with more seeds or adapters generates only the new images. See Ruiz et al., arXiv 2208.12242, section
4.2.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..data.captions import fill
from ..errors import UserError
from ..formats.adapter_file import inspect_adapter
from ..formats.adapter_info import AdapterInfo
from ..generation.settings import Sampling, check_range
from ..io.images import load_image
from ..io.tensors import named_hash
from ..pipelines.base import BaseSource, base_id
from ..pipelines.precision import dtype_name
from ..scoring.judges import Judge, check_judge, image_features, load_judges, text_features
from ..scoring.metrics import agreement, diversity, likeness
from .axes import Cell, axis
from .contenders import BASE, Contender, parse_contender
from .grid import Grid, GridConfig, base_description
from .heldout import HeldOut
from .prompts import KINDS
from .scoreboard import Scoreboard, Scored
from .subjects import EvaluatedSubject, read_subject


@dataclass
class EvaluationConfig:
    """The settings of ``nora-diffusion evaluate``.

    ``adapters``: ``[LABEL=]PATH[:WEIGHT]``; ``{subject}`` is replaced by the subject's name. The base alone is always
    evaluated too. ``subjects``: folders of real images. The judges compute in fp32, whatever the dtype of ``source``.
    """

    adapters: list[str]
    subjects: list[str]
    sampling: Sampling
    source: BaseSource = field(default_factory=BaseSource)
    prompts: str | None = None
    seeds: int = 4
    judge: str | None = None
    dino: str | None = None
    out: str = "outputs/evaluation"

    def settings(self) -> dict[str, Any]:
        """All settings in one flat dict, as in ``evaluation.json``."""
        values = asdict(self)
        return values.pop("source") | values.pop("sampling") | values


def evaluate(config: EvaluationConfig) -> Scoreboard:
    """Generate the missing images and score all of them.

    Raises :class:`UserError`, before any image is generated if settings or files are invalid.
    """
    from tqdm.auto import tqdm

    contenders, subjects = check(config)
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
                    losses = held_out.losses(contender.adapter(subject.name), contender.weight)
                    board.heldout.setdefault(contender.label, {})[subject.name] = losses
    return board


def hashes(pipe: Any, judges: dict[str, Judge]) -> dict[str, str]:
    """The identity of the base (``base``) and of each judge, for results files."""
    marks = [f"{value:.4g}" for value in base_description(pipe)["fingerprint"]]  # the last digits depend on the machine
    found = {name: named_hash(judge.model.state_dict()) for name, judge in judges.items()}
    return found | {"base": hashlib.sha256(" ".join(marks).encode()).hexdigest()}


def check(config: EvaluationConfig) -> tuple[list[Contender], list[EvaluatedSubject]]:
    """The rows, and the subjects with their phrases. Raises :class:`UserError` for the first invalid setting."""
    if not config.subjects:
        raise UserError("there is no subject: give --subjects examples/subjects/tiger, or a folder of photos")
    check_range("seeds", config.seeds, 1, 100)
    check_judge(config.judge, config.source.base)
    contenders = [Contender(BASE, None), *map(parse_contender, config.adapters)]
    subjects = [read_subject(Path(name).expanduser(), config.prompts) for name in config.subjects]
    for what, names in (("adapters", [c.label for c in contenders]), ("subjects", [s.name for s in subjects])):
        if len(set(names)) < len(names):
            remedy = "write label=path" if what == "adapters" else "rename a folder"
            raise UserError(f"two {what} are named {max(names, key=names.count)!r}: {remedy}")
    named = []
    for subject in subjects:
        phrase, class_phrase = subject.phrases(_inspect(contenders, subject))
        named.append(replace(subject, phrase=phrase, class_phrase=class_phrase))
    return contenders, named


def _inspect(contenders: Sequence[Contender], subject: EvaluatedSubject) -> list[AdapterInfo]:
    return [inspect_adapter(path) for c in contenders if (path := c.adapter(subject.name)) is not None]


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
