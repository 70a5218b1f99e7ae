"""Stage 3: the judge, a small CLIP trained on the same scenes, which scores subjects and prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .configs import Size
from .loop import LoopOptions, Trainer
from .render import sample
from .stage_diffusion import token_ids, tokens
from .stage_vae import autocast, to_tensor

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer


def build_judge(size: Size, tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    """A freshly initialised judge of that size."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed + 2)
    ids, dim = token_ids(tokenizer), size.judge["projection_dim"]
    return CLIPModel(
        CLIPConfig(
            text_config={**size.judge["text"], **ids, "projection_dim": dim},
            vision_config={**size.judge["vision"], "projection_dim": dim},
            projection_dim=dim,
            bos_token_id=ids["bos_token_id"],
            eos_token_id=ids["eos_token_id"],
            pad_token_id=ids["pad_token_id"],
        )
    )


def augment(picture: Tensor, g: torch.Generator) -> Tensor:
    """Small shifts, zooms, soft focus, brightness and noise: pictures that a decoder makes are not exact."""
    n = len(picture)
    zoom = 1 - 0.12 * torch.rand(n, generator=g)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = (torch.rand(n, 2, generator=g) * 2 - 1) * 0.1
    out = F.grid_sample(
        picture,
        F.affine_grid(theta, list(picture.shape), align_corners=False),
        padding_mode="reflection",
        align_corners=False,
    )
    soft = F.avg_pool2d(F.pad(out, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mix = torch.rand(n, 1, 1, 1, generator=g)
    out = out + (soft - out) * mix
    gain = 1 + 0.1 * (torch.rand(n, 1, 1, 1, generator=g) * 2 - 1)
    return out * gain + 0.04 * torch.randn(out.shape, generator=g)


def train_judge(size: Size, tokenizer: CLIPTokenizer, options: LoopOptions, seed: int, device: torch.device) -> Trainer:
    """Contrastive training (CLIP's symmetric loss); other captions of the batch are the negatives."""
    judge = build_judge(size, tokenizer, seed).to(device).train()
    config = size.stages["judge"]
    trainer = Trainer("judge", judge, config, options)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        pairs = [sample(seed + 1, step * config.batch + i) for i in range(config.batch)]
        g = torch.Generator().manual_seed(seed * 7919 + step)
        picture = augment(to_tensor(np.stack([p for p, _ in pairs])), g).to(device)
        captions = [c for _, c in pairs]
        with autocast(device):
            out = judge(input_ids=tokens(tokenizer, captions).to(device), pixel_values=picture)
        logits = out.logits_per_image.float()
        same = torch.tensor([[a == b for b in captions] for a in captions], device=device)
        target = same.float() / same.float().sum(1, keepdim=True)
        loss = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
        top1 = (logits.argmax(1) == torch.arange(len(captions), device=device)).float().mean().item()
        return loss, {"top1": round(top1, 4)}

    trainer.run(loss_fn)
    return trainer
