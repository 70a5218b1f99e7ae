"""Tiny random pipelines in the layout of Stable Diffusion 1.5, and photos, made on the fly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

PredictionType = Literal["epsilon", "v_prediction"]
WORDS = (
    "a",
    "photo",
    "of",
    "sks",
    "dog",
    "cat",
    "toy",
    "on",
    "the",
    "beach",
    "in",
    "snow",
    "red",
    "hat",
    "with",
)


def write_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> Path:
    """Write ``vocab.json`` and ``merges.txt`` of a byte-level CLIP tokenizer that knows ``words``."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges: list[str] = []
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = f"{parts[0]} {parts[1]}"
            merges += [] if pair in merges else [pair]
            parts = [parts[0] + parts[1], *parts[2:]]
            vocabulary += [] if parts[0] in vocabulary else [parts[0]]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder


def tiny_random_pipeline(
    path: Path, prediction_type: PredictionType = "epsilon", seed: int = 0, tokens: int = 16
) -> Path:
    """Save a random Stable Diffusion 1.5-shaped pipeline of a few thousand weights; returns its folder."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    files = write_tokenizer(path / "tokenizer")
    tokenizer = CLIPTokenizer(str(files / "vocab.json"), str(files / "merges.txt"), model_max_length=tokens)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    shared = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = (
        PNDMScheduler(skip_prk_steps=True, **shared)
        if prediction_type == "epsilon"
        else DDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
            **shared,
        )
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(path)
    write_tokenizer(path / "tokenizer")
    torch.random.set_rng_state(state)
    return path


def write_photos(folder: Path, count: int = 3, size: tuple[int, int] = (24, 20), seed: int = 0) -> Path:
    """Write ``count`` random RGB pictures as PNG; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for index in range(count):
        pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def randomize(pipe: Any, name: str = "one", seed: int = 0, size: float = 0.3) -> None:
    """Seeded normal numbers for all that an adapter trains."""
    from nora_diffusion.loaders import trainable_parameters

    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable_parameters(pipe, name).values():
        parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))


def tiny_clip(path: Path) -> Path:
    """Save a random CLIP for pictures of 16 pixels, in fp16 as judges are shipped; returns its folder."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    write_tokenizer(path)
    tokenizer = CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"), model_max_length=16)
    tokenizer.save_pretrained(path)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = tokenizer.eos_token_id
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": end, "pad_token_id": end}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**sizes, **text}, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    CLIPModel(config).half().save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return path


def tiny_dino(path: Path) -> Path:
    """Save a random DINOv2 whose pictures are cropped to 28 pixels; returns its folder."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 42, "patch_size": 14}
    model = Dinov2Model(Dinov2Config(**sizes))
    for parameter in model.parameters():
        parameter.data.mul_(10 if parameter.ndim > 1 else 1)  # else it says the same of every picture
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({"crop_size": {"height": 28, "width": 28}}))
    return path
