"""Record the steps of a run in ``log.jsonl``, ``state.json``, the progress bar and the trackers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType

from tqdm.auto import tqdm

from ...io.run_layout import LOG
from ..planning.rundir import RunFolder, RunLog
from ..settings.checks import trackers
from .run import Run
from .tracking import Trackers


class Journal:
    """Context manager that records steps. ``progress``: show a progress bar."""

    def __init__(self, run: Run, folder: RunFolder, progress: bool = True) -> None:
        self.run, self.folder, self.progress = run, folder, progress
        self._trackers = Trackers([], folder.path, {})
        self._log: RunLog | None = None
        self._bar = tqdm(disable=True)

    def __enter__(self) -> Journal:
        run, folder = self.run, self.folder
        names = trackers(run.config) if folder.owner else []
        values = {k: v for k, v in run.plan.settings.items() if isinstance(v, str | int | float | bool)}
        self._trackers = Trackers(names, folder.path / run.config.logging_dir, values)
        self._log = RunLog(folder.path / LOG, run.first_step, folder.owner)
        self._bar = tqdm(
            total=run.last_step,
            initial=run.first_step,
            desc="steps",
            disable=not (folder.owner and self.progress),
            mininterval=0.5,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        assert self._log is not None
        self._log.close()
        self._bar.close()

    def record(self, done: int, loss: float, rate: float, norm: float, seconds: float) -> None:
        """Record step ``done``, counted from 1: its loss, learning rate, gradient norm and duration."""
        assert self._log is not None, "steps are recorded inside the context"
        finite = norm if math.isfinite(norm) else None  # infinite in a skipped fp16 step, and JSON has no infinity
        self._log.write(step=done, loss=loss, lr=rate, grad_norm=finite, seconds=round(seconds, 4))
        self.folder.state("training", step=done, total=self.run.last_step, loss=loss)
        self._bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.1e}", refresh=False)
        self._bar.update()
        self._trackers.log({"loss": loss, "lr": rate, "grad_norm": norm}, done)

    def measured(self, done: int, scores: Mapping[str, float]) -> None:
        """Send the scores of a measurement to the trackers."""
        self._trackers.log({f"validation/{name}": value for name, value in scores.items()}, done)

    def finish(self) -> None:
        """Flush and close the trackers."""
        self._trackers.finish()
