"""Sizes and training settings of the base: ``tiny`` is what ships, ``nano`` trains in seconds for tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Stage = Literal["vae", "decoder", "diffusion", "judge"]  # decoder: the autoencoder's, its latents kept
CONTEXT = 32  # tokens of a prompt, start and end included


@dataclass(frozen=True)
class StageConfig:
    """Optimization of one stage: warm-up, constant rate, linear decay over the last ``decay`` share."""

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
    """One size of the whole model: diffusers and transformers configurations and the stages."""

    name: str
    vae: dict[str, Any]
    text: dict[str, Any]
    unet: dict[str, Any]
    judge: dict[str, Any]
    stages: dict[Stage, StageConfig]
    pool: int = 8192  # scenes whose latents are kept and trained on at a time
    refresh: int = 50  # steps between two renewals of the oldest part of the pool
    renew: int = 768  # scenes renewed each time
    crop_share: float = 0.7  # of the VAE's steps on 32 x 32 crops, which cost a quarter; the rest on whole pictures
    weights: dict[str, float] = field(default_factory=lambda: {"l1": 1.0, "l2": 4.0, "gradient": 0.5, "kl": 1e-6})


def _vae(channels: tuple[int, ...]) -> dict[str, Any]:
    n = len(channels)
    return {
        "sample_size": 64,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * n,
        "up_block_types": ("UpDecoderBlock2D",) * n,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    }


def _unet(channels: tuple[int, ...], heads: tuple[int, ...], cross: int, groups: int) -> dict[str, Any]:
    return {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": channels,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (len(channels) - 1),
        "up_block_types": ("CrossAttnUpBlock2D",) * (len(channels) - 1) + ("UpBlock2D",),
        "attention_head_dim": heads,
        "cross_attention_dim": cross,
        "norm_num_groups": groups,
    }


def _text(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "quick_gelu",
    }


SIZES: dict[str, Size] = {
    "tiny": Size(
        name="tiny",
        vae=_vae((32, 32, 64)),
        text=_text(160, 2, 5),
        unet=_unet((64, 128, 160), (2, 4, 5), 160, 8),
        judge={
            "text": _text(128, 2, 4),
            "projection_dim": 128,
            "vision": {
                "hidden_size": 128,
                "intermediate_size": 512,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "image_size": 64,
                "patch_size": 8,
                "hidden_act": "quick_gelu",
            },
        },
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
        name="nano",
        vae=_vae((8, 8, 8)),
        text=_text(16, 1, 2),
        unet=_unet((8, 16, 16), (1, 2, 2), 16, 4),
        judge={
            "text": _text(16, 1, 2),
            "projection_dim": 16,
            "vision": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 64,
                "patch_size": 16,
                "hidden_act": "quick_gelu",
            },
        },
        stages={
            "vae": StageConfig(steps=4, batch=2, lr=1e-3, warmup=2),
            "decoder": StageConfig(steps=4, batch=2, lr=1e-3, warmup=2),
            "diffusion": StageConfig(steps=4, batch=4, lr=1e-3, warmup=2, optimizer="muon"),
            "judge": StageConfig(steps=4, batch=4, lr=1e-3, warmup=2),
        },
        pool=128,
        refresh=2,
        renew=64,
    ),
}
