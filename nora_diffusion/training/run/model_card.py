"""The training part of the model card; :mod:`nora_diffusion.formats.model_card` writes the rest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..measuring.selection import reason
from ..settings.config import having
from .setup import Run


def training_section(run: Run, final_loss: float, seconds: float, samples: Sequence[tuple[str, Path]]) -> str:
    """Markdown: prompts, settings that were in force, the outcome and ``samples``, pictures with their prompts."""
    config = run.config
    values = ((name, getattr(config, name)) for name in having("card"))
    rows = [(name, value) for name, value in values if value is not None and value is not False]
    if not config.with_prior_preservation:
        rows = [row for row in rows if row[0] not in ("prior_loss_weight", "class_prompt")]
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    by_prompt: dict[str, list[str]] = {}
    for number, (prompt, path) in enumerate(samples):
        by_prompt.setdefault(prompt, []).append(f"![sample {number}]({path.as_posix()})")
    shown = "".join(f"\n`{prompt}`:\n\n{' '.join(pictures)}\n" for prompt, pictures in by_prompt.items())
    return (
        f"## Training\n\n{len(run.subject.photos)} photos, {run.total_steps} steps in {seconds:.0f} s, "
        f"mean loss of the last steps {final_loss:.4f}. Prompt: `{run.info['instance_prompt']}`"
        f"{_class_line(run)}.{_kept_line(run)}\n{shown}\n| setting | value |\n| --- | --- |\n{table}"
    )


def _class_line(run: Run) -> str:
    return f", class `{run.subject.class_word}`" if run.subject.class_word else ""


def _kept_line(run: Run) -> str:
    if run.validation is None:
        return ""
    return f"\n\n{reason(run.validation.points, run.kept_step or run.total_steps, run.total_steps)}"


def _cell(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
