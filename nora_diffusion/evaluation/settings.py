"""The settings of a grid and of an evaluation, and what can be wrong with them and their files. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..formats.adapter_file import inspect_adapter
from ..formats.adapter_info import AdapterInfo
from ..generation.settings import Sampling, check_range
from ..io.run_layout import MANIFEST
from ..pipelines.base import BaseSource
from ..scoring.default_judge import check_judge
from .axes import Axis, Cell
from .contenders import BASE, Contender, parse_contender
from .subjects import EvaluatedSubject, read_subject

MAX_CELLS = 1000
NO_AXIS = Axis("", ("",), ({},))


@dataclass
class GridConfig:
    """A grid: the common settings and up to three axes.

    Cells in the folder ``out`` are reused. ``private`` records the adapters without their folders.
    """

    cell: Cell
    x: Axis
    y: Axis = NO_AXIS
    z: Axis = NO_AXIS
    source: BaseSource = field(default_factory=BaseSource)
    out: str = "outputs/grid"
    private: bool = False

    def cells(self) -> list[tuple[tuple[int, int, int], Cell]]:
        """All ``((x, y, z), cell)``, row by row. Raises :class:`UserError` for an invalid grid."""
        names = [a.name for a in (self.x, self.y, self.z) if a.name]
        if len(names) > len(set(names)):
            raise UserError(f"two axes are named {max(names, key=names.count)!r}: each may appear once")
        used: dict[str, str] = {}
        for a in (self.x, self.y, self.z):
            for key in {key for change in a.changes for key in change}:
                if key in used:
                    raise UserError(f"the axes {used[key]!r} and {a.name!r} both set the {key}: keep one of them")
                used[key] = a.name
        sizes = [len(a.labels) for a in (self.z, self.y, self.x)]
        if sizes[0] * sizes[1] * sizes[2] > MAX_CELLS:
            raise UserError(f"the grid has more than {MAX_CELLS} cells: remove some values")
        cells = [
            ((x, y, z), self.z.apply(self.y.apply(self.x.apply(self.cell, x), y), z))
            for z, y, x in product(*map(range, sizes))
        ]
        for _, cell in cells:
            cell.check()
        return cells

    def adapters(self) -> dict[Path, AdapterInfo]:
        """What the files of all adapters say, by path. Raises :class:`UserError` for an invalid grid or adapter."""
        found: dict[Path, AdapterInfo] = {}
        for _, cell in self.cells():
            if (path := cell.path) is None or path in found:
                continue
            found[path] = inspect_adapter(path)
            if cell.step not in (None, found[path].step) and (path / MANIFEST).is_file():
                raise UserError(f"{path} was renamed: it holds the adapter of step {found[path].step}; rename it back")
        return found


@dataclass
class EvaluationConfig:
    """The settings of ``nora-diffusion evaluate``.

    ``adapters``: ``[LABEL=]PATH[:WEIGHT]``; ``{subject}`` is replaced by the subject's name. The base alone is always
    evaluated too. ``subjects``: folders of real images. The judges compute in fp32, whatever the dtype of ``source``.
    ``weight_noise``: levels of noise at which the held-out loss is measured too (:func:`.heldout.noisy_weights`).
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
    weight_noise: list[float] = field(default_factory=list)

    def settings(self) -> dict[str, Any]:
        """All settings in one flat dict, as in ``evaluation.json``."""
        values = asdict(self)
        return values.pop("source") | values.pop("sampling") | values


def check_evaluation(config: EvaluationConfig) -> tuple[list[Contender], list[EvaluatedSubject]]:
    """The rows, and the subjects with their phrases. Raises :class:`UserError` for the first invalid setting."""
    if not config.subjects:
        raise UserError("there is no subject: give --subjects examples/subjects/tiger, or a folder of photos")
    check_range("seeds", config.seeds, 1, 100)
    check_judge(config.judge, config.source.base)
    contenders = [Contender(BASE, None), *map(parse_contender, config.adapters)]
    subjects = [read_subject(Path(name).expanduser(), config.prompts) for name in config.subjects]
    for level in config.weight_noise:
        if not 0 <= level <= 1:
            raise UserError(
                f"weight_noise={level} must be from 0 to 1: it is relative to the largest weight of a layer"
            )
    if config.weight_noise and not any(subject.held_out for subject in subjects):
        raise UserError("--weight_noise measures the held-out loss: a subject needs 'heldout' in its subject.json")
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
