"""The denoising objective: noising, target and weighting for epsilon, v and sample prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Objective:
    """``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e`` and the mean squared error against its target.

    Targets: ``e`` (epsilon), ``sqrt(a_t) e - sqrt(1 - a_t) x_0`` (v, arXiv 2202.00512), ``x_0`` (sample).
    ``snr_gamma`` > 0 weights each row by min-SNR (arXiv 2303.09556). ``alphas``: ``a_t [T]``, fp32.
    """

    alphas: Tensor
    prediction_type: str
    snr_gamma: float = 0.0

    @classmethod
    def of(cls, scheduler: Any, snr_gamma: float = 0.0, device: Any = "cpu") -> Objective:
        """The objective that a pipeline's scheduler was trained for, zero terminal SNR included."""
        from diffusers import DDPMScheduler

        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind not in PREDICTION_TYPES:
            raise UserError(f"the scheduler's prediction_type={kind!r} is unknown: {', '.join(PREDICTION_TYPES)} are")
        alphas = DDPMScheduler.from_config(scheduler.config).alphas_cumprod
        return cls(alphas.float().to(device), kind, snr_gamma)

    @property
    def timesteps(self) -> int:
        """The number of noise levels ``T``."""
        return self.alphas.numel()

    def _factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        a = self.alphas[t].view(-1, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t [B, C, H, W]`` for ``t [B]``."""
        signal, sigma = self._factors(t)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the UNet should answer."""
        signal, sigma = self._factors(t)
        if self.prediction_type == "epsilon":
            return noise
        return latents if self.prediction_type == "sample" else signal * noise - sigma * latents

    def weights(self, t: Tensor) -> Tensor:
        """Weight of each row ``[B]``: with ``s = a / (1 - a)``, ``g = snr_gamma``:

        epsilon ``min(s, g) / s = g / max(s, g)``, v ``min(s, g) / (s + 1)``, sample ``min(s, g)``: all
        finite at ``s = 0`` (zero terminal SNR), where the first form of epsilon's would be 0/0.
        """
        if self.snr_gamma <= 0:
            return torch.ones_like(self.alphas[t])
        a = self.alphas[t]
        snr = a / (1 - a).clamp(min=1e-12)
        if self.prediction_type == "epsilon":
            return self.snr_gamma / snr.clamp(min=self.snr_gamma)
        capped = snr.clamp(max=self.snr_gamma)
        return capped if self.prediction_type == "sample" else capped / (snr + 1)

    def losses(self, prediction: Tensor, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Weighted mean squared error of each row ``[B]``, in fp32."""
        if prediction.shape[1] == 2 * latents.shape[1]:
            prediction = prediction.chunk(2, dim=1)[0]  # a learned variance is not trained here
        error = prediction.float() - self.target(latents, noise, t).float()
        return error.square().mean(dim=(1, 2, 3)) * self.weights(t)
