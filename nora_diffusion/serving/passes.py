"""Passes: calls of one model by several pictures are computed together, and each gets its rows of the result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, out_of_memory
from ..pipelines.names import DENOISERS
from .histogram import NO_ROWS, NO_SECONDS
from .merging import merged, parted
from .pictures import Work
from .rendezvous import Call
from .rows import Rows, Spec

log = logging.getLogger(__name__)


class Passes:
    """Computes calls on the models of a pipeline. ``at_work``: the specs of all pictures that may call.

    ``count``, ``rows``: passes of the denoiser so far, and their rows; ``fills``, ``durations``: rows and
    seconds of each.
    """

    def __init__(self, pipe: Any, at_work: Callable[[], Sequence[Spec]]) -> None:
        self._pipe, self._at_work, self._rows = pipe, at_work, Rows(pipe)
        self._room: dict[Hashable, int] = {}
        self.count = self.rows = 0
        self.fills, self.durations = NO_ROWS, NO_SECONDS

    def next(self, calls: Sequence[Call]) -> list[Call]:
        """The calls of the next pass: those that merge with the oldest one, encoders and autoencoders first.

        A picture that has been encoded joins the next pass of the denoiser. An autoencoder makes one picture at a time.
        """
        others = [call for call in calls if call.model not in DENOISERS]
        first = (others or list(calls))[0]
        if first.model.startswith("vae"):
            return [first]
        return [call for call in calls if call.kind == first.kind][: self._room.get(first.kind)]

    def compute(self, calls: Sequence[Call]) -> None:
        """Answer calls of one model by one pass. If it fails, it is halved, so that a picture fails alone.

        Passes that did not fit into memory are not tried again in that size, until :meth:`rest`.
        """
        try:
            self._answer(calls)
        except Exception as error:
            if len(calls) == 1:
                calls[0].fail(error)
                return
            middle = len(calls) // 2
            if out_of_memory(error):
                self._room[calls[0].kind] = middle
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            log.warning("a pass of %d pictures failed and is halved: %s", len(calls), error)
            for half in (calls[:middle], calls[middle:]):
                self.compute(half)

    def rest(self) -> None:
        """Called when no picture is at work: memory that was missing may be free now."""
        self._room.clear()

    def close(self) -> None:
        """Leave the models as they were, so that adapters can be loaded and deleted; the next pass prepares them."""
        self._rows.close()

    def _answer(self, calls: Sequence[Call]) -> None:
        name, _, method = calls[0].model.partition(".")
        began = time.monotonic()
        model = getattr(self._pipe, name)
        pass_ = merged([call.arguments for call in calls])
        if method:
            result = getattr(model, method)(*pass_.args, **pass_.kwargs)
        else:
            blocks = [(work.spec, call.arguments.rows) for call in calls if isinstance(work := call.picture, Work)]
            self._rows.prepare([*(spec for spec, _ in blocks), *self._at_work()])
            self._rows.assign(name, blocks)
            if name in DENOISERS:
                self.count, self.rows = self.count + 1, self.rows + pass_.rows
            result = model(*pass_.args, **pass_.kwargs)
        for call, own in zip(calls, parted(result, [call.arguments.rows for call in calls]), strict=True):
            _check_finite(name, own)
            call.answer(own)
        if name in DENOISERS:  # the check has waited for the device
            self.fills = self.fills.with_value(pass_.rows)
            self.durations = self.durations.with_value(time.monotonic() - began)


def _check_finite(name: str, result: Any) -> None:
    """Raises :class:`UserError` for a prediction that is NaN: the picture would be black."""
    first = result[0] if isinstance(result, tuple | list) else result
    if name in DENOISERS and isinstance(first, Tensor) and not torch.isfinite(first).all():
        raise UserError("the denoiser returned NaN or infinity: use lower weights, or --precision fp32")
