"""The denoising objective: noise, target, weighting and loss for epsilon, v, sample and flow prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ..settings.config import LossType, LossWeighting

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SNR_FLOOR = 1e-4
"""Lower bound of the SNR in debiased weights, which would be infinite at zero terminal SNR."""


@dataclass(frozen=True)
class Objective:
    """``x_t = s_t x_0 + n_t e`` at noise levels ``t = 0 .. T - 1``, and the loss of a prediction.

    ==============  =========================  ==============================
    kind            target                     ``c_t`` = loss / error in x_0
    ==============  =========================  ==============================
    epsilon         ``e``                      ``snr = s^2 / n^2``
    v_prediction    ``s e - n x_0``            ``snr + 1`` (arXiv 2202.00512)
    sample          ``x_0``                    ``1``
    flow            ``e - x_0``, ``s = 1 - n``  ``1 / n^2`` (arXiv 2210.02747)
    ==============  =========================  ==============================

    Loss weights: ``min_snr`` is ``min(snr, gamma) / c`` (arXiv 2303.09556), ``debiased`` ``sqrt(snr) / c``
    (arXiv 2310.08442). Losses: ``l2`` is ``d^2``; ``huber`` ``2 h (sqrt(d^2 + h^2) - h)``, about ``d^2`` below ``h``
    and linear above (arXiv 2403.16728). ``signal``, ``noise`` and ``times`` ``[T]`` are ``s``, ``n`` and the timestep
    that the denoiser gets; fp32.
    """

    signal: Tensor
    noise: Tensor
    times: Tensor
    kind: str
    weighting: LossWeighting = "none"
    gamma: float = 5.0
    loss: LossType = "l2"
    huber_c: float = 0.1

    @classmethod
    def of(cls, scheduler: Any, snr_gamma: float = 0.0, device: Any = "cpu", **settings: Any) -> Objective:
        """Objective of a pipeline's scheduler, including zero terminal SNR and shifted flow matching.

        ``snr_gamma`` > 0 means ``min_snr`` weighting unless ``settings`` override it. Raises :class:`UserError` for an
        unknown prediction type.
        """
        signal, noise, times, kind = _flow(scheduler) if is_flow(scheduler) else _diffusion(scheduler)
        if snr_gamma > 0:
            settings = {"weighting": "min_snr", "gamma": snr_gamma, **settings}
        return cls(signal.to(device), noise.to(device), times.to(device), kind, **settings)

    @property
    def timesteps(self) -> int:
        """The number of noise levels ``T``."""
        return self.signal.numel()

    def _factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.signal[t].view(-1, 1, 1, 1), self.noise[t].view(-1, 1, 1, 1)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t [B, C, H, W]`` for levels ``t [B]``."""
        signal, sigma = self._factors(t)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Training target of the denoiser ``[B, C, H, W]``."""
        signal, sigma = self._factors(t)
        if self.kind == "v_prediction":
            return signal * noise - sigma * latents
        return {"epsilon": noise, "sample": latents, "flow": noise - latents}[self.kind]

    def weights(self, t: Tensor) -> Tensor:
        """Loss weight of each row ``[B]``, in a form that is finite at ``snr = 0`` (zero terminal SNR)."""
        if self.weighting == "none":
            return torch.ones_like(self.signal[t])
        variance = self.noise[t].square()
        snr = self.signal[t].square() / variance.clamp(min=1e-12)
        if self.kind == "epsilon":
            if self.weighting == "min_snr":
                return self.gamma / snr.clamp(min=self.gamma)
            return snr.clamp(min=SNR_FLOOR).rsqrt()
        weight = snr.clamp(max=self.gamma) if self.weighting == "min_snr" else snr.sqrt()
        return weight * {"v_prediction": 1 / (snr + 1), "sample": torch.ones_like(snr), "flow": variance}[self.kind]

    def errors(self, prediction: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Weighted error of each element ``[B, C, H, W]``, at least in fp32."""
        if prediction.shape[1] == 2 * target.shape[1]:
            prediction = prediction.chunk(2, dim=1)[0]  # drop the learned variance, which is not trained
        d = prediction.to(torch.promote_types(prediction.dtype, torch.float32)) - target.float()
        if self.loss == "l2":
            error = d.square()
        else:
            h = self.huber_c
            error = 2 * h * ((d.square() + h**2).sqrt() - h)
        return error * self.weights(t).view(-1, 1, 1, 1)

    def losses(self, prediction: Tensor, target: Tensor, t: Tensor, regions: Tensor | None = None) -> Tensor:
        """Mean weighted error of each row ``[B]``.

        ``regions [B, 1, H, W]`` weights positions: ``sum_p w_p mean_c(e) / sum_p w_p``, so that small and large
        subjects count equally. The loss of a row whose weights are all 0 is 0.
        """
        errors = self.errors(prediction, target, t)
        if regions is None:
            return errors.mean(dim=(1, 2, 3))
        total = regions.sum(dim=(1, 2, 3)).clamp(min=1e-12)
        return (errors.mean(dim=1, keepdim=True) * regions).sum(dim=(1, 2, 3)) / total


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler is for flow matching."""
    return "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("prediction_type") == "flow_prediction"


def _diffusion(scheduler: Any) -> tuple[Tensor, Tensor, Tensor, str]:
    from diffusers import DDPMScheduler

    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise UserError(
            f"the scheduler's prediction_type={kind!r} is unknown: use one of {', '.join(PREDICTION_TYPES)}"
        )
    a = DDPMScheduler.from_config(scheduler.config).alphas_cumprod.float()
    return a.sqrt(), (1 - a).sqrt(), torch.arange(len(a)), kind


def _flow(scheduler: Any) -> tuple[Tensor, Tensor, Tensor, str]:
    """``n_t = k u / (1 + (k - 1) u)``, ``u = (t + 1) / T``, with the scheduler's constant shift ``k``."""
    steps = scheduler.config.get("num_train_timesteps", 1000)
    shift = scheduler.config.get("shift", 1.0)
    dynamic = scheduler.config.get("use_dynamic_shifting", False)  # sampling then derives the shift from the image size
    k = 1.0 if dynamic else shift
    u = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    noise = (k * u / (1 + (k - 1) * u)).float()
    return 1 - noise, noise, noise * steps, "flow"


def with_zero_snr(scheduler: Any) -> Any:
    """DDIM scheduler like ``scheduler``, rescaled to zero terminal SNR (arXiv 2305.08891), for training and sampling.

    Raises :class:`UserError` for epsilon prediction, which is undefined at zero SNR, and for flow matching, which has
    zero terminal SNR already.
    """
    from diffusers import DDIMScheduler

    if is_flow(scheduler) or scheduler.config.get("prediction_type", "epsilon") == "epsilon":
        kind = "flow matching" if is_flow(scheduler) else "epsilon prediction"
        raise UserError(f"--rescale_zero_snr needs a base with v-prediction, but this one has {kind}: leave it out")
    return DDIMScheduler.from_config(
        scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
