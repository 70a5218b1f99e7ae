"""EMA of the trained parameters, for samples, scores and the saved adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .optimizer_state import AVERAGE


class Average:
    """Exponential moving average of the trained parameters: ``a <- d a + (1 - d) w``.

    ``d = min(decay, (1 + n) / (10 + n))`` after ``n`` steps, as in TensorFlow and diffusers, so that the initial values
    do not dominate short runs.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter], done: int) -> None:
        """Update after step ``done``, counted from 1."""
        decay = min(self.decay, (1 + done) / (10 + done))
        for name, parameter in parameters.items():
            self.values[name].lerp_(parameter.detach(), 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint."""
        return {f"{name}|{AVERAGE}": value.cpu().contiguous() for name, value in self.values.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore from the tensors of a checkpoint."""
        for name, value in self.values.items():
            value.copy_(tensors[f"{name}|{AVERAGE}"])


@contextmanager
def averaged(parameters: Mapping[str, nn.Parameter], optimizer: Any, average: Average | None) -> Iterator[None]:
    """Use the averaged parameters of :class:`Average` or of a schedule-free optimizer inside the context.

    On exit the parameters are restored bit for bit.
    """
    schedule_free = all("train_mode" in group for group in optimizer.param_groups)
    if average is None and not schedule_free:
        yield
        return
    saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        if schedule_free:
            optimizer.eval()
        if average is not None:
            _copy(parameters, average.values)
        yield
    finally:
        if schedule_free:
            optimizer.train()
        _copy(parameters, saved)


@torch.no_grad()
def _copy(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
