"""The axes of a grid: each is a named list of labeled changes to the settings of one image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import UserError, quoted
from ..formats.adapter_file import FILE_NAME, inspect_adapter
from ..generation.addresses import parse_adapter
from ..generation.samplers import SAMPLERS, sampler_named
from ..generation.settings import MAX_SEED, Sampling, check_prompt, check_range
from ..generation.tags import parse_tags
from ..io.run_layout import CHECKPOINTS, checkpoint_steps

NONE = ("", "none", "None")
INTEGERS = ("seed", "steps", "step")
NUMBERS = (*INTEGERS, "weight", "guidance")
AXES = ("adapter", "weight", "method", "seed", "step", "steps", "guidance", "sampler", "prompt")
MAX_RANGE = 1000
RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class Cell:
    """The settings of one image.

    ``adapter``: a path, or ``None`` for the base alone; ``{method}`` in it is replaced by ``method``. ``step`` selects
    a checkpoint, if ``adapter`` is the folder of a training run.
    """

    sampling: Sampling
    prompt: str = ""
    adapter: str | None = None
    weight: float = 1.0
    method: str | None = None
    step: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises :class:`UserError` for the first invalid setting."""
        if not self.prompt.strip():
            raise UserError("there is no prompt: give --prompt")
        check_prompt(self.prompt)
        check_range("seed", self.seed, 0, MAX_SEED)
        check_range("weight", self.weight, -100, 100)
        self.sampling.check()
        if parse_tags(self.prompt)[1]:
            raise UserError(
                "a grid reads no <lora:...> tags: remove them from the prompt and give --adapter or an axis"
            )
        if self.method is not None and "{method}" not in (self.adapter or ""):
            raise UserError("the axis 'method' needs {method} in the adapter's path: for example out/mug-{method}")
        if self.step is not None and self.adapter is None:
            raise UserError("the axis 'step' needs an adapter: the folder of a training run")

    @property
    def path(self) -> Path | None:
        """The adapter's file or folder, with ``method`` and ``step`` resolved."""
        if self.adapter is None:
            return None
        path = Path(self.adapter.replace("{method}", self.method or "{method}")).expanduser()
        return path if self.step is None else checkpoint(path, self.step)


SAMPLING_FIELDS = {f.name for f in fields(Sampling)}
CELL_FIELDS = {f.name for f in fields(Cell)} - {"sampling"}


def checkpoint(run: Path, step: int) -> Path:
    """The folder of a run's adapter after ``step`` steps. Raises :class:`UserError` that lists the existing steps."""
    folders = {s: path for s, path in checkpoint_steps(run / CHECKPOINTS).items() if (path / FILE_NAME).is_file()}
    if step in folders:
        return folders[step]
    if inspect_adapter(run).step == step:
        return run
    existing = ", ".join(map(str, folders)) or "no checkpoints"
    raise UserError(f"{run} has no adapter of step {step}: it has {existing}")


@dataclass(frozen=True)
class Axis:
    """One axis: its name and, for each value, a label and the settings of :class:`Cell` that it changes."""

    name: str
    labels: tuple[str, ...]
    changes: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        settings = CELL_FIELDS | SAMPLING_FIELDS
        if not self.labels or len(self.labels) != len(self.changes):
            raise UserError(f"the axis {self.name!r} has no values")
        for change in self.changes:
            if unknown := set(change) - settings:
                raise UserError(f"a grid has no setting {sorted(unknown)[0]!r}: use {', '.join(sorted(settings))}")

    def title(self, index: int) -> str:
        """``name = label`` of one value; for a prompt the label alone."""
        return self.labels[index] if self.name in ("", "prompt") else f"{self.name} = {self.labels[index]}"

    def apply(self, cell: Cell, index: int) -> Cell:
        """``cell`` with the changes of one value."""
        change = self.changes[index]
        sampling = {name: value for name, value in change.items() if name in SAMPLING_FIELDS}
        others = {name: value for name, value in change.items() if name in CELL_FIELDS}
        return replace(cell, sampling=replace(cell.sampling, **sampling), **others)


def axis(name: str, values: Sequence[Any]) -> Axis:
    """An axis over one setting. An adapter may have a weight (``out/mug:0.8``); ``none`` is the base alone.

    Raises :class:`UserError` for an unknown axis.
    """
    if name not in AXES:
        raise UserError(f"there is no axis {name!r}: choose one of {', '.join(AXES)}")
    if name == "sampler":
        return Axis(name, *zip(*map(_sampler, values), strict=True))
    if name != "adapter":
        return Axis(name, tuple(f"{v:g}" if isinstance(v, float) else str(v) for v in values),
                    tuple({name: value} for value in values))  # fmt: skip
    changes: list[dict[str, Any]] = []
    for text in values:
        if text in NONE:
            changes.append({"adapter": None})
        else:
            path, weight = parse_adapter(str(text))
            changes.append({"adapter": path} | ({"weight": weight} if path != text else {}))
    return Axis(name, tuple("none" if v in NONE else Path(str(v)).name for v in values), tuple(changes))


def _sampler(value: str) -> tuple[str, dict[str, Any]]:
    """A value of the axis ``sampler``, by any of its names."""
    found = sampler_named(value)
    if found is None:
        raise UserError(f"the sampler {quoted(value)} is unknown: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[found].title, {"sampler": found}


def parse_axis(text: str) -> Axis:
    """Parse an axis: ``seed=1,2``, ``seed=1..4``, ``weight=0,0.5,1`` or ``prompt=a dog | a sks dog``.

    Raises :class:`UserError`.
    """
    name, equals, rest = text.partition("=")
    if not equals or not rest.strip():
        raise UserError(f"{text!r} is not an axis: write for example seed=1,2 or weight=0,0.5,1")
    name = name.strip()
    if name in INTEGERS and (match := RANGE.fullmatch(rest.strip())):
        first, last = int(match[1]), int(match[2])
        if last < first:
            raise UserError(f"the range {rest.strip()} is reversed: write {last}..{first}")
        if last >= first + MAX_RANGE:
            raise UserError(f"the range {rest.strip()} has more than {MAX_RANGE} values: write a shorter one")
        return axis(name, range(first, last + 1))
    words = [word.strip() for word in rest.split("|" if name == "prompt" or "|" in rest else ",")]
    return axis(name, [_number(name, word) for word in words] if name in NUMBERS else words)


def _number(name: str, word: str) -> float | int:
    try:
        return int(word) if name in INTEGERS else float(word)
    except ValueError:
        expected = "a whole number" if name in INTEGERS else "a number"
        raise UserError(f"{word!r} on the axis {name!r} is not {expected}") from None
