"""The page that a run ends with: curves, pictures over the steps, which step was kept and why. All from the folder."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...io.files import write_atomic
from ...io.images import load_image
from ...io.run_layout import REPORT, SAMPLES, VALIDATION, images_by_step
from ...pipelines.base import base_id
from ...reports import webpage
from ...reports.plots import line_chart
from ..measuring.selection import DIRECTIONS, NAMES, Point, front, reason, verdicts
from .outcome import Outcome
from .run import Run

log = logging.getLogger(__name__)

MEANINGS = {
    "dino": "mean cosine to the {real}, as {dino} sees them",
    "clip_i": "mean cosine to the {real}, as {judge} sees them",
    "clip_t": "mean cosine to the prompt without the trigger, by {judge}",
    "drift": "one minus the mean cosine between pictures of the class without the trigger and the base's own of the "
    "same seeds",
    "diversity": "mean of one minus cosine over pairs of pictures of one prompt",
    "gain": "share of the best gain in likeness over the base",
    "cost": "what was lost of the rest, as a share of the most that was: root mean square",
}
EMBEDDED_JUDGE = "the CLIP of the embedded base"
MAX_ROWS, MAX_COLUMNS, MAX_LOSSES = 12, 12, 400


def write_report(outcome: Outcome) -> None:
    """Write ``report.html``. A failure is only a warning."""
    try:
        write_atomic(outcome.folder.path / REPORT, page(outcome))
    except Exception as error:
        log.warning("there is no %s: %s", REPORT, error)


def page(outcome: Outcome) -> str:
    """The whole page."""
    run, folder, kept = outcome.run, outcome.folder, outcome.kept_step
    losses = [(float(step), loss) for step, loss, _ in folder.steps()]
    points = run.validation.points if run.validation else []
    parts = [webpage.paragraph(_summary(outcome))]
    if points and run.validation is not None:
        parts += [webpage.heading("Which step"), webpage.paragraph(reason(points, kept, run.last_step))]
        parts.append(_table(points, kept, run.last_step))
        settings = run.validation.measure.settings
        leaks = len(run.validation.measure.leaks)
        real = settings["real"] + (f" ({leaks} of them learned from as well)" if leaks else "")
        judge = EMBEDDED_JUDGE if settings["judge"] == "tiny" else settings["judge"]
        parts.append(_meanings(points, {"real": real, "judge": judge, "dino": settings["dino"]}))
    curves = [_loss_chart(losses), *(_curves(points) if points else ())]
    parts += [webpage.heading("Curves"), f'<div class="plots">{"".join(curves)}</div>']
    for name, title in ((VALIDATION, "Measured pictures, first seed"), (SAMPLES, "Samples")):
        if found := pictures(folder.path / name):
            sampled = [
                f"{run.config.validation_prompt or ''}, seed {run.config.seed + number}"
                for number in range(MAX_COLUMNS)
            ]
            prompts = run.validation.measure.prompts if run.validation and name == VALIDATION else sampled
            parts += [webpage.heading(title), _grid(found, prompts, kept)]
    parts += [webpage.heading("Settings"), _settings(run)]
    called = f"{run.subject.trigger or ''} {run.subject.class_word or ''}".strip() or "a subject"
    return webpage.page(f"{folder.path.name}: training of {called}", parts)


def _summary(outcome: Outcome) -> str:
    run, kept, planned = outcome.run, outcome.kept_step, outcome.run.config.max_train_steps
    loss = f", mean loss of the last ones {outcome.final_loss:.4f}" if math.isfinite(outcome.final_loss) else ""
    early = f" of {planned} (stopped early)" if run.last_step < planned else ""
    return (
        f"{len(run.subject.images)} photos, {run.last_step} steps{early}{loss}; {run.config.method} with "
        f"{run.trained:,} trained numbers on {base_id(run.pipe)}. The adapter in this folder is that of step {kept}."
    )


def _meanings(points: Sequence[Point], words: Mapping[str, str | None]) -> str:
    """What the columns of the table mean."""
    rows = [(NAMES.get(key, key), MEANINGS[key].format(**words)) for key in (*points[0].scores, "gain", "cost")]
    return f"<details><summary>What these are</summary>{webpage.table(['', ''], rows)}</details>"


def _table(points: Sequence[Point], kept: int, last: int) -> str:
    """Every measured step; the kept one stands out, and the last one is named whatever it is."""
    found, best = verdicts(points), front(points)
    names = list(points[0].scores)
    rows = []
    for point in points:
        notes = ["the base alone"] if point.step == 0 else []
        notes += ["kept"] if point.step == kept else []
        notes += ["last"] if point.step == last else []
        notes += ["Pareto front"] if point.step in best else []
        scores = [f"{point.scores[name]:.3f}" for name in names]
        verdict = found[point.step]
        rows.append([str(point.step), *scores, f"{verdict.gain:.0%}", f"{verdict.cost:.2f}", ", ".join(notes)])
    header = [
        "step",
        *(f"{NAMES[name]} {'↑' if DIRECTIONS[name] > 0 else '↓'}" for name in names),
        "gain ↑",
        "cost ↓",
        "",
    ]
    marked = next((number for number, point in enumerate(points) if point.step == kept), None)
    return webpage.table(header, rows, "Measured on the way", marked)


def _curves(points: Sequence[Point]) -> list[str]:
    names = list(points[0].scores)
    return [
        line_chart(NAMES[name], {NAMES[name]: [(p.step, p.scores[name]) for p in points]}, "step", NAMES[name])
        for name in names
    ]


def _loss_chart(losses: Sequence[tuple[float, float]]) -> str:
    """Means over equal stretches: single losses depend on the timestep more than on the training."""
    size = max(1, len(losses) // 50)
    smooth = [_mean(losses[start : start + size]) for start in range(0, len(losses), size)]
    thin = losses[:: max(1, len(losses) // MAX_LOSSES)]
    return line_chart("Loss", {"each step": thin, f"mean of {size} steps": smooth}, "step", "loss")


def _mean(part: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(step for step, _ in part) / len(part), sum(loss for _, loss in part) / len(part)


def pictures(folder: Path) -> dict[int, list[Path]]:
    """The pictures of a folder by step, some steps left out where there are many."""
    found = images_by_step(folder)
    steps = list(found)
    if len(steps) > MAX_ROWS:
        steps = sorted({steps[round(i * (len(steps) - 1) / (MAX_ROWS - 1))] for i in range(MAX_ROWS)})
    return {step: found[step][:MAX_COLUMNS] for step in steps}


def _grid(found: dict[int, list[Path]], prompts: Sequence[str], kept: int) -> str:
    columns = max(len(paths) for paths in found.values())
    header = ["step", *(prompts[i] if i < len(prompts) else "" for i in range(columns))]
    rows = [
        [
            f"{step}, kept" if step == kept else str(step),
            *(webpage.image_tag(load_image(path), f"step {step}", side=112) for path in paths),
        ]
        for step, paths in found.items()
    ]
    marked = next((number for number, step in enumerate(found) if step == kept), None)
    return webpage.table(header, rows, "Rows are steps; a column has one prompt and one seed.", marked)


def _settings(run: Run) -> str:
    rows = [[name, _text(value)] for name, value in run.plan.settings.items() if value not in (None, False, [], "")]
    return f"<details><summary>All settings</summary>{webpage.table(['setting', 'value'], rows)}</details>"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
