"""Write ``report.html``: curves, images by step, and which step was saved and why."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...formats.adapter_file import layer_ranks
from ...io.files import write_atomic
from ...io.images import load_image
from ...io.run_layout import REPORT, SAMPLES, VALIDATION, images_by_step
from ...pipelines.base import base_id
from ...reports import webpage
from ...reports.plots import column_chart, line_chart
from ..measuring.samples import sample_seed
from ..measuring.selection import DIRECTIONS, NAMES, Point, digits, front, is_judged, reason, verdicts
from .outcome import Outcome
from .run import Run

log = logging.getLogger(__name__)

MEANINGS = {
    "heldout_loss": "mean squared error of the denoiser on photos that are not trained on, with their captions, at six "
    "fixed noise levels and fixed noise",
    "dino": "mean cosine similarity to the {real}, by features of {dino}",
    "clip_i": "mean cosine similarity to the {real}, by features of {judge}",
    "clip_t": "mean cosine similarity to the prompt without the trigger, by features of {judge}",
    "drift": "one minus the mean cosine similarity between images of the class without the trigger, with and without "
    "the adapter, at the same seeds",
    "diversity": "mean of one minus the cosine similarity over pairs of images of the same prompt",
    "gain": "gain in likeness over the base, relative to the best gain of the run",
    "cost": "root mean square of the losses in the other scores, each relative to its largest loss in the run",
}
EMBEDDED_JUDGE = "the CLIP of the embedded base"
MAX_ROWS, MAX_COLUMNS, MAX_LOSSES = 12, 12, 400


def write_report(outcome: Outcome) -> None:
    """Write ``report.html``. A failure is logged as a warning."""
    try:
        write_atomic(outcome.folder.path / REPORT, page(outcome))
    except Exception as error:
        log.warning("%s could not be written: %s", REPORT, error)


def page(outcome: Outcome) -> str:
    """The HTML of the report."""
    run, folder, kept = outcome.run, outcome.folder, outcome.kept_step
    losses = [(float(step), loss) for step, loss, _ in folder.steps()]
    points = run.validation.points if run.validation else []
    parts = [webpage.paragraph(_summary(outcome))]
    if points and run.validation is not None:
        parts += [webpage.heading("Which step was saved"), webpage.paragraph(reason(points, kept, run.last_step))]
        parts.append(_table(points, kept, run.last_step))
        settings = run.validation.measure.settings
        leaks = len(run.validation.measure.leaks)
        real = settings["real"] + (f" ({leaks} of them also used for training)" if leaks else "")
        judge = EMBEDDED_JUDGE if settings["judge"] == "tiny" else settings["judge"]
        parts.append(_meanings(points, {"real": real, "judge": judge, "dino": settings["dino"]}))
    curves = [_loss_chart(losses), *(_curves(points) if points else ()), _ranks_chart(folder.adapter)]
    parts += [webpage.heading("Curves"), f'<div class="plots">{"".join(curves)}</div>']
    for name, title in ((VALIDATION, "Validation images, first seed"), (SAMPLES, "Samples")):
        if found := images_to_show(folder.path / name):
            sampled = [
                f"{run.config.validation_prompt or ''}, seed {sample_seed(run.config, number)}"
                for number in range(MAX_COLUMNS)
            ]
            prompts = run.validation.measure.prompts if run.validation and name == VALIDATION else sampled
            parts += [webpage.heading(title), _grid(found, prompts, kept)]
    parts += [webpage.heading("Settings"), _settings(run)]
    name = f"{run.subject.trigger or ''} {run.subject.class_word or ''}".strip() or "a subject"
    return webpage.page(f"{folder.path.name}: training of {name}", parts)


def _ranks_chart(adapter: Path) -> str:
    """The rank of each layer; empty if all have the same setting."""
    columns = [(f"{component}.{path}", float(rank)) for (component, path), rank in layer_ranks(adapter).items()]
    return column_chart("Ranks by layer, in the order of the file", columns, "layer", "rank")


def _summary(outcome: Outcome) -> str:
    run, kept, planned = outcome.run, outcome.kept_step, outcome.run.config.max_train_steps
    loss = f", mean loss of the last steps {outcome.final_loss:.4f}" if math.isfinite(outcome.final_loss) else ""
    early = f" of {planned} (stopped early)" if run.last_step < planned else ""
    return (
        f"{len(run.subject.images)} photos, {run.last_step} steps{early}{loss}; {run.config.method} with "
        f"{run.trained:,} trained parameters on {base_id(run.pipe)}. The adapter in this folder is that of step {kept}."
    )


def _meanings(points: Sequence[Point], words: Mapping[str, str | None]) -> str:
    """An explanation of the table's columns."""
    keys = (*points[0].scores, *(("gain", "cost") if is_judged(points) else ()))
    rows = [(NAMES.get(key, key), MEANINGS[key].format(**words)) for key in keys]
    return f"<details><summary>What the columns mean</summary>{webpage.table(['', ''], rows)}</details>"


def _table(points: Sequence[Point], kept: int, last: int) -> str:
    """A table of all measured steps, with the saved one highlighted."""
    found, best = verdicts(points), front(points)
    names = list(points[0].scores)
    rows = []
    for point in points:
        notes = ["the base alone"] if point.step == 0 else []
        notes += ["kept"] if point.step == kept else []
        notes += ["last"] if point.step == last else []
        notes += ["Pareto front"] if point.step in best else []
        scores = [f"{point.scores[name]:.{digits(name)}f}" for name in names]
        verdict = found.get(point.step)
        gains = [f"{verdict.gain:.0%}", f"{verdict.cost:.2f}"] if verdict else []
        rows.append([str(point.step), *scores, *gains, ", ".join(notes)])
    titles = [f"{NAMES[name]} {'↑' if DIRECTIONS[name] > 0 else '↓'}" for name in names]
    header = ["step", *titles, *(["gain ↑", "cost ↓"] if found else []), ""]
    marked = next((number for number, point in enumerate(points) if point.step == kept), None)
    return webpage.table(header, rows, "Scores during training", marked)


def _curves(points: Sequence[Point]) -> list[str]:
    names = list(points[0].scores)
    return [
        line_chart(NAMES[name], {NAMES[name]: [(p.step, p.scores[name]) for p in points]}, "step", NAMES[name])
        for name in names
    ]


def _loss_chart(losses: Sequence[tuple[float, float]]) -> str:
    """Loss per step and its mean over windows: a single loss depends more on the timestep than on progress."""
    size = max(1, len(losses) // 50)
    smooth = [_mean(losses[start : start + size]) for start in range(0, len(losses), size)]
    thin = losses[:: max(1, len(losses) // MAX_LOSSES)]
    return line_chart("Loss", {"each step": thin, f"mean of {size} steps": smooth}, "step", "loss")


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(step for step, _ in points) / len(points), sum(loss for _, loss in points) / len(points)


def images_to_show(folder: Path) -> dict[int, list[Path]]:
    """The images of a folder by step, at most ``MAX_ROWS`` steps evenly spread and ``MAX_COLUMNS`` images each."""
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
    return webpage.table(header, rows, "Each row is a step; each column has one prompt and one seed.", marked)


def _settings(run: Run) -> str:
    rows = [[name, _text(value)] for name, value in run.plan.settings.items() if value not in (None, False, [], "")]
    return f"<details><summary>All settings</summary>{webpage.table(['setting', 'value'], rows)}</details>"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
