"""Trackers: somebody else's services beside ``log.jsonl``. One that fails is left out; the run and the others go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

PROJECT = "nora-dreambooth"


class Trackers:
    """The trackers of a run, through accelerate's adapters. Nothing that happens in one leaves this class."""

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> None:
        self._live: dict[str, Any] = {}
        for name in names:
            self._guarded(name, lambda name=name: self._start(name, folder, settings))  # type: ignore[misc]

    def _start(self, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        tracker = kind(PROJECT, folder) if kind.requires_logging_directory else kind(PROJECT)
        tracker.start()
        tracker.store_init_configuration(dict(settings))
        self._live[name] = tracker

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Hand on the numbers of a step."""
        for name, tracker in list(self._live.items()):
            self._guarded(name, lambda tracker=tracker: tracker.log(dict(values), step=step))  # type: ignore[misc]

    def finish(self) -> None:
        """Let them send what they still hold."""
        for name, tracker in list(self._live.items()):
            self._guarded(name, lambda tracker=tracker: tracker.finish())  # type: ignore[misc]
        self._live = {}

    def _guarded(self, name: str, call: Callable[[], Any]) -> None:
        # A service may end a script that it finds itself no login for: SystemExit is a failure of its own too.
        try:
            call()
        except (Exception, SystemExit) as error:
            log.warning("the tracker %s failed and is left out from here on: %s", name, error)
            self._live.pop(name, None)
