"""The held-out loss of adapters, on the images of a subject that were not trained on."""

from __future__ import annotations

from typing import Any

import torch

from ..data.caption_files import read_captions
from ..data.transforms import Transform, bucket_shapes
from ..loaders import delete_adapter, load_adapter, set_adapters
from ..training.measuring.heldout_loss import HeldOutLoss
from ..training.step.denoiser import bucket_multiple, encode_prompts, native_resolution
from ..training.step.objective import Objective
from .subjects import EvaluatedSubject

NAME = "held_out"


class HeldOut:
    """Measures adapters on the held-out images of one subject, at the base's own resolution.

    The prompt of an image is its caption, from the text file beside it, else the subject's phrase.
    """

    def __init__(self, pipe: Any, subject: EvaluatedSubject, dtype: torch.dtype) -> None:
        self.pipe = pipe
        paths = [photo.path for photo in subject.held_out]
        captions = read_captions(paths, subject.phrase, sidecars=True).texts
        shapes = bucket_shapes(native_resolution(pipe), bucket_multiple(pipe))
        self._loss = HeldOutLoss(
            pipe, Objective.of(pipe.scheduler, device=pipe.device), subject.held_out, captions, Transform(shapes),
            lambda prompts: encode_prompts(pipe, prompts), dtype,
        )  # fmt: skip

    def losses(self, path: str | None, weight: float) -> list[float]:
        """The loss on each image with the adapter at ``path``; ``None``: the base alone."""
        set_adapters(self.pipe, [])
        if path is None:
            return self._loss.by_photo()
        load_adapter(self.pipe, path, NAME)
        try:
            set_adapters(self.pipe, [NAME], [weight])
            return self._loss.by_photo()
        finally:
            delete_adapter(self.pipe, NAME)
