"""Stage 3: the judge, a small CLIP trained on the same scenes, which scores subjects and prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..world.render import render
from ..world.scenes import Thing, scene_pair
from .configs import Size
from .loop import LoopOptions, Trainer
from .stage_diffusion import token_ids, tokens
from .stage_vae import autocast, to_tensor

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

TEMPERATURE = 0.1  # of the subject loss


def build_judge(size: Size, tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    """A freshly initialized judge of that size."""
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


def caption_loss(logits: Tensor, captions: list[str]) -> Tensor:
    """CLIP's symmetric loss; equal captions of the batch share the target."""
    same = torch.tensor([[a == b for b in captions] for a in captions], device=logits.device).float()
    target = same / same.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def subject_loss(features: Tensor, things: list[Thing], temperature: float = TEMPERATURE) -> Tensor:
    """Supervised contrastive loss on unit features ``[n, d]``: pictures of one object attract, wherever it stands.

    ``-mean_{j in P(i)} log( e^{f_i f_j / t} / sum_{k != i} e^{f_i f_k / t} )``. https://arxiv.org/abs/2004.11362
    """
    same = torch.tensor([[a == b for b in things] for a in things], device=features.device)
    self = torch.eye(len(things), dtype=torch.bool, device=features.device)
    scores = (features @ features.T / temperature).masked_fill(self, -torch.inf)
    log_p = scores.log_softmax(1).masked_fill(self, 0)
    positive = (same & ~self).float()
    return -((log_p * positive).sum(1) / positive.sum(1)).mean()


def train_judge(size: Size, tokenizer: CLIPTokenizer, options: LoopOptions, seed: int, device: torch.device) -> Trainer:
    """Learn captions (CLIP) and subjects (supervised contrastive) from pairs of scenes around one object."""
    judge = build_judge(size, tokenizer, seed).to(device).train()
    config = size.stages["judge"]
    trainer = Trainer("judge", judge, config, options)
    n = config.batch // 2

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        pairs = [scene_pair(seed + 1, step * n + i) for i in range(n)]
        scenes = [scene for pair in pairs for scene in pair]
        g = torch.Generator().manual_seed(seed * 7919 + step)
        picture = augment(to_tensor(np.stack([render(scene) for scene in scenes])), g).to(device)
        captions = [scene.caption for scene in scenes]
        with autocast(device):
            out = judge(input_ids=tokens(tokenizer, captions).to(device), pixel_values=picture)
        logits = out.logits_per_image.float()
        by_caption = caption_loss(logits, captions)
        by_subject = subject_loss(out.image_embeds.float(), [scene.things[0] for scene in scenes])
        top1 = (logits.argmax(1) == torch.arange(len(captions), device=device)).float().mean().item()
        return by_caption + by_subject, {"top1": round(top1, 4), "subject": round(by_subject.item(), 4)}

    trainer.run(loss_fn)
    return trainer
