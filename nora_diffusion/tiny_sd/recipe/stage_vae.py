"""Stage 1: the autoencoder, on freshly rendered scenes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..world.backgrounds import SIDE
from ..world.render import sample
from .configs import DOWNSAMPLING, LATENT_CHANNELS, Size
from .loop import LoopOptions, Trainer, step_generator

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

CROP = SIDE // 2  # side of the crops that most steps train on
DECODER_NOISE = 0.25  # of the encoder's deviation. Sampled latents are nearly clean; a decoder of noisy latents blurs.


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) to float (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float().div(127.5).sub(1)


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """bf16 autocast where it is faster: on a GPU, and on a CPU with AMX."""
    fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast)


def build_vae(size: Size, seed: int) -> AutoencoderKL:
    """An untrained autoencoder of that size."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(**size.vae)


def read_vae(folder: Path) -> AutoencoderKL:
    """Load the autoencoder of a folder in fp32."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder).float().eval()
    vae.register_to_config(_name_or_path="vae")  # do not publish the path of the run
    return vae


def _image_gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def vae_loss(images: Tensor, output: Tensor, mean: Tensor, logvar: Tensor, w: dict[str, float]) -> Tensor:
    """``w_l1 L1 + w_l2 L2 + w_gradient L1 of the image gradients + w_kl KL``.

    The KL is summed over each latent and averaged over the batch; the other terms are means over all pixels.
    """
    loss = w["l1"] * F.l1_loss(output, images) + w["l2"] * F.mse_loss(output, images)
    for a, b in zip(_image_gradients(output), _image_gradients(images), strict=True):
        loss = loss + w["gradient"] * F.l1_loss(a, b)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
    return loss + w["kl"] * kl


def _batch(seed: int, step: int, n: int, cropped: bool) -> np.ndarray:
    """``n`` random crops of new scenes, or half as many whole scenes."""
    rng = np.random.default_rng((seed, step))
    if not cropped:
        return np.stack([sample(seed, step * n + i)[0] for i in range(n // 2)])
    corners = rng.integers(0, SIDE - CROP + 1, (n, 2))
    return np.stack([sample(seed, step * n + i)[0][y : y + CROP, x : x + CROP] for i, (y, x) in enumerate(corners)])


def train_vae(
    size: Size,
    options: LoopOptions,
    seed: int,
    device: torch.device,
    init: Path | None = None,
    decoder_only: bool = False,
) -> None:
    """Train a new autoencoder, or continue that of the pipeline ``init``. The result is the EMA in the stage's state.

    ``decoder_only``: train only the decoder. The latents do not change, so the UNet trained on them stays usable.
    """
    vae = build_vae(size, seed) if init is None else read_vae(init / "vae")
    vae.to(device).train()
    trained: nn.Module = vae
    if decoder_only:
        trained = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})
        vae.requires_grad_(False)
        trained.requires_grad_(True)
    config = size.stages["decoder" if decoder_only else "vae"]
    noise_scale = DECODER_NOISE if decoder_only else 1.0

    def forward(images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = vae.quant_conv(vae.encoder(images)).chunk(2, dim=1)
        logvar = logvar.float().clamp(-30, 4)
        z = mean.float() + torch.exp(0.5 * logvar) * noise * noise_scale
        return vae.decoder(vae.post_quant_conv(z)).float(), mean.float(), logvar

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        images = to_tensor(_batch(seed, step, config.batch, step < size.crop_share * config.steps)).to(device)
        n, _, h, w = images.shape
        shape = (n, LATENT_CHANNELS, h // DOWNSAMPLING, w // DOWNSAMPLING)
        noise = torch.randn(shape, generator=step_generator(seed, step))
        with autocast(device):
            output, mean, logvar = forward(images, noise.to(device))
        loss = vae_loss(images, output, mean, logvar, size.vae_loss)
        mse = (output.detach() - images).square().mean().item()
        return loss, {"psnr": round(10 * np.log10(4 / max(mse, 1e-9)), 2)}

    Trainer("vae", trained, config, options).run(loss_fn)
