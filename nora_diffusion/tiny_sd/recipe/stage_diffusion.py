"""Stage 2: the UNet and the text encoder together, on cached latents of a sliding window of scenes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..world.render import sample
from . import processes
from .configs import CONTEXT, LATENT_CHANNELS, Size
from .loop import LoopOptions, Trainer, step_generator
from .stage_vae import autocast, to_tensor

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import CLIPTokenizer

_CHUNK = 64  # scenes encoded together, always the same ones, so that a resumed run gets the same latents bit for bit
TRAINING_FILE = "training.json"  # beside the weights: the scenes the UNet was trained on, as [[seed, count], ...]
EMPTY_SHARE = 0.1  # of the prompts, for classifier-free guidance
GAMMA = 5.0


def build_scheduler() -> DDIMScheduler:
    """The noise scheduler: scaled linear, rescaled to zero terminal SNR, v-prediction, trailing spacing."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def token_ids(tokenizer: CLIPTokenizer) -> dict[str, int]:
    """Vocabulary size and special token ids for a CLIP text configuration."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_diffusion(size: Size, tokenizer: CLIPTokenizer, seed: int) -> nn.ModuleDict:
    """Untrained UNet and text encoder of that size, in one module."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed + 1)
    unet = UNet2DConditionModel(**size.unet)
    text_encoder = CLIPTextModel(CLIPTextConfig(**size.text, **token_ids(tokenizer)))
    return nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids of shape (N, ``CONTEXT``), padded or truncated."""
    out = tokenizer(captions, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt")
    return out.input_ids


class LatentPool:
    """Latent means and token ids of ``size.pool`` consecutive scenes, a window that slides with the steps."""

    def __init__(
        self, vae: AutoencoderKL, tokenizer: CLIPTokenizer, size: Size, seed: int, device: torch.device
    ) -> None:
        self.vae, self.tokenizer, self.size, self.seed, self.device = vae, tokenizer, size, seed, device
        side = size.unet["sample_size"]
        self.latents = torch.empty(size.pool, LATENT_CHANNELS, side, side)
        self.ids = torch.empty(size.pool, CONTEXT, dtype=torch.long)
        self.end = 0

    def advance(self, step: int) -> None:
        """Move the window to that step and encode its new scenes."""
        end = self.size.pool + (step // self.size.refresh) * self.size.renew
        begin = max(self.end, end - self.size.pool) // _CHUNK * _CHUNK
        for start in range(begin, end, _CHUNK):
            self._encode(start)
        self.end = end

    @torch.no_grad()
    def _encode(self, start: int) -> None:
        pairs = [sample(self.seed, start + i) for i in range(_CHUNK)]
        images = to_tensor(np.stack([image for image, _ in pairs])).to(self.device)
        with autocast(self.device):
            latent = self.vae.encode(images).latent_dist.mean.float() * self.vae.config.scaling_factor
        slots = torch.arange(start, start + _CHUNK) % self.size.pool
        self.latents[slots] = latent.cpu()
        self.ids[slots] = tokenize(self.tokenizer, [caption for _, caption in pairs])


def loss_weight(snr: Tensor) -> Tensor:
    """``min(snr + 1, gamma) / (snr + 1)``: the plain v loss, weighted down at high SNR.

    Min-SNR weighting would be zero for pure noise, where a model with zero terminal SNR decides the layout.
    """
    return (snr + 1).clamp(max=GAMMA) / (snr + 1)


def train_diffusion(
    size: Size,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    options: LoopOptions,
    seed: int,
    device: torch.device,
    init: Path | None = None,
    compiled: bool = False,
) -> None:
    """Train UNet and text encoder on v-prediction with stratified timesteps and some empty prompts.

    Start from the pipeline ``init`` if given. Several processes (:mod:`.processes`) share each batch.
    """
    model = build_diffusion(size, tokenizer, seed)
    if init is not None:
        load_weights(model, init)
    model.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    unet = torch.compile(model["unet"]) if compiled else model["unet"]
    config = size.stages["diffusion"]
    trainer = Trainer("diffusion", model, config, options)
    own_seed = processes.seeds(seed)[processes.rank()]
    pool = LatentPool(vae.to(device).eval(), tokenizer, size, own_seed, device)
    alphas = build_scheduler().alphas_cumprod
    timesteps = len(alphas)
    empty = tokenize(tokenizer, [""])

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        pool.advance(step)
        g = step_generator(own_seed, step)
        n = config.batch // processes.world_size()
        pick = torch.randint(0, size.pool, (n,), generator=g)
        x0, ids = pool.latents[pick], pool.ids[pick]
        ids = torch.where(torch.rand(n, 1, generator=g) < EMPTY_SHARE, empty, ids)
        noise = torch.randn(x0.shape, generator=g)
        t = ((torch.arange(n) + torch.rand(n, generator=g)) / n * timesteps).long().clamp(max=timesteps - 1)
        a = alphas[t].view(-1, 1, 1, 1)
        noisy, v = a.sqrt() * x0 + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x0
        with autocast(device):
            text = model["text_encoder"](ids.to(device)).last_hidden_state
            out = unet(noisy.to(device), t.to(device), text).sample.float()
        snr = (alphas[t] / (1 - alphas[t])).to(device)
        error = (out - v.to(device)).square().mean((1, 2, 3))
        return (loss_weight(snr) * error).mean(), {"v_mse": round(error.mean().item(), 5)}

    trainer.run(loss_fn)
    if processes.rank() == 0:
        record_scenes(options.out / TRAINING_FILE, init, seed, pool.end)


def record_scenes(path: Path, init: Path | None, seed: int, count: int) -> None:
    """Write which scenes the UNet was trained on: those of the initial weights and those of this run."""
    previous = init.parent / TRAINING_FILE if init else None
    scenes = json.loads(previous.read_text(encoding="utf-8"))["scenes"] if previous and previous.exists() else []
    own = [[own_seed, count] for own_seed in processes.seeds(seed)]
    path.write_text(json.dumps({"scenes": [*scenes, *own]}) + "\n", encoding="utf-8")


def load_weights(model: nn.ModuleDict, pipeline: Path) -> None:
    """Load the weights of UNet and text encoder from a pipeline folder."""
    for component, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        state = load_file(pipeline / component / f"{name}.safetensors")
        model[component].load_state_dict({k: v.float() for k, v in state.items()})
