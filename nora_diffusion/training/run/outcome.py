"""The end of a run: the adapter, its model card and, where asked, the upload to the hub."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from ...formats.model_card import is_card
from ...io.run_layout import VALIDATION, images_by_step
from ...loaders import save_adapter
from ..step.averaging import shown
from .model_card import training_section
from .publishing import export_all, push
from .rundir import RunFolder
from .setup import Run


def write_adapter_and_card(run: Run, folder: RunFolder, final_loss: float, seconds: float) -> Path:
    """Write ``nora_adapter.safetensors`` and ``README.md`` whole, then upload them if the config says so."""
    shots = pictures_of(run, folder)
    card = training_section(run, final_loss, seconds, [(said, path.relative_to(folder.path)) for said, path in shots])
    # An earlier step that was chosen is in place already, averaged as it was measured.
    last = run.kept_step in (None, run.total_steps)
    with shown(run.parameters, run.optimizer, run.average) if last else nullcontext():
        path = save_adapter(
            run.pipe,
            folder.path,
            run.adapter,
            dtype=run.config.save_dtype,
            info={**run.info, "step": run.kept_step or run.total_steps},
            card=card,
        )
    exports = export_all(path, run.config.export or [], run.config.save_dtype)
    if run.config.push_to_hub:
        card_file = folder.path / "README.md"
        cards = [card_file] if is_card(card_file) else []  # a README of somebody's own stays here
        push(run, folder, [path, *cards, *(picture for _, picture in shots), *exports])
    return path


def pictures_of(run: Run, folder: RunFolder) -> list[tuple[str, Path]]:
    """What the adapter in the file makes: prompts with the samples and measured pictures of its step."""
    drawn, measured = (
        images_by_step(place).get(run.kept_step or run.total_steps, [])
        for place in (folder.samples, folder.path / VALIDATION)
    )
    samples = [(run.config.validation_prompt or "", path) for path in drawn]
    if run.validation is None:
        return samples
    return [*samples, *zip(run.validation.measure.prompts, measured, strict=False)]
