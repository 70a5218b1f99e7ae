"""The result of a run, from which its model card and report are written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...io.run_layout import VALIDATION, images_by_step
from ..planning.rundir import RunFolder
from .run import Run


@dataclass(frozen=True)
class Outcome:
    """A run after its last step. ``kept_step``: the step whose adapter is saved."""

    run: Run
    folder: RunFolder
    kept_step: int
    final_loss: float
    seconds: float

    @property
    def samples(self) -> list[tuple[str, Path]]:
        """Prompts with the sample and validation images of the kept step."""
        run, folder = self.run, self.folder
        drawn, measured = (
            images_by_step(path).get(self.kept_step, []) for path in (folder.samples, folder.path / VALIDATION)
        )
        samples = [(run.config.validation_prompt or "", path) for path in drawn]
        if run.validation is None:
            return samples
        return [*samples, *zip(run.validation.measure.prompts, measured, strict=False)]
