"""What a run shows and saves where that is not the last step's numbers: an average of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .optimizer_state import AVERAGE


class Average:
    """Exponential moving average of the trained factors: ``a <- d a + (1 - d) w``.

    ``d = min(decay, (1 + n) / (10 + n))``, where ``n`` is the number of steps done, so that a short run's average
    forgets its start (as TensorFlow's and diffusers').
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter], done: int) -> None:
        """Take in the numbers after step ``done``, counted from 1."""
        decay = min(self.decay, (1 + done) / (10 + done))
        for name, parameter in parameters.items():
            self.values[name].lerp_(parameter.detach(), 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return {f"{name}|{AVERAGE}": value.cpu().contiguous() for name, value in self.values.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Back to what :meth:`tensors` gave."""
        for name, value in self.values.items():
            value.copy_(tensors[f"{name}|{AVERAGE}"])


@contextmanager
def shown(parameters: Mapping[str, nn.Parameter], optimizer: Any, average: Average | None) -> Iterator[None]:
    """The factors as they are to be used: averaged by :class:`Average` or by a schedule-free optimizer.

    Afterwards they are bit for bit what they were.
    """
    schedule_free = all("train_mode" in group for group in optimizer.param_groups)
    if average is None and not schedule_free:
        yield
        return
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        if schedule_free:
            optimizer.eval()
        if average is not None:
            _fill(parameters, average.values)
        yield
    finally:
        if schedule_free:
            optimizer.train()
        _fill(parameters, kept)


@torch.no_grad()
def _fill(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
