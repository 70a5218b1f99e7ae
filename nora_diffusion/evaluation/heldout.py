"""The held-out loss of adapters, on the images of a subject that were not trained on."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..data.caption_files import read_captions
from ..data.transforms import Transform, bucket_shapes
from ..loaders import delete_adapter, load_adapter, set_adapters
from ..pipelines.components import components, projections
from ..training.measuring.heldout_loss import HeldOutLoss
from ..training.step.denoiser import bucket_multiple, encode_prompts, native_resolution
from ..training.step.objective import Objective
from ..training.step.seeds import derive
from ..training.strategies.weight_noise import hardware_std, noise_source, with_noise
from .subjects import EvaluatedSubject

NAME = "held_out"
DRAWS = 4
"""Draws of the noise, over which a loss under noise is the mean."""


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
        with self._loaded(path, weight):
            return self._loss.by_photo()

    def loss_under_noise(self, path: str | None, weight: float, sigma: float) -> float:
        """The mean loss over all images and :data:`DRAWS` draws of :func:`noisy_weights`, as in :meth:`losses`."""
        found = []
        with self._loaded(path, weight):
            for draw in range(DRAWS if sigma else 1):
                with noisy_weights(self.pipe, sigma, derive(0, "weight noise", draw)):
                    found.append(self._loss())
        return statistics.fmean(found)

    @contextmanager
    def _loaded(self, path: str | None, weight: float) -> Iterator[None]:
        set_adapters(self.pipe, [])
        if path is None:
            yield
            return
        load_adapter(self.pipe, path, NAME)
        try:
            set_adapters(self.pipe, [NAME], [weight])
            yield
        finally:
            delete_adapter(self.pipe, NAME)


@contextmanager
def noisy_weights(pipe: Any, sigma: float, seed: int) -> Iterator[None]:
    """Let denoiser and text encoders compute with ``W + n``, ``n ~ N(0, (sigma max(W))^2)``, in every projection.

    That is the noise of a memory that holds the frozen weights (HaLoRA, arXiv 2502.19747); adapters have none. Other
    weights stand in the place of the frozen ones, which are not written to.
    """
    with ExitStack() as stack:
        for name, module in components(pipe).items():
            source = noise_source(next(module.parameters()).device, derive(seed, name))
            for layer in projections(module).values():
                stack.enter_context(_other_weight(layer, sigma, source))
        yield


@contextmanager
def _other_weight(layer: Any, sigma: float, source: torch.Generator) -> Iterator[None]:
    frozen = layer.weight
    layer.weight = nn.Parameter(with_noise(frozen, hardware_std(frozen, sigma), source), requires_grad=False)
    try:
        yield
    finally:
        layer.weight = frozen
