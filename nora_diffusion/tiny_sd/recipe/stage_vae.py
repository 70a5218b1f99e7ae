"""Stage 1: the autoencoder, on freshly rendered scenes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..world.render import SIDE, sample
from .configs import Size
from .loop import LoopOptions, Trainer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

DECODER_NOISE = 0.25  # of the encoder's deviation: a UNet's latents are nearly clean, and a decoder of noisy ones blurs


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) to float (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().float().div(127.5).sub(1)


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """bf16 autocast where it pays: on a GPU, and on a CPU only if it multiplies bf16 in tiles (AMX)."""
    fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast)


def build_vae(size: Size, seed: int) -> AutoencoderKL:
    """A freshly initialized autoencoder of that size."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(**size.vae)


def read_vae(folder: Path) -> AutoencoderKL:
    """The autoencoder of a folder, in fp32."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder).float().eval()
    vae.register_to_config(_name_or_path="vae")  # where a run's folder was is nobody's business
    return vae


def _gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def vae_loss(picture: Tensor, output: Tensor, mean: Tensor, logvar: Tensor, w: dict[str, float]) -> Tensor:
    """``L1 + 4 L2 + 0.5 L1 of the image gradients + 1e-6 KL`` (sum over the latent, mean over the batch)."""
    loss = w["l1"] * F.l1_loss(output, picture) + w["l2"] * F.mse_loss(output, picture)
    for a, b in zip(_gradient(output), _gradient(picture), strict=True):
        loss = loss + w["gradient"] * F.l1_loss(a, b)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
    return loss + w["kl"] * kl


def _batch(seed: int, step: int, n: int, cropped: bool) -> np.ndarray:
    """``n`` random 32 x 32 crops of new scenes, or half as many whole scenes."""
    rng = np.random.default_rng((seed, step))
    if not cropped:
        return np.stack([sample(seed, step * n + i)[0] for i in range(n // 2)])
    corners = rng.integers(0, SIDE - 32 + 1, (n, 2))
    return np.stack([sample(seed, step * n + i)[0][y : y + 32, x : x + 32] for i, (y, x) in enumerate(corners)])


def train_vae(
    size: Size,
    options: LoopOptions,
    seed: int,
    device: torch.device,
    init: Path | None = None,
    decoder_only: bool = False,
) -> Trainer:
    """Train the autoencoder, or go on with that of the pipeline ``init``; the result is the trainer's EMA.

    ``decoder_only``: the latents stay what they are, so that a UNet that was trained on them fits the new decoder too.
    """
    vae = build_vae(size, seed) if init is None else read_vae(init / "vae")
    vae.to(device).train()
    learned: nn.Module = vae
    if decoder_only:
        learned = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})
        vae.requires_grad_(False)
        learned.requires_grad_(True)
    config = size.stages["decoder" if decoder_only else "vae"]
    trainer = Trainer("vae", learned, config, options)
    noise_share = DECODER_NOISE if decoder_only else 1.0

    def forward(picture: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = vae.quant_conv(vae.encoder(picture)).chunk(2, dim=1)
        logvar = logvar.float().clamp(-30, 4)
        z = mean.float() + torch.exp(0.5 * logvar) * noise * noise_share
        return vae.decoder(vae.post_quant_conv(z)).float(), mean.float(), logvar

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        picture = to_tensor(_batch(seed, step, config.batch, step < size.crop_share * config.steps)).to(device)
        n, _, h, w = picture.shape
        noise = torch.randn(n, 4, h // 4, w // 4, generator=torch.Generator().manual_seed(seed * 7919 + step))
        with autocast(device):
            output, mean, logvar = forward(picture, noise.to(device))
        loss = vae_loss(picture, output, mean, logvar, size.weights)
        mse = (output.detach() - picture).square().mean().item()
        return loss, {"psnr": round(10 * np.log10(4 / max(mse, 1e-9)), 2)}

    trainer.run(loss_fn)
    return trainer
