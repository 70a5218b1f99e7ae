"""The page that a run ends with: curves, pictures over the steps, which step was kept and why. All from the folder."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .. import webpage
from ..files import write_atomic
from ..plots import line_chart
from .rundir import REPORT, SAMPLES, VALIDATION, RunFolder
from .selection import DIRECTIONS, Point, choose, distances, front, reason
from .setup import Run

log = logging.getLogger(__name__)

NAMES = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "drift": "drift", "diversity": "diversity"}
MEANINGS = (
    "DINO and CLIP-I: mean cosine to the {real}. CLIP-T: mean cosine to the prompt without the trigger. Drift: one "
    "minus the mean cosine between pictures of the class without the trigger and the base's own of the same seeds. "
    "Diversity: mean of one minus cosine over pairs of pictures of one prompt. Judges: {judge}{dino}."
)
MAX_ROWS, MAX_COLUMNS, MAX_LOSSES = 12, 6, 400


def write_report(run: Run, folder: RunFolder) -> None:
    """Write ``report.html``. It is no part of the training: a failure is only a warning."""
    try:
        write_atomic(folder.path / REPORT, page(run, folder))
    except (RuntimeError, OSError, ValueError, SyntaxError) as error:
        log.warning("there is no %s: %s", REPORT, error)


def page(run: Run, folder: RunFolder) -> str:
    """The whole page."""
    losses = _losses(folder.path / "log.jsonl")
    points = run.validation.points if run.validation else []
    parts = [webpage.paragraph(_summary(run, losses))]
    if points and run.validation is not None:
        parts += [webpage.heading("Which step"), webpage.paragraph(reason(points)), _table(points)]
        settings = run.validation.measure.settings
        dino = f" and {settings['dino']}" if settings["dino"] else ""
        said = MEANINGS.format(real=settings["real"], judge=settings["judge"], dino=dino)
        parts += [webpage.paragraph(said), f'<div class="plots">{"".join(_curves(points))}</div>']
    parts += [webpage.heading("Loss"), f'<div class="plots">{_loss_chart(losses)}</div>']
    for name, title in ((VALIDATION, "Measured pictures, first seed"), (SAMPLES, "Samples")):
        if found := pictures(folder.path / name):
            prompts = run.validation.measure.prompts if run.validation and name == VALIDATION else []
            kept = run.kept_step or run.total_steps
            parts += [webpage.heading(title), _grid(found, prompts or [run.config.validation_prompt or ""], kept)]
    parts += [webpage.heading("Settings"), _settings(run)]
    return webpage.page(f"Training of {run.subject.trigger or 'a subject'} in {folder.path.name}", parts)


def _summary(run: Run, losses: Sequence[tuple[float, float]]) -> str:
    recent = [loss for _, loss in losses[-20:]]
    loss = f", mean loss of the last ones {sum(recent) / len(recent):.4f}" if recent else ""
    kept = run.kept_step or run.total_steps
    early = " (stopped early)" if run.total_steps < (run.config.max_train_steps or 0) else ""
    return (
        f"{len(run.subject.photos)} photos, {run.total_steps} steps{early}{loss}. The adapter in this folder is that "
        f"of step {kept}."
    )


def _table(points: Sequence[Point]) -> str:
    """Every measured step; the kept one stands out, and the last one is named whatever it is."""
    far, chosen, best = distances(points), choose(points), front(points)
    names = list(points[0].scores)
    rows = []
    for point in points:
        notes = ["the base alone"] if point.step == 0 else []
        notes += ["kept"] if point.step == chosen else []
        notes += ["last"] if point.step == points[-1].step else []
        notes += ["Pareto front"] if point.step in best else []
        scores = [f"{point.scores[name]:.3f}" for name in names]
        rows.append([str(point.step), *scores, f"{far[point.step]:.3f}", ", ".join(notes)])
    header = ["step", *(f"{NAMES[name]} {'↑' if DIRECTIONS[name] > 0 else '↓'}" for name in names), "distance ↓", ""]
    marked = next((number for number, point in enumerate(points) if point.step == chosen), None)
    return webpage.table(header, rows, "Measured on the way", marked)


def _curves(points: Sequence[Point]) -> list[str]:
    names = list(points[0].scores)
    return [
        line_chart(NAMES[name], {NAMES[name]: [(p.step, p.scores[name]) for p in points]}, "step", NAMES[name])
        for name in names
    ]


def _losses(path: Path) -> list[tuple[float, float]]:
    rows: list[tuple[float, float]] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            rows.append((float(row["step"]), float(row["loss"])))
        except (ValueError, KeyError, TypeError):
            continue  # a line cut short by a crash
    return rows


def _loss_chart(losses: Sequence[tuple[float, float]]) -> str:
    """Means over equal stretches: single losses depend on the timestep more than on the training."""
    size = max(1, len(losses) // 50)
    smooth = [_mean(losses[start : start + size]) for start in range(0, len(losses), size)]
    thin = losses[:: max(1, len(losses) // MAX_LOSSES)]
    return line_chart("Loss", {"each step": thin, f"mean of {size} steps": smooth}, "step", "loss")


def _mean(part: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(step for step, _ in part) / len(part), sum(loss for _, loss in part) / len(part)


def pictures(folder: Path) -> dict[int, list[Path]]:
    """The pictures ``step-<step>-<number>.png`` of a folder by step, some steps left out where there are many."""
    found: dict[int, dict[int, Path]] = {}
    for path in folder.glob("step-*.png"):
        if match := re.fullmatch(r"step-(\d+)-(\d+)\.png", path.name):
            found.setdefault(int(match[1]), {})[int(match[2])] = path
    steps = sorted(found)
    if len(steps) > MAX_ROWS:
        steps = sorted({steps[round(i * (len(steps) - 1) / (MAX_ROWS - 1))] for i in range(MAX_ROWS)})
    return {step: [found[step][number] for number in sorted(found[step])][:MAX_COLUMNS] for step in steps}


def _grid(found: dict[int, list[Path]], prompts: Sequence[str], kept: int) -> str:
    columns = max(len(paths) for paths in found.values())
    header = ["step", *(prompts[i] if i < len(prompts) else "" for i in range(columns))]
    rows = [[str(step), *(_shown(path, f"step {step}") for path in paths)] for step, paths in found.items()]
    marked = next((number for number, step in enumerate(found) if step == kept), None)
    return webpage.table(header, rows, "Rows are steps; a column has one prompt and one seed.", marked)


def _shown(path: Path, alt: str) -> webpage.Picture:
    with Image.open(path) as image:
        return webpage.picture(image.convert("RGB"), alt, side=112)


def _settings(run: Run) -> str:
    values: dict[str, Any] = run.config.to_dict()
    rows = [[name, _text(value)] for name, value in values.items() if value not in (None, False, [], "")]
    return f"<details><summary>All settings</summary>{webpage.table(['setting', 'value'], rows)}</details>"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
