"""Passes: calls of one model by several pictures are computed together, and each gets its rows of the result."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, out_of_memory
from ..pipelines.names import DENOISERS
from .histogram import NO_ROWS, NO_SECONDS
from .merging import Arguments, merged, parted
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
        error = self._failure(calls)
        if error is None:
            return
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

    def _failure(self, calls: Sequence[Call]) -> Exception | None:
        """Answer all calls, or none and return why; the error no longer holds the tensors of the pass."""
        try:
            results = self._results(calls)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            return error
        for call, own in zip(calls, results, strict=True):
            call.answer(own)
        return None

    def rest(self) -> None:
        """Called when no picture is at work: memory that was missing may be free now."""
        self._room.clear()

    def forget(self) -> None:
        """Keep nothing that was computed of the adapters' factors."""
        self._rows.forget()

    def close(self) -> None:
        """Leave the models as they were, so that adapters can be loaded and deleted; the next pass prepares them."""
        self._rows.close()

    def _results(self, calls: Sequence[Call]) -> list[Any]:
        name, _, method = calls[0].model.partition(".")
        began = time.monotonic()
        model = getattr(self._pipe, name)
        pass_ = merged([_with_ids_of(model, name, call) for call in calls])
        if method:
            result = getattr(model, method)(*pass_.args, **pass_.kwargs)
        else:
            blocks = [(work.spec, call.arguments.rows) for call in calls if isinstance(work := call.picture, Work)]
            self._rows.prepare([*(spec for spec, _ in blocks), *self._at_work()])
            self._rows.assign(name, blocks)
            if name in DENOISERS:
                self.count, self.rows = self.count + 1, self.rows + pass_.rows
            result = model(*pass_.args, **pass_.kwargs)
        results = parted(result, [call.arguments.rows for call in calls])
        for own in results:
            _check_finite(name, own)
        if name in DENOISERS:  # the check has waited for the device
            self.fills = self.fills.with_value(pass_.rows)
            self.durations = self.durations.with_value(time.monotonic() - began)
        return results


def _with_ids_of(encoder: Any, name: str, call: Call) -> Arguments:
    """The arguments of a call with the ids that new tokens have now: those of a picture's tokenizers are its own."""
    own, words = call.arguments, call.picture.words.get(name) if isinstance(call.picture, Work) else None
    if not words:
        return own
    translate = partial(encoder.get_input_embeddings().translated, first=words)
    if own.args:
        return Arguments((translate(own.args[0]), *own.args[1:]), own.kwargs, own.rows)
    return Arguments((), {**own.kwargs, "input_ids": translate(own.kwargs["input_ids"])}, own.rows)


def _check_finite(name: str, result: Any) -> None:
    """Raises :class:`UserError` for a prediction that is NaN: the picture would be black."""
    first = result[0] if isinstance(result, tuple | list) else result
    if name in DENOISERS and isinstance(first, Tensor) and not torch.isfinite(first).all():
        raise UserError("the denoiser returned NaN or infinity: use lower weights, or --precision fp32")
