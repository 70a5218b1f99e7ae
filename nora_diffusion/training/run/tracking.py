"""Experiment trackers (TensorBoard, W&B, ...). A tracker that fails is dropped; training continues."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

PROJECT = "nora-dreambooth"


class Trackers:
    """The trackers of a run, through accelerate. Errors of a tracker never leave this class."""

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> None:
        self._live: dict[str, Any] = {}
        for name in names:
            self._guarded(name, lambda name=name: self._start(name, folder, settings))  # type: ignore[misc]

    def _start(self, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        needs_folder = tracker_class.requires_logging_directory
        tracker = tracker_class(PROJECT, folder) if needs_folder else tracker_class(PROJECT)
        tracker.start()
        tracker.store_init_configuration(dict(settings))
        self._live[name] = tracker

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the values of a step."""
        for name, tracker in list(self._live.items()):
            self._guarded(name, lambda tracker=tracker: tracker.log(dict(values), step=step))  # type: ignore[misc]

    def finish(self) -> None:
        """Flush and close all trackers."""
        for name, tracker in list(self._live.items()):
            self._guarded(name, lambda tracker=tracker: tracker.finish())  # type: ignore[misc]
        self._live = {}

    def _guarded(self, name: str, call: Callable[[], Any]) -> None:
        # A tracker without a login may call sys.exit, so SystemExit counts as a failure too.
        try:
            call()
        except (Exception, SystemExit) as error:
            log.warning("the tracker %s failed and is not used any more: %s", name, error)
            self._live.pop(name, None)
