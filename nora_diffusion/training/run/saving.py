"""Save a finished run: adapter, model card, report and, if set, exports and an upload."""

from __future__ import annotations

from contextlib import nullcontext

from ...errors import UserError
from ...formats.model_card import is_card
from ...loaders import save_adapter
from ..planning.checkpoints import prune
from ..step.averaging import averaged
from .model_card import training_section
from .outcome import Outcome
from .publishing import export_all, push
from .report import write_report


def save_outcome(outcome: Outcome) -> None:
    """Write all files of a finished run.

    Raises :class:`UserError` if the disk is full, the weights exceed ``save_dtype``, or an export or upload fails.
    """
    try:
        write_adapter_and_card(outcome)
    except UserError as error:
        raise UserError(f"{error}; then run the command again with --resume_from_checkpoint latest") from error
    prune(outcome.folder.checkpoints, outcome.run.config.checkpoints_total_limit)
    write_report(outcome)


def write_adapter_and_card(outcome: Outcome) -> None:
    """Write ``nora_adapter.safetensors`` and ``README.md``, then export and upload if set."""
    run, folder = outcome.run, outcome.folder
    config = run.config
    # An earlier step that was chosen is already loaded, with the EMA weights that were measured.
    is_last = outcome.kept_step == run.last_step
    with averaged(run.parameters, run.optimizer, run.average) if is_last else nullcontext():
        path = save_adapter(
            run.pipe,
            folder.path,
            run.adapter,
            dtype=config.save_dtype,
            info={**run.info, "step": outcome.kept_step},
            card=training_section(outcome),
            finish=run.hooks.finish,
        )
    exports = export_all(path, config.export or [], config.save_dtype)
    if config.push_to_hub:
        card_file = folder.path / "README.md"
        cards = [card_file] if is_card(card_file) else []  # a README that is not our model card is not uploaded
        push(run, folder, [path, *cards, *(image for _, image in outcome.samples), *exports])
