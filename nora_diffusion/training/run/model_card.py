"""The training section of the model card; :mod:`nora_diffusion.formats.model_card` writes the rest."""

from __future__ import annotations

from ...composition.mixing import mix_card
from ...formats.adapter_file import inspect_adapter
from ..measuring.selection import reason
from ..settings.config import settings_by_name, tagged
from .outcome import Outcome


def training_section(outcome: Outcome) -> str:
    """Markdown with the prompt, the result, sample images and the settings of the run."""
    run, plan = outcome.run, outcome.run.plan
    gates = plan.config.gates_of is not None
    names = [name for name in tagged("card") if not gates or settings_by_name()[name].metadata["group"] != "adapter"]
    values = ((name, plan.settings[name]) for name in names)
    rows = [(name, value) for name, value in values if value is not None and value is not False]
    if not plan.config.with_prior_preservation:
        rows = [row for row in rows if row[0] not in ("prior_loss_weight", "class_prompt")]
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    class_word = f", class `{plan.subject.class_word}`" if plan.subject.class_word and not gates else ""
    mixed = f"\n\n{mix_card(inspect_adapter(str(plan.config.gates_of), hashed=False))}" if gates else ""
    return (
        f"## Training\n\n{len(plan.subject.images)} photos, {run.last_step} steps in {outcome.seconds:.0f} s, "
        f"mean loss of the last steps {outcome.final_loss:.4f}. Prompt: `{plan.subject.subject_prompt}`"
        f"{class_word}.{_choice_line(outcome)}\n{_images(outcome)}\n| setting | value |\n| --- | --- |\n{table}{mixed}"
    )


def _images(outcome: Outcome) -> str:
    by_prompt: dict[str, list[str]] = {}
    for number, (prompt, path) in enumerate(outcome.samples):
        link = path.relative_to(outcome.folder.path).as_posix()
        by_prompt.setdefault(prompt, []).append(f"![sample {number}]({link})")
    return "".join(f"\n`{prompt}`:\n\n{' '.join(images)}\n" for prompt, images in by_prompt.items())


def _choice_line(outcome: Outcome) -> str:
    run = outcome.run
    if run.validation is None:
        return ""
    return f"\n\n{reason(run.validation.points, outcome.kept_step, run.last_step)}"


def _cell(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
