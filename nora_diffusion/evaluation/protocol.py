"""The DreamBooth protocol: adapters x subjects x prompts x seeds, scored by DINO, CLIP-I, CLIP-T and diversity.

Every picture is a cell of a grid (:mod:`.grid`), named by all that it depends on: an evaluation goes on where it was
stopped, and one with more seeds or adapters makes only what is new. (Ruiz et al., arXiv 2208.12242, section 4.2.)
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..data.captions import fill
from ..errors import UserError
from ..formats.adapter_file import AdapterInfo, inspect_adapter
from ..generation.generate import parse_adapter
from ..io.images import load_image
from ..pipelines.base import base_id, best_device, check_device, default_steps, open_pipeline
from ..pipelines.precision import AUTO, dtype_name, resolve_dtype
from ..scoring.judges import Judge, check_judge, image_features, load_judges, text_features
from ..scoring.metrics import agreement, diversity, likeness
from .axes import NONE, Cell, axis
from .grid import Grid, GridConfig
from .scoreboard import BASE, Scoreboard, Scored
from .subjects import EvaluatedSubject, read_subject


@dataclass
class EvaluationConfig:
    """What ``nora-diffusion evaluate`` does.

    ``adapters`` are ``[LABEL=]PATH[:WEIGHT]``, ``{subject}`` in them stands for the subject's name; the base alone
    always takes part. ``subjects`` are folders of real pictures. ``dtype``, ``variant`` and ``revision`` are as
    :func:`open_pipeline` has them; the judges compute in fp32 whatever it is.
    """

    adapters: list[str]
    subjects: list[str]
    base: str | None = None
    prompts: str | None = None
    seeds: int = 4
    judge: str | None = None
    dino: str | None = None
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    device: str | None = None
    out: str = "outputs/evaluation"
    dtype: str = AUTO
    variant: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Contender:
    """A row of the table: its label, its adapter (``None``: the base alone) and weight."""

    label: str
    path: str | None
    weight: float = 1.0

    def adapter(self, subject: str) -> str | None:
        """The path of a subject's adapter."""
        return None if self.path is None else self.path.replace("{subject}", subject)


def parse_contender(text: str) -> Contender:
    """``label=path:weight``; the label is the path's name, where none is given."""
    label, mark, rest = text.partition("=")
    path, weight = parse_adapter(rest if mark else text)
    if path in NONE:
        raise UserError("the base alone takes part anyway: name adapters only")
    label = label if mark else Path(path).name.replace("{subject}", "").strip("-_. ") or Path(path).parent.name
    if not label.strip() or label == BASE:
        raise UserError(f"{text!r} needs another label: write for example nora={path}")
    return Contender(label.strip(), path, weight)


def evaluate(config: EvaluationConfig) -> Scoreboard:
    """Make the pictures that are missing and score all.

    Raises :class:`UserError`; for what can be seen from settings and files, before anything is made.
    """
    from tqdm.auto import tqdm

    contenders, subjects = check(config)
    device = config.device or best_device()
    check_device(device)
    dtype = resolve_dtype(config.dtype, device)
    judges = load_judges(config.judge, config.dino, device)
    pipe = open_pipeline(config.base, dtype, device, config.revision, config.variant)
    steps = config.steps or default_steps(config.base)
    found = {"base": base_id(pipe), "judge": config.judge or "tiny", "steps": steps, "dtype": dtype_name(dtype)}
    board = Scoreboard(asdict(config) | found, [c.label for c in contenders], Path(config.out).expanduser())
    total = sum(len(s.templates) for s in subjects) * len(contenders) * config.seeds
    with tqdm(total=total, desc="pictures", mininterval=0.5) as bar:
        for subject in subjects:
            scorer = Scorer(subject, judges)
            board.real[subject.name] = scorer.real()
            for contender in contenders:
                bar.set_postfix_str(f"{subject.name}, {contender.label}")
                grid = Grid(_grid(config, contender, subject), pipe)
                start = bar.n
                for done, _ in grid.make():
                    bar.update(start + done - bar.n)
                board.scored += scorer.score(contender.label, grid)
    return board


def check(config: EvaluationConfig) -> tuple[list[Contender], list[EvaluatedSubject]]:
    """The rows and the subjects, with their words settled. Raises :class:`UserError` for the first mistake."""
    _check(config)
    contenders = [Contender(BASE, None), *map(parse_contender, config.adapters)]
    subjects = [read_subject(Path(name).expanduser(), config.prompts) for name in config.subjects]
    for what, names in (("adapters", [c.label for c in contenders]), ("subjects", [s.name for s in subjects])):
        if len(set(names)) < len(names):
            way = "write label=path" if what == "adapters" else "rename a folder"
            raise UserError(f"two {what} are called {max(names, key=names.count)!r}: {way}")
    settled = []
    for subject in subjects:
        phrase, plain = subject.phrases(_inspect(contenders, subject))
        settled.append(replace(subject, phrase=phrase, class_phrase=plain))
    return contenders, settled


def _check(config: EvaluationConfig) -> None:
    if not config.subjects:
        raise UserError("there is no subject: give --subjects examples/subjects/tiger, or a folder of photos")
    if not 1 <= config.seeds <= 100:
        raise UserError(f"seeds={config.seeds} is out of range: choose 1 to 100")
    check_judge(config.judge, config.base)


def _inspect(contenders: Sequence[Contender], subject: EvaluatedSubject) -> list[AdapterInfo]:
    return [inspect_adapter(path) for c in contenders if (path := c.adapter(subject.name)) is not None]


def _grid(config: EvaluationConfig, contender: Contender, subject: EvaluatedSubject) -> GridConfig:
    cell = Cell(
        adapter=contender.adapter(subject.name), weight=contender.weight, steps=config.steps, guidance=config.guidance,
        width=config.width, height=config.height,
    )  # fmt: skip
    prompts = [fill(template, subject.phrase) for template in subject.templates]
    return GridConfig(
        cell, axis("seed", range(config.seeds)), axis("prompt", prompts), base=config.base, out=config.out
    )


class Scorer:
    """Scores the pictures of one subject against its real ones; features of those are computed once."""

    def __init__(self, subject: EvaluatedSubject, judges: dict[str, Judge]) -> None:
        self.subject, self.judges = subject, judges
        self.references = {name: image_features(judge, subject.references) for name, judge in judges.items()}
        self.plain = text_features(judges["clip_i"], [fill(t, subject.class_phrase) for t in subject.templates])

    def real(self) -> dict[str, float]:
        """How alike the real pictures are among themselves: what likeness can reach at best."""
        return {name: 1 - diversity(features) for name, features in self.references.items()}

    def score(self, label: str, grid: Grid) -> list[Scored]:
        """One row a prompt, the mean over its seeds."""
        rows = []
        for number, template in enumerate(self.subject.templates):
            files = [file for (_, y, _), file in grid.files.items() if y == number]
            images = [load_image(file) for file in files]
            features = {name: image_features(judge, images) for name, judge in self.judges.items()}
            scores = {name: statistics.fmean(likeness(features[name], self.references[name])) for name in features}
            scores["clip_t"] = statistics.fmean(agreement(features["clip_i"], self.plain[number : number + 1]))
            if len(files) > 1:
                scores["diversity"] = diversity([*features.values()][-1])
            rows.append(Scored(label, self.subject.name, fill(template, self.subject.phrase), files, scores))
        return rows
