"""Learned gates, after MoLE (arXiv 2404.13628): how much of each adapter a layer uses, at all positions alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...adapters.tuner.mixed_rows import serve_rows
from ...adapters.tuner.row_plan import MaskedPlan
from ...pipelines.components import nora_layers
from ...pipelines.precision import lowered
from ..recipe.stage_vae import to_tensor

STEPS, BATCH, RATE = 60, 4, 0.05


class GatePlan(MaskedPlan):
    """``y = W x + K sum_k g_k s_k dW_k x`` with ``g = softmax(w [K])`` of the layer, which starts at the plain sum."""

    def __init__(self, names: Sequence[str], paths: Sequence[str]) -> None:
        super().__init__(names)
        self.logits = torch.zeros(len(paths), len(names), requires_grad=True)
        self._row = {path: row for row, path in enumerate(paths)}

    def mask(self, path: str, name: str, positions: Sequence[int]) -> Tensor | None:
        """As inherited: one number for the whole layer."""
        gates = self.logits[self._row[path]].softmax(-1) * len(self.names)
        return gates[self.names.index(name)].view([1] * (len(positions) + 2))


def train(pipe: Any, plan: GatePlan, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
    """Learn the gates on images of both subjects: the plain denoising loss, AdamW."""
    generator, optimizer = torch.Generator().manual_seed(0), torch.optim.AdamW([plan.logits], RATE, weight_decay=0.0)
    scheduler = pipe.scheduler
    with torch.no_grad():
        pixels = to_tensor(np.stack([np.asarray(image) for image in images])).to(pipe.vae.dtype)
        latents = pipe.vae.encode(pixels).latent_dist.mode().float() * pipe.vae.config.scaling_factor
        states = pipe.encode_prompt(list(captions), pipe.device, 1, False)[0]
    for _ in range(STEPS):
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        x, noise = latents[rows], torch.randn(latents[rows].shape, generator=generator)
        t = torch.randint(scheduler.config.num_train_timesteps, (BATCH,), generator=generator)
        noised, target = scheduler.add_noise(x, noise, t), scheduler.get_velocity(x, noise, t)
        with lowered(pipe.unet.dtype, pipe.unet.device):
            found = pipe.unet(noised, t, encoder_hidden_states=states[rows]).sample
        (plan.logits.grad,) = torch.autograd.grad(F.mse_loss(found.float(), target), [plan.logits])
        optimizer.step()


@contextmanager
def gated(
    pipe: Any, subjects: Mapping[str, str], images: Sequence[Image.Image], captions: Sequence[str]
) -> Iterator[None]:
    """Both adapters act everywhere, with gates learned from these images."""
    plan = GatePlan(list(subjects), list(nora_layers(pipe.unet, next(iter(subjects)))))
    with serve_rows(pipe.unet, plan):
        train(pipe, plan, images, captions)
        plan.logits.requires_grad_(False)
        yield
