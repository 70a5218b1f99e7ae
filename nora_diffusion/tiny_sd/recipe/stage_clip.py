"""Stage 3: the judge, a small CLIP trained on drawn scenes, which scores subjects and prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..world.render import render
from ..world.scenes import SceneObject, scene_pair
from .configs import Size
from .loop import LoopOptions, Trainer, step_generator
from .stage_diffusion import token_ids, tokenize
from .stage_vae import autocast, to_tensor

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

TEMPERATURE = 0.1  # of the subject loss


def build_judge(size: Size, tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    """An untrained judge of that size."""
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


def augment(images: Tensor, g: torch.Generator) -> Tensor:
    """Random small shifts, zooms, blur, brightness and noise, because decoded images differ from rendered ones."""
    n = len(images)
    zoom = 1 - 0.12 * torch.rand(n, generator=g)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = (torch.rand(n, 2, generator=g) * 2 - 1) * 0.1
    out = F.grid_sample(
        images,
        F.affine_grid(theta, list(images.shape), align_corners=False),
        padding_mode="reflection",
        align_corners=False,
    )
    blurred = F.avg_pool2d(F.pad(out, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    out = out + (blurred - out) * torch.rand(n, 1, 1, 1, generator=g)
    gain = 1 + 0.1 * (torch.rand(n, 1, 1, 1, generator=g) * 2 - 1)
    return out * gain + 0.04 * torch.randn(out.shape, generator=g)


def caption_loss(logits: Tensor, captions: list[str]) -> Tensor:
    """CLIP's symmetric cross entropy. Equal captions in the batch share the target probability."""
    same = torch.tensor([[a == b for b in captions] for a in captions], device=logits.device).float()
    target = same / same.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def subject_loss(features: Tensor, objects: list[SceneObject], temperature: float = TEMPERATURE) -> Tensor:
    """Supervised contrastive loss on unit features ``[n, d]``; images of the same object are positives.

    ``-mean_i mean_{j in P(i)} log( e^{f_i f_j / t} / sum_{k != i} e^{f_i f_k / t} )``, where ``P(i)`` are the other
    images of the object in image ``i``. https://arxiv.org/abs/2004.11362
    """
    same = torch.tensor([[a == b for b in objects] for a in objects], device=features.device)
    diagonal = torch.eye(len(objects), dtype=torch.bool, device=features.device)
    scores = (features @ features.T / temperature).masked_fill(diagonal, -torch.inf)
    log_p = scores.log_softmax(1).masked_fill(diagonal, 0)
    positive = (same & ~diagonal).float()
    return -((log_p * positive).sum(1) / positive.sum(1)).mean()


def train_judge(size: Size, tokenizer: CLIPTokenizer, options: LoopOptions, seed: int, device: torch.device) -> None:
    """Train with CLIP's loss on captions and a supervised contrastive loss on objects; each object is in two scenes."""
    judge = build_judge(size, tokenizer, seed).to(device).train()
    config = size.stages["judge"]
    n = config.batch // 2

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        pairs = [scene_pair(seed + 1, step * n + i) for i in range(n)]
        scenes = [scene for pair in pairs for scene in pair]
        rendered = to_tensor(np.stack([render(scene) for scene in scenes]))
        images = augment(rendered, step_generator(seed, step)).to(device)
        captions = [scene.caption for scene in scenes]
        with autocast(device):
            out = judge(input_ids=tokenize(tokenizer, captions).to(device), pixel_values=images)
        logits = out.logits_per_image.float()
        by_caption = caption_loss(logits, captions)
        by_subject = subject_loss(out.image_embeds.float(), [scene.objects[0] for scene in scenes])
        top1 = (logits.argmax(1) == torch.arange(len(captions), device=device)).float().mean().item()
        return by_caption + by_subject, {"top1": round(top1, 4), "subject": round(by_subject.item(), 4)}

    Trainer("judge", judge, config, options).run(loss_fn)
