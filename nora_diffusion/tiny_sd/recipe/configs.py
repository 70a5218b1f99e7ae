"""Model sizes and training settings of the base: ``tiny`` ships, ``nano`` trains in seconds for tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..world.backgrounds import SIDE

Stage = Literal[
    "vae", "decoder", "diffusion", "judge"
]  # decoder: the autoencoder's decoder alone, for the same latents
CONTEXT = 32  # tokens of a prompt, start and end included
DOWNSAMPLING = 4  # image side / latent side
LATENT_CHANNELS = 4


@dataclass(frozen=True)
class StageConfig:
    """Optimization of one stage. The learning rate warms up, stays, and decays linearly in the last ``decay`` share."""

    steps: int
    batch: int
    lr: float
    warmup: int = 200
    decay: float = 0.3
    weight_decay: float = 0.01
    beta2: float = 0.98
    ema: float = 0.999
    clip: float = 1.0
    optimizer: Literal["adamw", "muon"] = "adamw"


@dataclass(frozen=True)
class Size:
    """One size of the whole model: diffusers and transformers configurations, and the settings of each stage."""

    vae: dict[str, Any]
    text: dict[str, Any]
    unet: dict[str, Any]
    judge: dict[str, Any]
    stages: dict[Stage, StageConfig]
    pool: int = 8192  # cached scenes, from which the diffusion batches are drawn
    refresh: int = 50  # steps between two replacements of the oldest scenes in the pool
    renew: int = 768  # scenes replaced each time
    crop_share: float = (
        0.7  # of the VAE's steps use crops of half the side, a quarter of the cost; the rest, whole images
    )
    normalizing: int = 512  # scenes whose latents get mean 0 and deviation 1
    vae_loss: dict[str, float] = field(default_factory=lambda: {"l1": 1.0, "l2": 4.0, "gradient": 0.5, "kl": 1e-6})


def _vae(channels: tuple[int, ...]) -> dict[str, Any]:
    n = len(channels)
    return {
        "sample_size": SIDE,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": LATENT_CHANNELS,
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * n,
        "up_block_types": ("UpDecoderBlock2D",) * n,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    }


def _unet(channels: tuple[int, ...], heads: tuple[int, ...], cross: int, groups: int) -> dict[str, Any]:
    return {
        "sample_size": SIDE // DOWNSAMPLING,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "block_out_channels": channels,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (len(channels) - 1),
        "up_block_types": ("CrossAttnUpBlock2D",) * (len(channels) - 1) + ("UpBlock2D",),
        "attention_head_dim": heads,
        "cross_attention_dim": cross,
        "norm_num_groups": groups,
    }


def _transformer(width: int, layers: int, heads: int, mlp: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": "quick_gelu",
    }


def _text(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {**_transformer(width, layers, heads, 4 * width), "max_position_embeddings": CONTEXT}


def _judge(width: int, text: dict[str, Any], vision: dict[str, Any], patch: int) -> dict[str, Any]:
    return {"text": text, "projection_dim": width, "vision": {**vision, "image_size": SIDE, "patch_size": patch}}


SIZES: dict[str, Size] = {
    "tiny": Size(
        vae=_vae((32, 32, 64)),
        text=_text(160, 2, 5),
        unet=_unet((64, 128, 160), (2, 4, 5), 160, 8),
        judge=_judge(128, _text(128, 2, 4), _transformer(128, 4, 4, 512), patch=8),
        stages={
            "vae": StageConfig(steps=3600, batch=16, lr=1.5e-3, ema=0.995),
            "decoder": StageConfig(steps=3200, batch=16, lr=1e-3, ema=0.995),
            "diffusion": StageConfig(
                steps=1350, batch=64, lr=1.5e-3, warmup=60, decay=0.4, ema=0.995, optimizer="muon"
            ),
            "judge": StageConfig(steps=2400, batch=128, lr=1.5e-3, warmup=60, decay=0.5, ema=0.99, optimizer="muon"),
        },
    ),
    "nano": Size(
        vae=_vae((8, 8, 8)),
        text=_text(16, 1, 2),
        unet=_unet((8, 16, 16), (1, 2, 2), 16, 4),
        judge=_judge(16, _text(16, 1, 2), _transformer(16, 1, 2, 32), patch=16),
        stages={
            "vae": StageConfig(steps=4, batch=2, lr=1e-3, warmup=2),
            "decoder": StageConfig(steps=4, batch=2, lr=1e-3, warmup=2),
            "diffusion": StageConfig(steps=4, batch=4, lr=1e-3, warmup=2, optimizer="muon"),
            "judge": StageConfig(steps=4, batch=4, lr=1e-3, warmup=2),
        },
        pool=128,
        refresh=2,
        renew=64,
        normalizing=16,
    ),
}
